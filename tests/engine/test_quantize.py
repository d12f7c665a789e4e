"""Quantisation of tiny models by the real library, what is refused, and what is left behind: nothing."""

from __future__ import annotations

import errno
import logging
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper

from appliance.core.errors import ApplianceError, EngineError, InvalidRequestError, ModelFileError, StorageError
from appliance.core.tensors import Datatype, ModelSignature, TensorSpec
from appliance.engine.onnx.quantize import (
    QUANTISED_OPERATORS,
    Quantisation,
    lacks_int8_dot_products,
    quantise,
    reduced_range_is_better,
)
from appliance.engine.onnx.samples import MadeUp, Samples
from appliance.engine.onnx.side_by_side import Session
from appliance.registry.onnx_header import read_onnx
from tests import tiny_onnx

IMAGE = 16


def perceptron(path: Path, *, opset: int = tiny_onnx.OPSET) -> Path:
    """`x` FP32 [batch, 64] → `y` [batch, 64]: two layers with a ReLU between."""
    random = np.random.default_rng(0)
    constants = {name: (random.standard_normal((64, 64)) / 8).astype(np.float32) for name in ("first", "second")}
    nodes = [
        helper.make_node("MatMul", ["x", "first"], ["hidden"]),
        helper.make_node("Relu", ["hidden"], ["active"]),
        helper.make_node("MatMul", ["active", "second"], ["y"]),
    ]
    shape = ("batch", 64)
    tensors = [tiny_onnx.tensor("x", "FP32", shape)], [tiny_onnx.tensor("y", "FP32", shape)]
    return tiny_onnx.write(path, nodes, *tensors, constants, opsets={"": opset})


def convolution(path: Path, *, opset: int = 11) -> Path:
    """`image` FP32 [batch, 3, 16, 16] → `features` [batch, 8, 16, 16], of channels of very different sizes."""
    random = np.random.default_rng(0)
    scales = 10.0 ** np.linspace(-2, 1, 8).reshape(8, 1, 1, 1)
    weights = (random.standard_normal((8, 3, 3, 3)) * scales).astype(np.float32)
    nodes = [
        helper.make_node("Conv", ["image", "weights", "bias"], ["raw"], pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["raw"], ["features"]),
    ]
    inputs = [tiny_onnx.tensor("image", "FP32", ("batch", 3, IMAGE, IMAGE))]
    outputs = [tiny_onnx.tensor("features", "FP32", ("batch", 8, IMAGE, IMAGE))]
    constants = {"weights": weights, "bias": np.zeros(8, np.float32)}
    return tiny_onnx.write(path, nodes, inputs, outputs, constants, opsets={"": opset})


def product(path: Path) -> Path:
    """`a`, `b` FP32 [64, 64] → `y`, their product: it has no weights."""
    node = helper.make_node("MatMul", ["a", "b"], ["y"])
    inputs = [tiny_onnx.tensor(name, "FP32", (64, 64)) for name in ("a", "b")]
    return tiny_onnx.write(path, [node], inputs, [tiny_onnx.tensor("y", "FP32", (64, 64))])


def made_up(*inputs: tuple[str, tuple[int, ...]]) -> MadeUp:
    specs = tuple(TensorSpec(name, Datatype.FP32, shape) for name, shape in inputs)
    return MadeUp(ModelSignature(specs, (), batched=True), lambda _: True, count=4)


ROWS = made_up(("x", (-1, 64)))
IMAGES = made_up(("image", (-1, 3, IMAGE, IMAGE)))
NONE: Samples = ()


def said(_: str) -> None:
    """Hear what is being done."""


def operators(path: Path) -> set[str]:
    return {each.op_type for each in onnx.load(path, load_external_data=False).graph.node}


