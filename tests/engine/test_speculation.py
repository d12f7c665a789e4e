"""The policy of speculation: it guesses where that pays, and whatever the text is, it loses little."""

from __future__ import annotations

from array import array

import pytest
from hypothesis import given
from hypothesis import strategies as st

from appliance.engine.llama.lookup import SLICE
from appliance.engine.llama.speculation import (
    DRAFT_TOKENS,
    LARGEST_TOKENS,
    LOSS_SHARE,
    MARGIN,
    OPENING_TOKENS,
    Drafter,
    choose_drafts,
)

PRICE = 0.31
"""What checking a guess costs, in tokens, with the default model on two CPU cores."""

texts = st.lists(st.integers(0, 3), min_size=1, max_size=120)
prices = st.floats(0.01, 2.0)


class Run:
    """One sequence that is told an answer, as the engine would sample it, and what that cost in tokens."""

    def __init__(self, prompt: list[int], price: float = PRICE) -> None:
        self.tokens = array("i", prompt)
        self.drafter = Drafter(self.tokens)
        self.price = price
        self.spent = 0.0
        self.steps = 0
        self.checked = 0
        self.accepted = 0

    def answer(self, tokens: list[int]) -> None:
        at = 0
        while at < len(tokens):
            at += self._step(tokens[at:])

    def _step(self, coming: list[int]) -> int:
        self.drafter.look(longest=len(coming) - 1, price=self.price)
        [count] = choose_drafts([self.drafter], room=DRAFT_TOKENS, price=self.price)
        drafts = list(self.drafter.guess[:count])
        accepted = 0
        while accepted < count and drafts[accepted] == coming[accepted]:
            accepted += 1
        self.steps += 1
        self.spent += 1.0 + count * self.price
        self.checked += count
        self.accepted += accepted
        for token in coming[: accepted + 1]:
            self.tokens.append(token)
            self.drafter.observe(token)
        if count:
            self.drafter.settle(checked=count, accepted=accepted)
        return accepted + 1


@given(texts, texts, prices)
def test_whatever_the_text_is_the_loss_is_bounded(prompt: list[int], answer: list[int], price: float) -> None:
    run = Run(prompt, price)
    run.answer(answer)
    assert run.spent <= len(answer) + OPENING_TOKENS + LOSS_SHARE * run.steps + 1e-9


def test_an_answer_that_quotes_comes_much_faster() -> None:
    document = [*range(100, 400), *range(150, 250)]
    run = Run(document)
    run.answer(document[20:220])
    assert run.spent < 200 / 2
    assert run.accepted > 0.9 * run.checked


def test_an_answer_that_repeats_nothing_costs_nothing() -> None:
    run = Run(list(range(100)))
    run.answer(list(range(200, 400)))
    assert run.checked == 0


def misleading(count: int) -> list[int]:
    """Return a text whose pairs come again and again, each time followed by something new."""
    return [token for number in range(count) for token in (1, 2, 1000 + number)]


def test_matches_that_mislead_are_soon_not_believed_any_more() -> None:
    run = Run([1, 2, 3])
    run.answer(misleading(20))
    early = run.checked
    run.answer(misleading(400)[60:])
    assert run.checked - early <= 2
    assert run.spent < 1.01 * len(run.tokens)


def test_a_quotation_after_a_misleading_text_is_still_quoted_fast() -> None:
    document = list(range(5000, 5200))
    run = Run(document)
    run.answer(misleading(60))
    before = run.spent
    run.answer(document)
    assert run.spent - before < 200 / 2


def test_what_was_saved_up_is_not_all_thrown_away_later() -> None:
    document = list(range(5000, 5400))
    run = Run(document)
    run.answer(document)
    before = run.spent
    run.answer(misleading(100))
    assert run.spent - before < 300 + LARGEST_TOKENS + LOSS_SHARE * 300


def test_nothing_is_guessed_until_a_long_prompt_is_indexed() -> None:
    run = Run(list(range(3 * SLICE)))
    run.answer([10, 11, 12, 13])
    assert run.checked == 0
    run.answer([14, 15, 16, 17, 18, 19])
    assert run.accepted > 0


@pytest.mark.parametrize("price", [1.0, 3.0])
def test_nothing_is_checked_where_a_guess_costs_as_much_as_a_token(price: float) -> None:
    document = list(range(100))
    run = Run(document, price)
    run.answer(document)
    assert run.checked == 0


def looked(texts_of_many: list[list[int]], price: float) -> list[Drafter]:
    drafters = []
    for text in texts_of_many:
        drafter = Drafter(array("i", text))
        drafter.look(longest=8, price=price)
        drafters.append(drafter)
    return drafters


@given(st.lists(texts, min_size=1, max_size=4), st.integers(-3, 12), prices)
def test_what_is_chosen_fits_and_raises_what_is_expected(many: list[list[int]], room: int, price: float) -> None:
    drafters = looked(many, price)
    counts = choose_drafts(drafters, room=room, price=price)
    assert sum(counts) <= max(room, 0)
    expected = float(len(many))
    for drafter, count in zip(drafters, counts, strict=True):
        assert count <= len(drafter.guess) <= 8
        assert count * price <= OPENING_TOKENS + LOSS_SHARE
        chance = 1.0
        for place in range(count):
            chance *= drafter.chance(place)
            expected += chance
    if sum(counts):
        assert expected / (len(many) + sum(counts) * price) > 1.0


def test_the_likeliest_guesses_have_the_room_and_who_is_broke_guesses_nothing() -> None:
    quote, doubtful = list(range(30)) * 2, [1, 2, 3, 1, 2]
    drafters = looked([doubtful, quote], 0.05)
    assert choose_drafts(drafters, room=3, price=0.05) == [0, 3]
    drafters[1].settle(checked=40, accepted=0)
    assert choose_drafts(drafters, room=1, price=0.05) == [1, 0]


def test_a_guess_must_be_expected_to_save_more_than_it_costs_by_a_margin() -> None:
    [drafter] = looked([[1, 2, 3, 1, 2]], 0.1)
    chance = drafter.chance(0)
    assert choose_drafts([drafter], room=1, price=chance / MARGIN * 0.99) == [1]
    assert choose_drafts([drafter], room=1, price=chance / MARGIN * 1.01) == [0]


def test_no_guess_goes_beyond_what_is_of_use() -> None:
    drafter = Drafter(array("i", list(range(20)) * 2))
    for longest, length in ((3, 3), (0, 0), (-1, 0), (100, DRAFT_TOKENS)):
        drafter.look(longest=longest, price=PRICE)
        assert len(drafter.guess) == length


def test_guesses_are_compared_even_where_none_is_checked() -> None:
    drafter = Drafter(array("i", [1, 2, 3, 1, 2]))
    drafter.look(longest=8, price=PRICE)
    before = drafter.chance(0)
    drafter.observe(9)
    drafter.observe(9)
    drafter.look(longest=8, price=PRICE)
    assert drafter.chance(0) < before
