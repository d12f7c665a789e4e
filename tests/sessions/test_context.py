"""What of a long history is shown: turns stay whole, the cut moves rarely, and it is found again from nothing."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as some
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from appliance.core.context import Span
from appliance.sessions.context import Budget

BUDGET = Budget()


def message(role: str, text: str = "words") -> dict[str, Any]:
    return {"type": "message", "role": role, "content": text}


def call(name: str) -> dict[str, Any]:
    return {"type": "function_call", "call_id": name, "name": "f", "arguments": "{}"}


def output(name: str) -> dict[str, Any]:
    return {"type": "function_call_output", "call_id": name, "output": "1"}


def spans_of(items: list[dict[str, Any]]) -> list[tuple[int, int]]:
    return [(each.first, each.end) for each in BUDGET.parts(items).spans]


def spans(*sizes: int) -> list[Span]:
    return [Span(index, index + 1, size) for index, size in enumerate(sizes)]


def test_a_turn_goes_from_a_users_message_to_the_next_and_instructions_at_the_start_are_apart() -> None:
    items = [message("system"), message("developer"), message("user"), message("assistant"), message("user")]
    parts = BUDGET.parts(items)
    assert (parts.pinned, spans_of(items)) == (2, [(2, 4), (4, 5)])


def test_messages_to_the_model_in_a_row_are_one_turn() -> None:
    items = [message("user"), message("user"), message("assistant"), message("developer"), message("user")]
    assert spans_of(items) == [(0, 3), (3, 5)]


def test_a_call_stays_with_its_output_whatever_comes_between() -> None:
    items = [message("user"), call("a"), message("assistant"), message("user"), output("a"), message("user")]
    assert spans_of(items) == [(0, 5), (5, 6)]


def test_an_approval_stays_with_what_it_approves() -> None:
    request = {"type": "mcp_approval_request", "id": "mcpr_1", "name": "f", "arguments": "{}"}
    response = {"type": "mcp_approval_response", "approval_request_id": "mcpr_1", "approve": True}
    items = [message("user"), request, message("user"), response, message("assistant"), message("user")]
    assert spans_of(items) == [(0, 5), (5, 6)]


def test_a_call_that_nobody_answered_ends_with_its_turn() -> None:
    assert spans_of([message("user"), call("a"), message("assistant"), message("user")]) == [(0, 3), (3, 4)]


@pytest.mark.parametrize("items", [[], [message("system")]])
def test_a_history_without_turns_has_none(items: list[dict[str, Any]]) -> None:
    parts = BUDGET.parts(items)
    assert (parts.pinned, parts.spans) == (len(items), ())


@pytest.mark.parametrize(
    ("window", "most", "kept"),
    [(4096, None, 1024), (512, None, 128), (1, None, 1), (4096, 100, 100), (4096, 9999, 2048), (1, 9, 1)],
)
def test_room_is_kept_for_the_answer(window: int, most: int | None, kept: int) -> None:
    assert BUDGET.reserve(window, most) == kept


def test_notes_have_their_share_of_the_window() -> None:
    assert BUDGET.notes(4096) == 512


def first(sizes: list[int], counts: list[int], room: int, covered: int = 0) -> int:
    return BUDGET.first(spans(*sizes), counts, window=400, room=room, covered=covered)


def test_what_fits_is_shown_whole_even_if_a_summary_is_there() -> None:
    assert first([10, 10], [100, 100], 200, covered=1) == 0


def test_of_turns_that_fill_the_room_alone_the_newest_is_left() -> None:
    assert first([10, 10], [100, 100], 199) == 1
    assert first([10, 10], [100, 900], 199) == 1


def test_the_cut_is_at_a_border() -> None:
    # a byte a token, so a border every 128 bytes: of turns that begin at 0, 30, 60, 90, 120, 150 … at the sixth
    assert first([30] * 8, [30] * 8, 200) == 5
    assert first([30] * 8, [30] * 8, 90) == 5
    assert first([30] * 8, [30] * 8, 89) == 6


def test_where_no_border_is_left_the_cut_is_where_it_must_be() -> None:
    assert first([10] * 5, [10] * 5, 49) == 1


def test_a_summary_moves_the_cut_behind_what_it_covers_but_never_behind_the_newest_turn() -> None:
    assert first([30] * 8, [30] * 8, 200, covered=6) == 6
    assert first([30] * 8, [30] * 8, 200, covered=2) == 5
    assert first([30] * 8, [30] * 8, 200, covered=8) == 7


def test_turns_without_a_word_are_no_trouble() -> None:
    assert first([0, 0, 0], [0, 0, 900], 100) == 2
    assert first([0] * 4, [50] * 4, 120) == 2


def test_a_summary_is_due_when_three_quarters_are_full_and_leaves_half() -> None:
    assert BUDGET.compact([100] * 7, room=1000) == 0
    assert BUDGET.compact([100] * 8, room=1000) == 3
    assert BUDGET.compact([900], room=1000) == 0
    assert BUDGET.compact([100, 900], room=1000) == 1


ITEMS = some.lists(
    some.one_of(
        some.builds(message, some.sampled_from(["user", "assistant", "system", "developer"]), some.text(max_size=9)),
        some.builds(call, some.sampled_from("abc")),
        some.builds(output, some.sampled_from("abc")),
    ),
    max_size=30,
)


@given(ITEMS)
def test_turns_cover_every_item_once_and_split_no_call_from_its_output(items: list[dict[str, Any]]) -> None:
    parts = BUDGET.parts(items)
    edges = [parts.pinned, *(each.end for each in parts.spans)]
    assert all(before < behind for before, behind in pairwise(edges))
    assert edges[-1] == len(items)
    turn_of = {index: number for number, each in enumerate(parts.spans) for index in range(each.first, each.end)}
    for index, item in enumerate(items):
        for later in range(index + 1, len(items)):
            if item["type"] == "function_call" and items[later] == output(item["call_id"]):
                assert turn_of[index] == turn_of[later]


class Growing(RuleBasedStateMachine):
    """A conversation that grows turn by turn; each cut is decided from nothing but the history."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[int] = []
        self.counts: list[int] = []
        self.cuts: list[int] = []
        self.window, self.room = 1000, 800

    @rule(tokens=some.integers(1, 100), bytes_a_token=some.integers(3, 5))
    def say(self, tokens: int, bytes_a_token: int) -> None:
        self.sizes.append(tokens * bytes_a_token)
        self.counts.append(tokens)
        counts, total = [], 0
        for each in reversed(self.counts):
            if total > self.room:
                break
            counts.append(each)
            total += each
        counts.reverse()
        cut = BUDGET.first(spans(*self.sizes), counts, window=self.window, room=self.room, covered=0)
        self.cuts.append(cut)

    @invariant()
    def what_is_shown_fits_and_is_no_less_than_it_must_be(self) -> None:
        if not self.cuts:
            return
        shown = sum(self.counts[self.cuts[-1] :])
        assert shown <= self.room
        if self.cuts[-1]:
            # a border is at most a third of a window away by the longest bytes, and turns have up to 100 tokens
            assert shown >= self.room - self.window * 5 / 3 / BUDGET.strides - 200

    @invariant()
    def the_cut_moves_rarely(self) -> None:
        moves = sum(before != behind for before, behind in pairwise(self.cuts))
        # strides are a sixth of a window at least, by the shortest bytes, and one flips size now and then
        assert moves <= 2 * sum(self.counts) / (self.window / 6 * 3 / 5) + 1


TestGrowing = Growing.TestCase
TestGrowing.settings = settings(max_examples=15, stateful_step_count=60)
