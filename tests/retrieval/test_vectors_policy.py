from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from appliance.retrieval.vectors.policy import (
    Kind,
    Limits,
    Made,
    candidates,
    is_compaction_due,
    kind_for,
    least_probes,
    lists_for,
    plan,
    step,
    to_close,
)

LIMITS = Limits()
COUNTS = st.integers(0, 3_000_000)
KINDS: st.SearchStrategy[Kind] = st.sampled_from(["flat", "ivf"])


@pytest.mark.parametrize(
    ("count", "now", "kind"),
    [
        (0, None, None),
        (4096, None, None),
        (4097, None, "flat"),
        (50_000, None, "flat"),
        (50_001, None, "ivf"),
        (2049, "flat", "flat"),
        (2048, "flat", None),
        (50_001, "flat", "ivf"),
        (37_501, "ivf", "ivf"),
        (37_500, "ivf", "flat"),
        (2048, "ivf", None),
    ],
)
def test_the_kind_follows_the_number_of_vectors_and_stays_for_a_while(
    count: int, now: Kind | None, kind: Kind | None
) -> None:
    assert kind_for(count, now, LIMITS) == kind


def test_a_generation_is_merged_until_its_training_is_out_of_date() -> None:
    made = Made("flat", 10_000, 10_000)
    assert step(100, None, LIMITS) == "none"
    assert step(100, made, LIMITS) == "none"
    assert step(5000, None, LIMITS) == "train"
    assert step(20_000, made, LIMITS) == "merge"
    assert step(20_001, made, LIMITS) == "train"
    assert step(2_500, made, LIMITS) == "merge"
    assert step(2_499, made, LIMITS) == "train"
    assert step(200_001, Made("flat", 150_000, 150_000), LIMITS) == "train", "another kind"


def test_compaction_is_due_when_too_much_stands_beside_or_is_dead() -> None:
    assert not is_compaction_due(0, 4096, 0, LIMITS)
    assert is_compaction_due(0, 4097, 0, LIMITS)
    assert not is_compaction_due(80_000, 10_000, 20_000, LIMITS)
    assert is_compaction_due(80_000, 10_001, 0, LIMITS)
    assert is_compaction_due(80_000, 0, 20_001, LIMITS)
    assert is_compaction_due(1_000_000, 16_385, 0, LIMITS), "the delta's memory has a limit of its own"


def test_few_that_pass_are_scored_one_by_one_and_more_lists_are_scanned_the_fewer_pass() -> None:
    def method(kind: Kind, passing: int) -> tuple[str, int]:
        found = plan(Made(kind, 1_000_000, 1), k=27, passing=passing, lists=4000, probes=250, limits=LIMITS)
        return found.method, found.probes

    assert method("ivf", 0) == ("gather", 0)
    assert method("ivf", 20_000) == ("gather", 0)
    assert method("ivf", 40_000) == ("scan", 560)
    assert method("ivf", 500_000) == ("scan", 298)
    assert method("ivf", 1_000_000) == ("scan", 250)
    assert method("flat", 1250) == ("gather", 0)
    assert method("flat", 1251)[0] == "scan"


def test_more_lists_are_scanned_for_more_neighbours_than_the_trial_looked_for() -> None:
    def probes(k: int, tried: int) -> int:
        made = Made("ivf", 1_000_000, 1)
        return plan(made, k=k, passing=1_000_000, lists=4000, probes=tried, limits=LIMITS).probes

    assert probes(candidates(10), 160) == 160
    assert probes(candidates(11), 160) == 250
    assert probes(candidates(11), 300) == 300


def test_as_few_lists_are_scanned_as_reach_the_recall_but_a_fortieth() -> None:
    assert least_probes(lambda probes: probes / 1000, 4000, 0.5) >= 500
    assert least_probes(lambda probes: probes / 1000, 4000, 0.5) < 650
    assert least_probes(lambda _: 1.0, 4000, 0.95) == 100
    assert least_probes(lambda _: 1.0, 40, 0.95) == 4
    assert least_probes(lambda _: 0.0, 10, 0.95) == 10
    assert least_probes(lambda _: 1.0, 2, 0.95) == 2


def test_the_longest_unused_are_closed_until_the_others_fit() -> None:
    sizes = [(1, 40), (2, 30), (3, 50)]
    assert to_close(sizes, 120, keep=3) == []
    assert to_close(sizes, 80, keep=3) == [1]
    assert to_close(sizes, 80, keep=1) == [2, 3]
    assert to_close(sizes, 10, keep=3) == [1, 2], "one alone may be above the cap"
    assert to_close([], 10, keep=3) == []


def test_there_are_four_lists_for_each_root_of_the_number() -> None:
    assert lists_for(1_000_000) == 4000
    assert lists_for(0) == 1


def test_more_are_taken_from_the_codes_than_are_wanted() -> None:
    assert candidates(10) == 27


@given(COUNTS, st.none() | KINDS)
def test_what_is_chosen_is_chosen_again(count: int, now: Kind | None) -> None:
    kind = kind_for(count, now, LIMITS)
    assert kind_for(count, kind, LIMITS) == kind


@given(COUNTS, KINDS, COUNTS)
def test_after_each_step_the_next_is_to_merge_or_nothing(count: int, kind: Kind, trained_on: int) -> None:
    made = Made(kind, trained_on, trained_on)
    if step(count, made, LIMITS) == "train":
        renewed = kind_for(count, kind, LIMITS)
        assert renewed is not None
        assert step(count, Made(renewed, count, count), LIMITS) == "merge"


@given(COUNTS)
def test_what_is_missing_after_a_step_never_asks_for_another(count: int) -> None:
    made = step(count, None, LIMITS)
    beside, inside = (count, 0) if made == "none" else (0, count)
    assert not is_compaction_due(inside, beside, 0, LIMITS)
    assert beside <= LIMITS.delta(inside)


@given(st.integers(1, 10**6), st.data())
def test_the_fewer_pass_the_more_lists_are_scanned(count: int, data: st.DataObject) -> None:
    fewer, more = sorted(data.draw(st.lists(st.integers(1, count), min_size=2, max_size=2)))
    lists = lists_for(count)
    probes = data.draw(st.integers(1, lists))
    plans = [
        plan(Made("ivf", count, count), k=27, passing=each, lists=lists, probes=probes, limits=LIMITS)
        for each in (fewer, more)
    ]
    if plans[0].method == "scan":
        assert plans[1].method == "scan"
        assert probes <= plans[1].probes <= plans[0].probes <= lists


@given(st.lists(st.integers(1, 100), max_size=8), st.integers(1, 300), st.integers(0, 7))
def test_what_stays_open_fits_or_is_the_one_in_use(sizes: list[int], most: int, keep: int) -> None:
    closed = to_close(enumerate(sizes), most, keep)
    rest = {number: size for number, size in enumerate(sizes) if number not in closed}
    assert keep not in closed
    assert sum(rest.values()) <= most or set(rest) <= {keep}
    if closed:
        assert sum(rest.values()) + sizes[closed[-1]] > most, "one too many"
