from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from tests.benchmarks.decode import WORKLOAD as DECODE
from tests.benchmarks.first_token import FIRST_TOKEN, ONE
from tests.benchmarks.peers import OURS
from tests.benchmarks.results import compare, number, table_of
from tests.benchmarks.workload import Sample, WorkloadOf


def samples(*values: float) -> list[Sample]:
    return [Sample({ONE: value}) for value in values]


def test_a_ratio_is_the_median_of_the_runs_ratios_not_the_ratio_of_the_medians() -> None:
    (row,) = compare(FIRST_TOKEN, {OURS: samples(1, 4, 9), "llama-server": samples(2, 2, 9)}).comparisons
    assert {name: each.median for name, each in row.values.items()} == {OURS: 4, "llama-server": 2}
    assert row.ratio is not None
    assert row.ratio.value == 1
    assert row.ratio.spread is not None
    assert (row.ratio.spread.least, row.ratio.spread.greatest) == (0.5, 2)


@pytest.mark.parametrize(("ours", "met"), [(0.9, True), (1.0, True), (1.1, False)])
def test_a_ratio_that_must_be_small_is_met_up_to_its_target(ours: float, met: bool) -> None:
    (row,) = compare(FIRST_TOKEN, {OURS: samples(ours), "llama-server": samples(1)}).comparisons
    assert row.ratio is not None
    assert row.ratio.met is met


@pytest.mark.parametrize(("ours", "met"), [(0.9, False), (1.0, True), (1.1, True)])
def test_a_ratio_that_must_be_large_is_met_from_its_target_on(ours: float, met: bool) -> None:
    runs = {OURS: [Sample({"1 client": ours})], "llama-server": [Sample({"1 client": 1})]}
    (row,) = compare(DECODE, runs).comparisons
    assert row.ratio is not None
    assert row.ratio.met is met


def test_what_was_not_measured_is_left_out() -> None:
    assert [each.name for each in compare(DECODE, {OURS: [Sample({"4 clients": 1})]}).comparisons] == ["4 clients"]


def test_without_the_baseline_there_is_no_ratio_and_no_verdict() -> None:
    result = compare(FIRST_TOKEN, {OURS: samples(1), "llama-cpp-python": samples(2)})
    headings, (row,) = table_of(result)
    assert headings[2:4] == [OURS, "llama-cpp-python"]
    assert row == [ONE, "s", "1", "2", "", "", ""]


def test_a_table_has_the_ratio_with_its_range_and_the_verdict() -> None:
    workload = replace(FIRST_TOKEN, quantities=[replace(FIRST_TOKEN.quantities[0], target=0.05)])
    result = compare(workload, {OURS: samples(1, 2, 3), "llama-server": samples(100, 100, 10)})
    headings, (row,) = table_of(result)
    assert headings == ["", "Unit", OURS, "llama-server", "Ratio to llama-server", "Target", "Verdict"]
    assert row == [ONE, "s", "2", "100", "0.02 (0.01 to 0.3)", "≤ 0.05", "met"]


@pytest.mark.parametrize(
    ("value", "shown"), [(0.012345, "0.0123"), (12.345, "12.3"), (123.45, "123"), (1234.5, "1,234")]
)
def test_a_number_has_the_digits_that_matter(value: float, shown: str) -> None:
    assert number(value) == shown


def compared_as(**changes: Any) -> WorkloadOf[Any, Any]:
    return replace(FIRST_TOKEN, quantities=[replace(FIRST_TOKEN.quantities[0], **changes)])


def test_a_quantity_may_have_a_baseline_of_its_own_and_the_values_of_another() -> None:
    quantities = [
        replace(FIRST_TOKEN.quantities[0], target=0.5),
        replace(FIRST_TOKEN.quantities[0], name="again", values_of=ONE, baseline="other", target=0.5),
    ]
    workload = replace(FIRST_TOKEN, quantities=quantities)
    result = compare(workload, {OURS: samples(1), "llama-server": samples(4), "other": samples(1)})
    headings, rows = table_of(result)
    assert headings == ["", "Unit", OURS, "llama-server", "other", "Compared", "Target", "Verdict"]
    assert rows == [
        [ONE, "s", "1", "4", "1", "0.25, ratio to llama-server", "≤ 0.5", "met"],
        ["again", "s", "1", "4", "1", "1, ratio to other", "≤ 0.5", "missed"],
    ]


def test_a_difference_is_bounded_in_the_quantitys_unit() -> None:
    result = compare(compared_as(compared="difference", target=1.0), {OURS: samples(3), "llama-server": samples(2.5)})
    assert table_of(result)[1] == [[ONE, "s", "3", "2.5", "0.5 more than llama-server", "≤ 1", "met"]]


def test_a_value_is_bounded_without_any_baseline() -> None:
    result = compare(compared_as(compared="value", target=2.0), {OURS: samples(3)})
    assert table_of(result)[1] == [[ONE, "s", "3", "3", "≤ 2", "missed"]]


def test_without_a_target_there_is_no_verdict() -> None:
    result = compare(compared_as(target=None), {OURS: samples(3), "llama-server": samples(2)})
    assert table_of(result)[1] == [[ONE, "s", "3", "2", "", "", ""]]


def test_a_contestant_without_a_quantity_has_an_empty_cell() -> None:
    other = [Sample({})]
    result = compare(FIRST_TOKEN, {OURS: samples(3), "llama-server": other})
    assert table_of(result)[1] == [[ONE, "s", "3", "", "", ""]]


def test_without_anything_to_compare_with_there_are_only_values() -> None:
    result = compare(replace(compared_as(target=None), baseline=""), {OURS: samples(3)})
    assert table_of(result) == (["", "Unit", OURS], [[ONE, "s", "3"]])
