"""Whose block is next: everyone in turn, nothing twice, and bounded whatever is asked for."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from appliance.hub import block_turns
from appliance.hub.block_turns import BLOCKS_A_DEVICE, LONGEST_S, BlockTurns, asked_for

A, B = "a" * 64, "b" * 64


def drain(turns: BlockTurns, now: float = 0.0) -> list[tuple[str, int]]:
    found = []
    while (wanted := turns.take(now)) is not None:
        found.append((wanted.device, wanted.block))
    return found


def test_devices_take_turns_block_by_block() -> None:
    turns = BlockTurns()
    turns.add("fast", A, range(4), 1, 0.0)
    turns.add("slow", A, [7], 2, 0.0)
    assert drain(turns) == [("fast", 0), ("slow", 7), ("fast", 1), ("fast", 2), ("fast", 3)]
    assert turns.take(0.0) is None


def test_what_is_asked_for_twice_is_sent_once() -> None:
    turns = BlockTurns()
    assert turns.add("one", A, [1, 2], 1, 0.0) == 0
    assert turns.add("one", A, [2, 3], 2, 0.0) == 0
    assert drain(turns) == [("one", 1), ("one", 2), ("one", 3)]


def test_a_device_has_no_more_than_a_window_here() -> None:
    turns = BlockTurns()
    assert turns.add("one", A, range(BLOCKS_A_DEVICE + 5), 1, 0.0) == 5
    assert turns.add("one", A, [0], 2, 0.0) == 0  # is there already
    assert len(turns) == BLOCKS_A_DEVICE


def test_devices_beyond_the_limit_are_put_off_and_empty_requests_leave_nothing(monkeypatch: object) -> None:
    turns = BlockTurns()
    turns.add("nobody", A, [], 1, 0.0)
    assert len(turns._devices) == 0
    before, block_turns.MOST_DEVICES = block_turns.MOST_DEVICES, 1
    try:
        turns.add("one", A, [1], 1, 0.0)
        assert turns.add("two", A, [1, 2], 1, 0.0) == 2
        assert turns.add("one", A, [2], 1, 0.0) == 0
    finally:
        block_turns.MOST_DEVICES = before


def test_what_nobody_waits_for_any_more_is_dropped() -> None:
    turns = BlockTurns()
    turns.add("one", A, [1], 1, 0.0)
    turns.add("one", A, [2], 1, 10.0)
    assert drain(turns, LONGEST_S + 1.0) == [("one", 2)]


def test_a_file_that_is_gone_is_forgotten_and_others_are_not() -> None:
    turns = BlockTurns()
    turns.add("one", A, [1, 2], 1, 0.0)
    turns.add("one", B, [3], 1, 0.0)
    turns.forget("one", A)
    turns.forget("two", A)
    assert drain(turns) == [("one", 3)]
    turns.add("one", A, [1], 1, 0.0)
    turns.forget("one", A)
    assert len(turns) == 0


@given(st.integers(0, 2**40), st.binary(max_size=16))
def test_a_request_asks_for_the_bits_that_are_set(first: int, missing: bytes) -> None:
    blocks = asked_for(first, missing)
    assert len(blocks) <= BLOCKS_A_DEVICE
    assert all(missing[(each - first) // 8] >> (each - first) % 8 & 1 for each in blocks)
    assert len(blocks) == min(BLOCKS_A_DEVICE, sum(byte.bit_count() for byte in missing))
