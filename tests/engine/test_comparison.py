"""Figures of how a quantised model differs, and the advice that follows from them."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from appliance.engine.onnx.comparison import ErrorSum, Footprint, OutputError, cosines, judge

ORIGINAL = Footprint(bytes=1000, median_s=0.01)
GOOD = OutputError(name="y", cosine_mean=0.99, cosine_worst=0.9, largest=0.1, mean=0.01)


def output(cosine: float | None) -> OutputError:
    return OutputError(name="y", cosine_mean=cosine, cosine_worst=cosine, largest=0.1, mean=0.01)


def test_differences_and_cosines_add_up_over_runs() -> None:
    total = ErrorSum("y")
    total.add(np.array([[1.0, 0.0], [0.0, 2.0]]), np.array([[1.0, 0.0], [2.0, 0.0]]))
    total.add(np.array([[3.0, 4.0]]), np.array([[6.0, 8.0]]))
    found = total.total()
    assert (found.name, found.cosine_worst, found.largest) == ("y", 0.0, 4.0)
    assert found.cosine_mean == pytest.approx(2 / 3)
    assert found.mean == pytest.approx(11 / 6)


def test_rows_of_a_tensor_are_taken_as_vectors() -> None:
    total = ErrorSum("y")
    random = np.random.default_rng(0).standard_normal((2, 3, 4)).astype(np.float16)
    total.add(random, random)
    assert total.total().cosine_worst == pytest.approx(1)


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (np.array([1, 2]), np.array([1, 3])),
        (np.array([[1.0], [2.0]]), np.array([[1.0], [3.0]])),
        (np.float32(2), np.float32(3)),
        (np.array([True, False]), np.array([True, True])),
    ],
)
def test_what_has_no_direction_has_no_cosine(before: np.ndarray, after: np.ndarray) -> None:
    total = ErrorSum("y")
    total.add(np.asarray(before), np.asarray(after))
    assert (total.total().cosine_mean, total.total().cosine_worst, total.total().largest) == (None, None, 1.0)


def test_empty_outputs_differ_by_nothing() -> None:
    total = ErrorSum("boxes")
    total.add(np.zeros((0, 4), np.float32), np.zeros((0, 4), np.float32))
    assert total.total() == OutputError(name="boxes", cosine_mean=None, cosine_worst=None, largest=0.0, mean=0.0)


def test_rows_of_zeros_are_left_out() -> None:
    assert cosines(np.zeros((2, 2)), np.ones((2, 2))) == []


@given(
    arrays.arrays(np.float64, (3, 5), elements=st.floats(-100, 100).map(lambda each: round(each, 3))),
    st.floats(0.5, 10),
)
def test_a_cosine_is_of_the_direction_alone(rows: np.ndarray, factor: float) -> None:
    for each in cosines(rows, rows * factor):
        assert each == pytest.approx(1)
    for each in cosines(rows, -rows):
        assert each == pytest.approx(-1)


@pytest.mark.parametrize("is_static", [True, False])
def test_a_good_result_needs_no_advice(is_static: bool) -> None:
    assert judge(ORIGINAL, Footprint(bytes=300, median_s=0.0101), [GOOD, output(None)], is_static=is_static) == []


@pytest.mark.parametrize(
    ("quantised", "errors", "is_static", "told"),
    [
        (
            Footprint(bytes=300, median_s=0.02),
            [GOOD],
            False,
            ["slower than the original by a factor of 2.00", "--static"],
        ),
        (Footprint(bytes=300, median_s=0.02), [GOOD], True, ["slower than the original"]),
        (Footprint(bytes=1000, median_s=0.005), [GOOD], False, ["no smaller"]),
        (Footprint(bytes=300, median_s=0.005), [GOOD, output(0.9)], False, ["cosine 0.900", "--static"]),
        (Footprint(bytes=300, median_s=0.005), [output(0.9)], True, ["cosine 0.900", "--calibration"]),
        (Footprint(bytes=300, median_s=0.005), [output(math.nan)], True, ["cosine nan"]),
    ],
)
def test_a_worse_result_has_advice(
    quantised: Footprint, errors: list[OutputError], is_static: bool, told: list[str]
) -> None:
    (advice,) = judge(ORIGINAL, quantised, errors, is_static=is_static)
    assert all(each in advice for each in told)
