from __future__ import annotations

from itertools import accumulate

import pytest
from hypothesis import given
from hypothesis import strategies as st

from appliance.bench.statistics import longest_gap, quantile, spread, steady_rate

Numbers = st.lists(st.floats(-1e9, 1e9), min_size=1, max_size=50)
Gaps = st.lists(st.floats(0.001, 10.0), min_size=2, max_size=30)


@given(Numbers)
def test_the_median_lies_within_the_range_and_the_range_is_made_of_values(values: list[float]) -> None:
    result = spread(values)
    assert result.least <= result.median <= result.greatest
    assert {result.least, result.greatest} <= set(values)
    assert result.count == len(values)


def test_nothing_has_no_median() -> None:
    with pytest.raises(ValueError, match="nothing"):
        spread([])


@given(Numbers, st.floats(0, 1))
def test_a_quantile_is_the_least_value_that_the_share_does_not_exceed(values: list[float], share: float) -> None:
    result = quantile(values, share)
    assert result in values
    assert sum(value <= result for value in values) >= share * len(values)
    lower = [value for value in values if value < result]
    assert not lower or len(lower) < share * len(values)


@pytest.mark.parametrize(("values", "share"), [([], 0.5), ([1.0], -0.1), ([1.0], 1.1)])
def test_a_quantile_of_nothing_or_of_an_impossible_share_is_refused(values: list[float], share: float) -> None:
    with pytest.raises(ValueError, match="quantile"):
        quantile(values, share)


@given(streams=st.integers(1, 8), tokens=st.integers(4, 50), every=st.floats(0.001, 1.0), late=st.floats(0, 0.5))
def test_streams_in_step_have_the_rate_of_their_steps(streams: int, tokens: int, every: float, late: float) -> None:
    times = [[late * every * n / streams + every * step for step in range(tokens)] for n in range(streams)]
    assert steady_rate(times, tokens) == pytest.approx(streams / every)


def test_reading_of_prompts_and_lonely_streams_do_not_count() -> None:
    early = [0.0, 5.0, 5.1, 5.2, 5.3, 5.4]  # waits while the other's prompt is read
    late = [5.0, 5.1, 5.2, 5.3, 5.4, 5.5]
    assert steady_rate([early, late], 6) == pytest.approx(20.0)
    assert steady_rate([[*late, 100.0], late], 7) == pytest.approx(10.0 + 10.0 * 7 / 6)


def test_several_tokens_read_at_once_count_from_reading_to_reading() -> None:
    readings = [0.0, 0.5, 0.5, 0.5, 1.0, 1.0, 1.5, 1.5, 1.5, 1.6]  # 6 of them in the second from 0.5 on
    assert steady_rate([readings[1:]], 9) == pytest.approx(5.0)
    assert steady_rate([readings], 10) == pytest.approx(8 / 1.5)


def test_a_character_of_two_tokens_counts_as_two() -> None:
    assert steady_rate([[0.0, 0.2, 0.4, 0.6, 0.8]], tokens_per_stream=10) == pytest.approx(10.0)


@given(st.lists(st.lists(st.floats(0, 10), min_size=1, max_size=9).map(sorted), min_size=1, max_size=4))
def test_any_streams_have_a_rate_unless_no_time_passed(streams: list[list[float]]) -> None:
    if max(times[-1] for times in streams) == min(times[0] for times in streams):
        with pytest.raises(ValueError, match="no time"):
            steady_rate(streams, 9)
    else:
        assert steady_rate(streams, 9) >= 0


def test_streams_one_after_another_are_counted_over_the_whole_time() -> None:
    assert steady_rate([[0.0, 1.0], [2.0, 4.0]], tokens_per_stream=2) == pytest.approx(0.5)


@given(Gaps)
def test_the_longest_gap_of_a_whole_stream_is_the_longest_between_arrivals(gaps: list[float]) -> None:
    times = list(accumulate(gaps, initial=0.0))
    assert longest_gap(times, times[0], times[-1]) == pytest.approx(max(gaps))


@pytest.mark.parametrize(
    ("times", "begin", "end", "expected"),
    [
        ([], 1.0, 4.0, 3.0),
        ([0.0, 9.0], 1.0, 4.0, 4.0),  # the silence had begun before we looked
        ([0.9, 1.5, 2.0], 1.0, 4.0, 2.0),  # the last silence goes on to the end
        ([1.5, 2.0, 3.9], 1.0, 4.0, 1.9),
        ([5.0, 6.0], 1.0, 4.0, 3.0),
    ],
)
def test_a_gap_is_cut_where_we_stop_looking(times: list[float], begin: float, end: float, expected: float) -> None:
    assert longest_gap(times, begin, end) == pytest.approx(expected)
