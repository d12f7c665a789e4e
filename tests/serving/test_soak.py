from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from appliance.core.errors import ConflictError, EngineError
from appliance.core.releases import Criteria
from appliance.core.wishes import Soak
from appliance.serving.soak import (
    LEAST_PACES,
    Footprint,
    Observed,
    Record,
    Verdict,
    judge,
    looked,
    percentile,
    recorded,
)

SOAK = Soak(seconds=10.0, requests=5, at_most_s=100.0)
CRITERIA = Criteria(most_error_rate=0.1, most_latency_ratio=2.0)
WELL = Observed(
    elapsed_s=11.0, wished_s=12.0, requests=5, errors=0, slowest=0.01, baseline=0.01, available=500, total=1000
)


def outcome(**changes: float) -> tuple[str, str]:
    verdict = judge(SOAK, CRITERIA, replace(WELL, **changes))  # type: ignore[arg-type]
    assert (verdict.reason == "") == (verdict.outcome != "rolled_back")
    return verdict.outcome, verdict.code


def test_a_trial_is_over_after_its_time_and_its_requests() -> None:
    assert outcome() == ("confirmed", "")
    assert outcome(elapsed_s=9.9) == ("goes_on", "")
    assert outcome(requests=4) == ("goes_on", "")


def test_a_trial_never_lasts_longer_than_it_may() -> None:
    assert outcome(requests=0, elapsed_s=0.0, wished_s=99.0) == ("goes_on", "")
    assert outcome(requests=0, elapsed_s=0.0, wished_s=100.0) == ("confirmed", "")


def test_errors_that_cannot_be_chance_end_it_at_once_and_others_at_its_end() -> None:
    assert outcome(elapsed_s=1.0, requests=3, errors=3) == ("rolled_back", "soak_errors")
    assert outcome(elapsed_s=1.0, requests=2, errors=2) == ("goes_on", "")
    assert outcome(requests=9, errors=1) == ("rolled_back", "soak_errors")
    assert outcome(requests=10, errors=1) == ("confirmed", "")


def test_a_pace_is_held_against_that_of_the_version_before_if_it_is_known() -> None:
    assert outcome(elapsed_s=1.0, slowest=0.021) == ("rolled_back", "soak_latency")
    assert outcome(slowest=0.02) == ("confirmed", "")
    assert outcome(slowest=9.0, baseline=0.0) == ("confirmed", "")


def test_a_version_that_leaves_no_memory_goes_back_unless_it_was_short_before() -> None:
    assert outcome(elapsed_s=1.0, available=19) == ("rolled_back", "soak_memory")
    assert outcome(elapsed_s=1.0, available=20) == ("goes_on", "")
    assert outcome(available=19, was_scarce=True) == ("confirmed", "")


def test_a_version_that_takes_more_than_its_release_allows_goes_back_at_once() -> None:
    allowed = Criteria(most_memory=100)
    assert judge(SOAK, allowed, replace(WELL, elapsed_s=1.0, taken=101)).code == "soak_over_budget"
    assert judge(SOAK, allowed, replace(WELL, elapsed_s=1.0, taken=100)).outcome == "goes_on"
    assert outcome(taken=2**40) == ("confirmed", ""), "no budget, no limit"


def test_what_others_take_while_they_come_or_go_is_not_held_against_a_version() -> None:
    nobody, others = frozenset[str](), frozenset({"other:1"})
    begun = Footprint(0, 1000, nobody)
    grown = looked(begun, 1300, nobody, others_load=False)
    assert grown == Footprint(300, 1300, nobody)
    loading = looked(grown, 9000, nobody, others_load=True)
    assert loading == Footprint(300, 9000, nobody)
    arrived = looked(loading, 9500, others, others_load=False)
    assert arrived == Footprint(300, 9500, others)
    assert looked(arrived, 9600, others, others_load=False).taken == 400
    assert looked(arrived, 0, others, others_load=False).taken == 0


@given(st.lists(st.floats(0, 1e6), min_size=1))
def test_the_percentile_is_one_of_the_values_and_above_most(values: list[float]) -> None:
    found = percentile(values)
    assert found in values
    assert sum(each <= found for each in values) >= 0.95 * len(values)


@given(st.builds(Observed), st.builds(Criteria), st.builds(Soak))
def test_a_trial_without_an_error_with_memory_and_pace_is_never_rolled_back(
    seen: Observed, criteria: Criteria, soak: Soak
) -> None:
    well = replace(seen, errors=0, slowest=0.0, available=max(seen.available, seen.total))
    criteria = Criteria(most_error_rate=abs(criteria.most_error_rate), most_latency_ratio=criteria.most_latency_ratio)
    if well.available >= 0.02 * well.total:
        assert judge(soak, criteria, well).outcome != "rolled_back"


def test_a_record_tells_a_pace_once_there_are_enough() -> None:
    record = Record()
    for _ in range(LEAST_PACES - 1):
        record.served(0.5)
    record.served(None)
    assert record.slowest == 0.0
    record.served(1.0)
    assert record.slowest == 0.5
    assert (record.requests, record.errors) == (LEAST_PACES + 1, 0)


def test_what_is_done_inside_counts_once_and_a_refusal_not_at_all() -> None:
    record, ticks = Record(), iter([0.0, 2.0, 3.0, 4.0])
    with recorded(record, lambda: next(ticks)):
        pass
    assert list(record.paces) == [2.0]
    with pytest.raises(EngineError), recorded(record, lambda: next(ticks)):
        raise EngineError("died")
    with pytest.raises(ConflictError), recorded(record, lambda: next(ticks)):
        raise ConflictError("taken")
    assert (record.requests, record.errors) == (2, 1)
    assert Verdict("goes_on") == Verdict("goes_on", "", "")
