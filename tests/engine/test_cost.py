"""The cost model finds the linear cost it is shown, and never divides by nothing."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from appliance.engine.llama.cost import StepCost

seconds = st.floats(0, 10, allow_nan=False)


@given(st.floats(0.001, 0.1), st.floats(0.0001, 0.05))
def test_a_steady_machine_is_learned(decode: float, prefill: float) -> None:
    cost = StepCost()
    for _ in range(60):
        cost.observe(decoding=4, prefill_tokens=0, seconds=decode)
        cost.observe(decoding=4, prefill_tokens=32, seconds=decode + 32 * prefill)
    assert cost.decode_s(4) == pytest.approx(decode)
    assert cost.prefill_token_s == pytest.approx(prefill, rel=0.05)


@given(st.lists(st.tuples(st.integers(0, 8), st.integers(0, 512), seconds)), seconds, st.integers(0, 8))
def test_estimates_stay_usable_whatever_is_measured(
    history: list[tuple[int, int, float]], target: float, decoding: int
) -> None:
    cost = StepCost()
    for sequences, tokens, took in history:
        cost.observe(decoding=sequences, prefill_tokens=tokens, seconds=took)
    assert cost.prefill_token_s > 0
    assert cost.prefill_tokens_within(target, decoding=decoding) >= 0


def test_an_unmeasured_number_of_sequences_costs_what_the_nearest_one_does() -> None:
    cost = StepCost()
    assert cost.decode_s(3) == 0.0
    cost.observe(decoding=2, prefill_tokens=0, seconds=0.02)
    cost.observe(decoding=8, prefill_tokens=0, seconds=0.08)
    assert (cost.decode_s(0), cost.decode_s(3), cost.decode_s(7)) == (0.0, 0.02, 0.08)
