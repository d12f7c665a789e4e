"""The memory of parked states: nobody's bytes are anyone else's, and pages are used again."""

from __future__ import annotations

import mmap
import random
import resource
from pathlib import Path

import numpy as np
import pytest

from appliance.core.errors import EngineError
from appliance.engine.llama.buffers import StateMemory
from appliance.engine.llama.context import State

MIB = 2**20


def page_faults() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1]) * mmap.PAGESIZE


def test_states_never_overlap_whoever_comes_and_goes() -> None:
    memory = StateMemory(MIB)
    chance = random.Random(0)
    held: list[tuple[State, int]] = []
    for number in range(1000):
        size = chance.randrange(MIB // 5)
        payload, value = memory.take(size), number % 251
        assert payload.shape == (size,)
        payload[:] = value
        held.append((payload, value))
        while sum(len(each) for each, _ in held) > 3 * MIB:  # more than there is room for
            payload, value = held.pop(chance.randrange(len(held)))
            assert (payload == value).all()
            memory.give_back(payload)
        memory.check_integrity()
    for payload, value in held:
        assert (payload == value).all()
        memory.give_back(payload)
    memory.check_integrity()
    assert memory.take(2 * MIB).ctypes.data == memory._bytes.ctypes.data, "all of it is free, in one piece"


def test_memory_that_was_used_before_costs_no_page_faults() -> None:
    memory = StateMemory(256 * MIB)
    size = 64 * MIB
    first = memory.take(size)
    first[:] = 1
    memory.give_back(first)
    second = memory.take(size)
    before = page_faults()
    second[:] = 2
    assert page_faults() - before < size // mmap.PAGESIZE // 100


def test_a_cap_that_is_not_used_takes_no_memory() -> None:
    before = resident_bytes()
    memory = StateMemory(2**30)
    memory.take(MIB)[:] = 1
    assert resident_bytes() - before < 32 * MIB


def test_what_went_beyond_the_cap_is_given_to_the_system_and_the_rest_is_kept() -> None:
    memory = StateMemory(64 * MIB)
    held = [memory.take(24 * MIB) for _ in range(5)]
    before = resident_bytes()
    for payload in held:
        payload[:] = 1
    assert resident_bytes() - before > 110 * MIB
    for payload in held:
        memory.give_back(payload)
    assert 60 * MIB < resident_bytes() - before < 70 * MIB


@pytest.mark.parametrize("cap", [0, 1, mmap.PAGESIZE])
def test_a_state_that_does_not_fit_has_memory_of_its_own(cap: int) -> None:
    memory = StateMemory(cap)
    payload = memory.take(3 * mmap.PAGESIZE)
    payload[:] = 1
    memory.give_back(payload)
    memory.give_back(np.empty(5, np.uint8))
    assert memory.take(0).shape == (0,)
    memory.check_integrity()


def test_memory_is_given_back_once() -> None:
    memory = StateMemory(MIB)
    payload = memory.take(1000)
    memory.give_back(payload)
    with pytest.raises(KeyError):
        memory.give_back(payload)


@pytest.mark.parametrize("cap", [2**61, 2**80])
def test_more_than_there_are_addresses_is_an_error_with_advice(cap: int) -> None:
    with pytest.raises(EngineError, match="parking_ram_bytes") as error:
        StateMemory(cap)
    assert error.value.code == "not_enough_memory"


def test_a_payload_outlives_what_it_came_from() -> None:
    memory = StateMemory(MIB)
    payload = memory.take(1000)
    payload[:] = 7
    del memory
    assert np.all(payload == 7)
