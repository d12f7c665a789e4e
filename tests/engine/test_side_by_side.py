"""Two models on the same inputs: what is measured, and when it is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx import helper

from appliance.core.errors import EngineError, InvalidRequestError, ModelFileError
from appliance.engine.onnx.side_by_side import ROUNDS, Session, compare
from appliance.engine.onnx.trials import Trial
from appliance.engine.onnx.work import Arrays
from tests import tiny_onnx


def scaling(path: Path, factor: float) -> Path:
    """`x` FP32 [batch, n] → `y`, so many times as much; and `count` INT64, its shape."""
    nodes = [helper.make_node("Mul", ["x", "factor"], ["y"]), helper.make_node("Shape", ["x"], ["count"])]
    outputs = [tiny_onnx.tensor("y", "FP32", ("batch", "n")), tiny_onnx.tensor("count", "INT64", (2,))]
    inputs = [tiny_onnx.tensor("x", "FP32", ("batch", "n"))]
    return tiny_onnx.write(path, nodes, inputs, outputs, {"factor": np.array(factor, np.float32)})


def trial(*arrays: Any, **changes: Any) -> Trial:
    samples = tuple({"x": np.asarray(each, np.float32)} for each in arrays)
    return Trial(samples=samples, data="arrays", **changes)


@pytest.fixture
def measured(tmp_path: Path) -> Callable[..., Any]:
    def measure(first: float, second: float, on: Trial) -> Any:
        models = [scaling(tmp_path / f"{name}.onnx", factor) for name, factor in (("a", first), ("b", second))]
        extra = tmp_path / "weights.bin"
        extra.write_bytes(bytes(5000))
        return compare([models[0], extra], [models[1]], on, threads=1, is_static=False, say=lambda _: None)

    return measure


def test_the_figures_are_those_of_the_runs(measured: Callable[..., Any], tmp_path: Path) -> None:
    found = measured(2, 3, trial([[1, 2, 3], [4, 5, 6]], [[1, 1, 1, 1]], has_lengths=True))
    assert (found.rows, found.length, found.runs) == ((1, 2), (3, 4), ROUNDS * 2)
    y, count = found.outputs
    assert (y.name, y.largest, y.mean) == ("y", 6.0, pytest.approx(2.5))
    assert y.cosine_worst == pytest.approx(1)
    assert (count.name, count.cosine_mean, count.largest) == ("count", None, 0.0)
    assert found.original.bytes == (tmp_path / "a.onnx").stat().st_size + 5000
    assert found.quantised.bytes == (tmp_path / "b.onnx").stat().st_size
    assert found.original.median_s > 0
    assert found.quantised.median_s > 0


def test_what_the_trial_reads_is_what_is_compared(measured: Callable[..., Any]) -> None:
    numbers = []

    def read(number: int, outputs: Arrays) -> Arrays:
        numbers.append(number)
        return {"sum": outputs["y"].sum(axis=1, keepdims=True)}

    found = measured(1, -1, trial([[1, 2]], [[3, 4]], read=read))
    assert [(each.name, each.largest) for each in found.outputs] == [("sum", 14.0)]
    assert numbers == [0, 0, 1, 1]


def test_answers_that_are_no_numbers_are_refused(measured: Callable[..., Any]) -> None:
    with pytest.raises(EngineError, match="y of the quantised model is not a number") as refused:
        measured(1, float("inf"), trial([[0, 1]]))
    assert refused.value.code == "not_a_number"
    assert measured(float("inf"), float("inf"), trial([[0, 1]])).runs == ROUNDS


def test_answers_of_another_shape_are_refused(tmp_path: Path) -> None:
    pair = [tiny_onnx.identity(tmp_path / "a.onnx"), tmp_path / "b.onnx"]
    node = helper.make_node("NonZero", ["x"], ["y"])
    shapes = [tiny_onnx.tensor("x", "FP32", ("batch", "n"))], [tiny_onnx.tensor("y", "INT64", (None, None))]
    tiny_onnx.write(pair[1], [node], *shapes)
    with pytest.raises(ModelFileError, match=r"is \[2, 3\] where the original's is \[1, 3\]"):
        compare([pair[0]], [pair[1]], trial([[1, 2, 3]]), threads=1, is_static=False, say=lambda _: None)


def test_samples_that_the_model_fails_on_are_refused(tmp_path: Path) -> None:
    session = Session(tiny_onnx.fallible(tmp_path / "model.onnx"), 1)
    with pytest.raises(InvalidRequestError, match="fails on a sample"):
        session.run({"index": np.array([[9]])})


def test_a_model_that_does_not_open_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelFileError, match="cannot open"):
        Session(tiny_onnx.unknown_operator(tmp_path / "model.onnx"), 1)
