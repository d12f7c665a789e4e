"""The cost model finds the linear cost it is shown, and never divides by nothing."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from appliance.engine.llama.cost import USUAL_DRAFT_SHARE, StepCost

seconds = st.floats(0, 10, allow_nan=False)


@given(st.floats(0.001, 0.1), st.floats(0.0001, 0.05))
def test_a_steady_machine_is_learned(decode: float, prefill: float) -> None:
    cost = StepCost()
    for _ in range(60):
        cost.observe(decoding=4, prefill_tokens=0, seconds=decode)
        cost.observe(decoding=4, prefill_tokens=32, seconds=decode + 32 * prefill)
    assert cost.decode_s(4) == pytest.approx(decode)
    assert cost.prefill_token_s == pytest.approx(prefill, rel=0.05)


@given(st.floats(0.001, 0.1), st.floats(0.02, 2.0), st.integers(1, 12))
def test_what_a_guessed_token_adds_is_learned(decode: float, share: float, drafts: int) -> None:
    cost = StepCost()
    cost.observe(decoding=1, prefill_tokens=0, seconds=decode)
    for _ in range(80):
        cost.observe(decoding=1, prefill_tokens=0, draft_tokens=drafts, seconds=decode * (1 + share * drafts))
    assert cost.draft_token_s == pytest.approx(decode * share, rel=0.01)


def test_what_a_guessed_token_adds_follows_the_speed_of_the_machine_and_is_forgotten_in_time() -> None:
    cost = StepCost()
    cost.observe(decoding=1, prefill_tokens=0, seconds=0.01)
    for _ in range(80):
        cost.observe(decoding=1, prefill_tokens=0, draft_tokens=4, seconds=0.01 + 4 * 0.02)
    cost.observe(decoding=1, prefill_tokens=0, seconds=0.02)
    assert cost.draft_token_s == pytest.approx(0.024, rel=0.02)
    for _ in range(500):
        cost.observe(decoding=1, prefill_tokens=0, seconds=0.02)
    assert cost.draft_token_s == pytest.approx(USUAL_DRAFT_SHARE * 0.02, rel=0.05)


def test_a_step_that_was_held_up_moves_the_cost_of_a_guessed_token_a_little_only() -> None:
    cost = StepCost()
    cost.observe(decoding=1, prefill_tokens=0, seconds=0.01)
    before = cost.draft_token_s
    cost.observe(decoding=1, prefill_tokens=0, draft_tokens=1, seconds=30.0)
    assert before < cost.draft_token_s <= 1.21 * before


@given(
    st.lists(st.tuples(st.integers(0, 8), st.integers(0, 512), st.integers(0, 12), seconds)),
    seconds,
    st.integers(0, 8),
)
def test_estimates_stay_usable_whatever_is_measured(
    history: list[tuple[int, int, int, float]], target: float, decoding: int
) -> None:
    cost = StepCost()
    for sequences, tokens, drafts, took in history:
        prefill = 0 if drafts else tokens
        cost.observe(decoding=sequences, prefill_tokens=prefill, draft_tokens=drafts, seconds=took)
    assert cost.prefill_token_s > 0
    assert 0 < cost.draft_token_s < 1000
    assert cost.prefill_tokens_within(target, decoding=decoding) >= 0


def test_an_unmeasured_number_of_sequences_costs_what_the_nearest_one_does() -> None:
    cost = StepCost()
    assert cost.decode_s(3) == 0.0
    cost.observe(decoding=2, prefill_tokens=0, seconds=0.02)
    cost.observe(decoding=8, prefill_tokens=0, seconds=0.08)
    assert (cost.decode_s(0), cost.decode_s(3), cost.decode_s(7)) == (0.0, 0.02, 0.08)