def run(path: Path, inputs: Any) -> Any:
    return next(iter(Session(path, 1).run(inputs).values()))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The folder of the model alone."""
    made = tmp_path / "model"
    made.mkdir()
    return made


@pytest.mark.parametrize("per_channel", [True, False])
def test_weights_are_quantised_without_any_data(folder: Path, tmp_path: Path, per_channel: bool) -> None:
    graph = perceptron(folder / "model.onnx")
    target = tmp_path / "int8.onnx"
    assert quantise(graph, target, Quantisation(per_channel=per_channel), NONE, said) == (target,)
    assert "MatMulInteger" in operators(target)
    assert target.stat().st_size < graph.stat().st_size / 2
    before, after = run(graph, ROWS[0]), run(target, ROWS[0])
    assert np.abs(after - before).max() < 0.05 * np.abs(before).max()


@pytest.mark.parametrize("calibration", ["minmax", "entropy", "percentile"])
def test_convolutions_are_quantised_by_samples(folder: Path, tmp_path: Path, calibration: Any) -> None:
    graph = convolution(folder / "model.onnx")
    target = tmp_path / "int8.onnx"
    heard: list[str] = []
    quantise(graph, target, Quantisation(mode="static", calibration=calibration), IMAGES, heard.append)
    assert {"QuantizeLinear", "DequantizeLinear"} <= operators(target)
    assert "calibrating, 4 of 4 samples" in heard
    before, after = run(graph, IMAGES[0]), run(target, IMAGES[0])
    assert np.corrcoef(before.ravel(), after.ravel())[0, 1] > 0.98


def test_a_scale_for_each_channel_keeps_small_channels(folder: Path, tmp_path: Path) -> None:
    """An opset that does not know such scales is raised for them."""
    graph = convolution(folder / "model.onnx", opset=11)
    errors = []
    for per_channel in (True, False):
        target = tmp_path / f"{per_channel}.onnx"
        quantise(graph, target, Quantisation(mode="static", per_channel=per_channel), IMAGES, said)
        weights = next(each for each in onnx.load(target).graph.initializer if each.name == "weights_scale")
        assert weights.dims == ([8] if per_channel else [])
        errors.append(np.abs(run(graph, IMAGES[0])[:, 0] - run(target, IMAGES[0])[:, 0]).mean())
    assert errors[0] <= errors[1]


def test_symmetric_ranges_have_zero_at_zero(folder: Path, tmp_path: Path) -> None:
    target = tmp_path / "int8.onnx"
    wanted = Quantisation(mode="static", symmetric=True)
    quantise(convolution(folder / "model.onnx"), target, wanted, IMAGES, said)
    zeros = [
        onnx.numpy_helper.to_array(each)
        for each in onnx.load(target).graph.initializer
        if each.name.endswith("zero_point")
    ]
    assert zeros
    assert all((each == 0).all() and each.dtype in (np.int8, np.int32) for each in zeros)


def test_seven_bits_of_weights_are_used_where_products_may_overflow(folder: Path, tmp_path: Path) -> None:
    target = tmp_path / "int8.onnx"
    quantise(perceptron(folder / "model.onnx"), target, Quantisation(reduce_range=True), NONE, said)
    weights = [
        onnx.numpy_helper.to_array(each)
        for each in onnx.load(target).graph.initializer
        if each.name.endswith("_quantized")
    ]
    assert weights
    assert all(np.abs(each.astype(int)).max() <= 64 for each in weights)


@pytest.mark.parametrize(
    ("machine", "flags", "lacking"),
    [
        ("x86_64", ["avx2", "avx512f"], True),
        ("x86_64", ["avx2", "avx_vnni"], False),
        ("x86_64", ["avx512_vnni"], False),
        ("aarch64", ["asimd"], False),
    ],
)
def test_a_cpu_tells_by_its_features(machine: str, flags: list[str], lacking: bool) -> None:
    assert lacks_int8_dot_products(machine, flags) is lacking


def test_this_cpu_has_an_answer() -> None:
    assert reduced_range_is_better() in (True, False)


@pytest.mark.parametrize("mode", ["dynamic", "static"])
def test_weights_outside_the_graph_are_read_and_written(folder: Path, tmp_path: Path, mode: Any) -> None:
    graph = perceptron(folder / "model.onnx")
    onnx.save(onnx.load(graph), graph, save_as_external_data=True, location="weights.bin", size_threshold=0)
    assert set(read_onnx(graph).external) == {"weights.bin"}
    target = tmp_path / "int8.onnx"
    target_files = quantise(graph, target, Quantisation(mode=mode), ROWS, said, largest=1000)
    assert target_files == (target, tmp_path / "int8.onnx.data")
    assert set(read_onnx(target).external) == {"int8.onnx.data"}
    before, after = run(graph, ROWS[0]), run(target, ROWS[0])
    assert np.abs(after - before).max() < 0.1 * np.abs(before).max()


def test_a_small_model_of_several_files_becomes_one(folder: Path, tmp_path: Path) -> None:
    graph = perceptron(folder / "model.onnx")
    onnx.save(onnx.load(graph), graph, save_as_external_data=True, location="weights.bin", size_threshold=0)
    target = tmp_path / "int8.onnx"
    assert quantise(graph, target, Quantisation(), NONE, said) == (target,)
    assert set(read_onnx(target).external) == set()


@pytest.mark.parametrize(
    ("write", "wanted", "samples", "told"),
    [
        (tiny_onnx.identity, Quantisation(), NONE, "no weights that can be quantised"),
        (convolution, Quantisation(), NONE, "--static --samples"),
        (product, Quantisation(), NONE, "no weights that can be quantised"),
        (tiny_onnx.two_inputs, Quantisation(mode="static"), ROWS, "no weights that can be quantised"),
        (tiny_onnx.truncated, Quantisation(), NONE, "cannot quantise"),
        (tiny_onnx.unknown_operator, Quantisation(), NONE, "no weights that can be quantised"),
        (perceptron, Quantisation(mode="static"), NONE, "needs calibration data"),
        (perceptron, Quantisation(mode="static"), IMAGES, "cannot quantise"),
    ],
)
def test_what_cannot_be_quantised_is_refused_with_advice(
    folder: Path, tmp_path: Path, *, write: Any, wanted: Quantisation, samples: Samples, told: str
) -> None:
    graph = write(folder / "model.onnx")
    with pytest.raises(InvalidRequestError, match=told) as refused:
        quantise(graph, tmp_path / "int8.onnx", wanted, samples, said)
    assert refused.value.advice
    assert list(tmp_path.glob("*.onnx*")) == []


@pytest.mark.parametrize("mode", ["dynamic", "static"])
def test_what_is_quantised_already_is_refused(folder: Path, tmp_path: Path, mode: Any) -> None:
    once = tmp_path / "once"
    once.mkdir()
    wanted = Quantisation(mode=mode)
    quantise(perceptron(folder / "model.onnx"), once / "int8.onnx", wanted, ROWS, said)
    for again in (Quantisation(), Quantisation(mode="static")):
        with pytest.raises(ModelFileError, match="quantised already") as refused:
            quantise(once / "int8.onnx", tmp_path / "twice.onnx", again, ROWS, said)
        assert QUANTISED_OPERATORS & set(refused.value.message.replace(",", "").replace(".", "").split())


def test_the_library_is_silent_and_leaves_nothing_behind(
    folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(elsewhere))
    wanted = Quantisation(mode="static", calibration="entropy")
    quantise(convolution(folder / "model.onnx"), tmp_path / "int8.onnx", wanted, IMAGES, said)
    assert capfd.readouterr() == ("", "")
    assert list(elsewhere.iterdir()) == []
    assert {each.name for each in folder.iterdir()} == {"model.onnx", "normalised.onnx", "prepared.onnx"}
    assert tempfile.tempdir == str(elsewhere)
    assert logging.root.manager.disable == logging.NOTSET


def test_leaving_in_the_middle_is_passed_on(folder: Path, tmp_path: Path) -> None:
    def interrupted(activity: str) -> None:
        if activity.startswith("calibrating"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantise(convolution(folder / "m.onnx"), tmp_path / "o.onnx", Quantisation(mode="static"), IMAGES, interrupted)
    assert not (tmp_path / "o.onnx").exists()


@pytest.mark.parametrize(
    ("failure", "kind", "code"),
    [
        (MemoryError(), EngineError, "not_enough_memory"),
        (OSError(errno.ENOSPC, "No space left on device"), StorageError, "disk_full"),
        (OSError(errno.EIO, "Input/output error"), ModelFileError, "bad_model_file"),
        (AssertionError(), ModelFileError, "bad_model_file"),
    ],
)
def test_what_stops_the_library_is_told_in_our_words(
    folder: Path, tmp_path: Path, failure: Exception, kind: type[ApplianceError], code: str
) -> None:
    def failing(activity: str) -> None:
        if activity.startswith("quantising"):
            raise failure

    with pytest.raises(kind) as refused:
        quantise(perceptron(folder / "model.onnx"), tmp_path / "int8.onnx", Quantisation(), NONE, failing)
    assert refused.value.code == code
    assert list(tmp_path.glob("*.onnx*")) == []
