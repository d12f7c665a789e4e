"""Prompt lookup finds what a search through everything finds, and its work does not grow with the sequence."""

from __future__ import annotations

from array import array

import pytest
from hypothesis import given
from hypothesis import strategies as st

from appliance.engine.llama.lookup import LONGEST_MATCH, OCCURRENCES, SLICE, Match, PromptLookup

texts = st.lists(st.integers(0, 3), max_size=60)


def lookup(tokens: list[int]) -> PromptLookup:
    """Return an index over all of the tokens."""
    subject = PromptLookup(array("i", tokens))
    while not subject.catch_up():
        pass
    return subject


def common_end(left: list[int], right: list[int]) -> int:
    """Return how many last tokens two texts share."""
    length = 0
    while length < min(len(left), len(right)) and left[-length - 1] == right[-length - 1]:
        length += 1
    return min(length, LONGEST_MATCH)


def searched(tokens: list[int]) -> Match | None:
    """Return what a search through the whole text finds."""
    ends = [end for end in range(2, len(tokens)) if tokens[end - 2 : end] == tokens[-2:]]
    if not ends:
        return None
    latest_first = ends[::-1][:OCCURRENCES]
    best = max(latest_first, key=lambda end: common_end(tokens[:end], tokens))
    return Match(best, common_end(tokens[:best], tokens))


@given(texts)
def test_the_match_is_the_one_that_a_search_through_everything_finds(tokens: list[int]) -> None:
    assert lookup(tokens).find() == searched(tokens)


@given(texts, texts)
def test_an_index_that_grew_with_its_text_is_that_of_the_whole(first: list[int], more: list[int]) -> None:
    tokens = array("i", first)
    subject = PromptLookup(tokens)
    for token in more:
        tokens.append(token)
        assert subject.catch_up()
        assert subject.find() == searched(list(tokens))


@given(texts, st.integers(1, 20))
def test_a_proposal_is_what_followed_the_match_and_then_itself_again(tokens: list[int], count: int) -> None:
    subject = lookup(tokens)
    match = subject.find()
    if match is None:
        return
    expected = list(tokens)
    for place in range(count):
        expected.append(expected[match.end + place])
    assert list(subject.propose(match, count)) == expected[len(tokens) :]


def test_a_quotation_is_found_where_it_was_said_last() -> None:
    subject = lookup([1, 2, 3, 4, 9, 1, 2, 3, 5, 9, 1, 2, 3])
    match = subject.find()
    assert match == Match(end=8, length=4)
    assert list(subject.propose(match, 3)) == [5, 9, 1]


@pytest.mark.parametrize("tokens", [[], [1], [1, 2], [1, 2, 3]])
def test_nothing_is_found_where_nothing_is_repeated(tokens: list[int]) -> None:
    assert lookup(tokens).find() is None


def test_a_long_text_is_indexed_in_slices() -> None:
    tokens = array("i", range(4 * SLICE))
    subject = PromptLookup(tokens)
    calls = 1
    while not subject.catch_up():
        calls += 1
    assert calls == 4
    tokens.extend([5, 6])
    assert subject.catch_up()
    assert subject.find() == Match(end=7, length=2)


class CountingArray:
    """Tokens that count how often they are read."""

    def __init__(self, tokens: list[int]) -> None:
        self.tokens = tokens
        self.reads = 0

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index: int) -> int:
        self.reads += 1
        return self.tokens[index]


@pytest.mark.parametrize("size", [100, 10_000])
def test_the_work_for_one_more_token_does_not_grow_with_the_text(size: int) -> None:
    tokens = CountingArray([1, 2] * (size // 2))
    subject = PromptLookup(tokens)  # type: ignore[arg-type]
    while not subject.catch_up():
        pass
    for token in (1, 2, 3, 1, 2):
        tokens.tokens.append(token)
        tokens.reads = 0
        subject.catch_up()
        subject.find()
        assert tokens.reads <= 2 + 2 + 2 * OCCURRENCES * LONGEST_MATCH
