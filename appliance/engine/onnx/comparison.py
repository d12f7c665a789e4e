"""How a quantised model differs from its original: figures of outputs, and what they mean. Pure policy.

The cosine of two rows is that of the angle between them, 1 where they point the same way.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

GOOD_COSINE = 0.95

MEANINGFUL_DIFFERENCE = 0.02
"""Share of the time that two runs of the very same model may differ by."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Footprint:
    """What one of the two models costs.

    Attributes:
        bytes: Its graph and the graph's external data.
        median_s: Of the time of one run.
    """

    bytes: int
    median_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class OutputError:
    """How far one output is from the original's.

    Attributes:
        cosine_mean: Over the rows; None where rows have no direction: integers, single numbers, nothing but zeros.
        cosine_worst: Of the row that is worst.
        largest: Absolute difference of any two elements.
        mean: Absolute difference on average.
    """

    name: str
    cosine_mean: float | None
    cosine_worst: float | None
    largest: float
    mean: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """A quantised model beside its original.

    Attributes:
        data: What was measured on, in words.
        is_made_up: The data has nothing to do with what the model is for.
        runs: Timed runs of each model, turn about.
        rows: Of one run, least and most.
        length: Tokens of a row, padding included, least and most; None where rows have none.
        advice: What to do about a result that is worse; empty for a good one.
    """

    data: str
    is_made_up: bool
    runs: int
    rows: tuple[int, int]
    length: tuple[int, int] | None
    original: Footprint
    quantised: Footprint
    outputs: Sequence[OutputError]
    advice: Sequence[str]


class ErrorSum:
    """Adds up how far one output is from the original's, run after run."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._cosines: list[float] = []
        self._largest = 0.0
        self._sum = 0.0
        self._count = 0

    def add(self, original: NDArray[Any], quantised: NDArray[Any]) -> None:
        """Take in one run's output of both models, of one shape; the first dimension is that of rows."""
        before, after = _numbers(original), _numbers(quantised)
        with np.errstate(invalid="ignore"):
            difference = np.where(before == after, 0.0, np.abs(after - before))  # equal infinities differ by nothing
        self._largest = max(self._largest, float(difference.max(initial=0.0)))
        self._sum += float(difference.sum())
        self._count += difference.size
        if np.issubdtype(original.dtype, np.floating) and before.size > len(before):
            self._cosines += cosines(before, after)

    def total(self) -> OutputError:
        """Return the figures so far."""
        return OutputError(
            name=self._name,
            cosine_mean=float(np.mean(self._cosines)) if self._cosines else None,
            cosine_worst=min(self._cosines, default=None),
            largest=self._largest,
            mean=self._sum / self._count if self._count else 0.0,
        )


def cosines(one: NDArray[np.float64], other: NDArray[np.float64]) -> list[float]:
    """Return the cosine of each row of one array with the same row of the other; rows of zeros are left out."""
    rows, others = one.reshape(len(one), -1), other.reshape(len(other), -1)
    lengths = np.linalg.norm(rows, axis=1) * np.linalg.norm(others, axis=1)
    with np.errstate(invalid="ignore"):
        products = (rows * others).sum(axis=1) / np.where(lengths > 0, lengths, 1.0)
    return [float(product) for product, length in zip(products, lengths, strict=True) if length > 0]


def judge(original: Footprint, quantised: Footprint, outputs: Sequence[OutputError], *, is_static: bool) -> list[str]:
    """Return what to do about a quantised model that is worse than it should be."""
    advice = []
    if quantised.median_s > original.median_s * (1 + MEANINGFUL_DIFFERENCE):
        advice.append(
            f"It is slower than the original by a factor of {quantised.median_s / original.median_s:.2f}: keep the "
            "original unless the memory matters more"
            + ("." if is_static else ", or try --static with calibration data.")
        )
    if quantised.bytes >= original.bytes:
        advice.append("It is no smaller than the original: keep the original.")
    worst = min((each.cosine_mean for each in outputs if each.cosine_mean is not None), default=1.0)
    if not worst >= GOOD_COSINE:  # nor if it is not a number
        advice.append(
            f"Its outputs point elsewhere (cosine {worst:.3f}, wanted ≥ {GOOD_COSINE}): "
            + (
                "calibrate with more data like that of later use, or with another --calibration."
                if is_static
                else "try --static with calibration data, or keep the original."
            )
        )
    return advice


def _numbers(array: NDArray[Any]) -> NDArray[np.float64]:
    """Return an array of numbers with rows; a scalar is one row."""
    return np.atleast_1d(array.astype(np.float64))
