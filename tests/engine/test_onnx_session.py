"""Sessions on real onnxruntime: what is read of a model, what is run, and what its errors say."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from appliance.core.errors import EngineError, InvalidRequestError, ModelFileError, SettingsError
from appliance.core.tensors import Datatype
from appliance.engine.onnx.config import SessionConfig
from appliance.engine.onnx.providers import CPU
from appliance.engine.onnx.session import MOST_REASON_CHARACTERS, OnnxSession, reason
from appliance.engine.onnx.signature import DTYPES, Argument, Inputs
from tests import tiny_onnx
from tests.tiny_onnx import BATCH, ELEMENT_TYPES, tensor, write

FLOAT = "tensor(float)"


def opened(path: Path, **changes: Any) -> OnnxSession:
    return OnnxSession(path, SessionConfig(**changes))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "model.onnx"


def of(datatype: Datatype) -> np.ndarray[Any, np.dtype[Any]]:
    if datatype is Datatype.BYTES:
        return np.array([[b"a", "é\0".encode(), b""], [b"\n", b"b" * 1000, b"c\0\0"]], np.object_)
    return np.array([[0, 1, 2], [3, 4, 5]]).astype(DTYPES[datatype])


# Running


@pytest.mark.parametrize("datatype", Datatype)
def test_every_datatype_goes_in_and_comes_out_the_same(path: Path, datatype: Datatype) -> None:
    session = opened(tiny_onnx.identity(path, datatype.value))
    assert session.signature.inputs[0].datatype is session.signature.outputs[0].datatype is datatype
    session.warm_up()
    given = of(datatype)
    answer = session.run({"x": given})["y"]
    assert answer.dtype == given.dtype == DTYPES[datatype]
    assert answer.tolist() == given.tolist()
    assert session.run({"x": given[:0]})["y"].shape == (0, 3)


def test_every_datatype_of_the_protocol_is_known() -> None:
    assert {each.value for each in Datatype} == ELEMENT_TYPES.keys()


def test_bfloat16_beside_other_types(path: Path) -> None:
    from onnx import TensorProto, helper

    node = helper.make_node("Cast", ["x"], ["y"], to=TensorProto.BFLOAT16)
    write(path, [node], [tensor("x", "FP32", (BATCH, 2))], [tensor("y", "BF16", (BATCH, 2))])
    session = opened(path)
    answer = session.run({"x": np.array([[1.5, -2.0]], np.float32)})["y"]
    assert answer.dtype == ml_dtypes.bfloat16
    assert answer.tolist() == [[1.5, -2.0]]
    assert answer.flags.owndata or answer.base is not None


def test_bfloat16_comes_out_beside_other_types_too(path: Path) -> None:
    from onnx import TensorProto, helper

    nodes = [helper.make_node("Cast", ["x"], ["y"], to=TensorProto.FLOAT), helper.make_node("Identity", ["x"], ["z"])]
    outputs = [tensor("y", "FP32", (BATCH, 2)), tensor("z", "BF16", (BATCH, 2))]
    write(path, nodes, [tensor("x", "BF16", (BATCH, 2))], outputs)
    given = np.array([[1.5, -2.0], [3.0, 4.0]], ml_dtypes.bfloat16)
    answers = opened(path).run({"x": given.T})
    assert {name: (each.dtype, each.tolist()) for name, each in answers.items()} == {
        "y": (np.float32, [[1.5, 3.0], [-2.0, 4.0]]),
        "z": (ml_dtypes.bfloat16, [[1.5, 3.0], [-2.0, 4.0]]),
    }


def test_strings_that_are_no_utf8_are_the_senders_fault(path: Path) -> None:
    session = opened(tiny_onnx.strings(path))
    assert session.run({"text": np.array([["é".encode()]], np.object_)})["twice"].tolist() == [["éé".encode()]]
    with pytest.raises(InvalidRequestError, match="`text` has a string that is no UTF-8") as caught:
        session.run({"text": np.array([[b"\xff"]], np.object_)})
    assert caught.value.param == "text"


def test_weights_beside_the_graph_are_found(path: Path) -> None:
    session = opened(tiny_onnx.external(path))
    assert session.run({"x": np.ones((1, 4), np.float32)})["y"].tolist() == [[2.0] * 4]


def test_the_session_says_what_it_runs_on(path: Path) -> None:
    session = opened(tiny_onnx.tabular(path))
    assert session.providers == (CPU,)
    assert session.on_cpu


def test_a_closed_session_is_closed_twice(path: Path) -> None:
    session = opened(tiny_onnx.tabular(path))
    session.close()
    session.close()


# Failing


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (tiny_onnx.unknown_operator, "No Op registered for Frobnicate"),
        (tiny_onnx.custom_domain, r"com\.example:Custom"),
        (tiny_onnx.truncated, "Protobuf parsing failed"),
        (lambda path: tiny_onnx.external(path, "../outside.bin"), "refuses the model"),
        (lambda path: path.with_name("nothing.onnx"), "refuses the model"),
    ],
)
def test_a_bad_file_is_refused_in_a_few_words(
    path: Path, make: Callable[[Path], Path], told: str, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ModelFileError, match=told) as caught:
        opened(make(path))
    assert str(path.parent) not in caught.value.message
    assert len(caught.value.message) <= MOST_REASON_CHARACTERS + 40
    assert capfd.readouterr() == ("", "")


def test_a_failure_at_run_time_is_ours_and_the_session_goes_on(path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    session = opened(tiny_onnx.fallible(path))
    with pytest.raises(EngineError, match="failed at run time: indices element out of data bounds") as caught:
        session.run({"index": np.array([[99]])})
    assert caught.value.code == "model_failed"
    assert session.run({"index": np.array([[1]])})["value"].tolist() == [[[2.0, 3.0]]]
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ("[ONNXRuntimeError] : 1 : FAIL : Non-zero status.\nStatus Message: a\tb", "a b"),
        ("[ONNXRuntimeError] : 2 : INVALID_ARGUMENT : c : d", "c : d"),
        ("/home/somebody/x/model.cc:12 went wrong", "model.cc:12 went wrong"),
        ("red \x1b[31m", r"red \x1b[31m"),
        ("", "ValueError"),
        ("y" * 1000, "y" * MOST_REASON_CHARACTERS + "…"),
    ],
)
def test_foreign_words_become_one_bounded_line(given: str, told: str) -> None:
    assert reason(ValueError(given)) == told


def test_an_execution_provider_that_is_not_there_is_an_error(path: Path) -> None:
    with pytest.raises(SettingsError, match="asks for tensorrt"):
        opened(tiny_onnx.tabular(path), providers="tensorrt")


class WithoutCuda:
    """Stands before onnxruntime as a build with CUDA whose driver is missing: it falls back by itself."""

    def __init__(self, ort: Any) -> None:
        self._ort = ort

    def __getattr__(self, name: str) -> Any:
        return getattr(self._ort, name)

    def get_available_providers(self) -> list[str]:
        return ["CUDAExecutionProvider", CPU]

    def InferenceSession(self, path: str, options: Any, providers: list[str], provider_options: Any) -> Any:  # noqa: N802
        assert providers == ["CUDAExecutionProvider", CPU]
        return self._ort.InferenceSession(path, options, providers=[CPU])


@pytest.fixture
def without_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    import onnxruntime

    monkeypatch.setattr("appliance.engine.onnx.session._onnxruntime", lambda: WithoutCuda(onnxruntime))


@pytest.mark.usefixtures("without_cuda")
def test_a_provider_that_does_not_start_is_never_silent(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tiny_onnx.tabular(path)
    with caplog.at_level(logging.WARNING, "appliance.engine"):
        assert opened(path).providers == (CPU,)
    assert "could not start CUDAExecutionProvider" in caplog.text
    with pytest.raises(
        EngineError, match="could not start CUDAExecutionProvider, which the settings ask for"
    ) as caught:
        opened(path, providers="cuda")
    assert caught.value.code == "provider_failed"


def test_a_machine_without_onnxruntime_says_so(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(EngineError, match="onnxruntime cannot be loaded"):
        opened(tiny_onnx.tabular(path))


# Warming up


@pytest.mark.parametrize("make", [tiny_onnx.stateful, tiny_onnx.fixed, tiny_onnx.two_inputs, tiny_onnx.fallible])
def test_models_of_all_shapes_are_warmed_up(
    path: Path, make: Callable[[Path], Path], caplog: pytest.LogCaptureFixture
) -> None:
    opened(make(path)).warm_up()
    assert not caplog.records


def test_a_model_that_refuses_made_up_shapes_runs_all_the_same(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    session = opened(tiny_onnx.particular(path))
    session.warm_up()
    assert "was not warmed up: The model failed at run time: " in caplog.text
    length = tiny_onnx.PARTICULAR_LENGTH
    assert session.run({"x": np.ones((1, length), np.float32)})["y"].tolist() == [[length, length]]


def test_an_input_of_gigabytes_is_not_made_up(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    session = opened(tiny_onnx.identity(path, shape=(BATCH, 2**20, 2**20)))
    session.warm_up()
    assert "too large to make up" in caplog.text


# The signature


@pytest.mark.parametrize(
    ("make", "batched"),
    [
        (tiny_onnx.tabular, True),
        (tiny_onnx.two_inputs, True),
        (tiny_onnx.strings, True),
        (tiny_onnx.fixed, False),
        (tiny_onnx.stateful, False),
        (lambda path: tiny_onnx.identity(path, shape=()), False),
        (lambda path: tiny_onnx.identity(path, shape=(None, 3)), True),
        (lambda path: tiny_onnx.identity(path, shape=(-1, 3)), True),
        (lambda path: tiny_onnx.identity(path, shape=("", 3)), True),
        (lambda path: tiny_onnx.identity(path, shape=("n", "n")), False),
        (lambda path: tiny_onnx.identity(path, shape=(8, 3)), False),
    ],
)
def test_the_batch_dimension_is_read(path: Path, make: Callable[[Path], Path], batched: bool) -> None:
    assert opened(make(path)).signature.batched is batched


@pytest.mark.parametrize(
    ("inputs", "outputs", "batched"),
    [
        ([("b", 2)], [("b", 2)], True),
        ([("b", 2), ("b", "n")], [("b",)], True),
        ([("b", 2)], [(None, 2)], True),
        ([("b", 2)], [("c", 2)], False),
        ([("b", 2), ("c", 2)], [("b", 2)], False),
        ([("b", 2), (None, 2)], [("b", 2)], False),
        ([(None, 2)], [("b", 2)], False),
        ([("b", 2)], [(1, 2)], False),
        ([("b", 2)], [()], False),
        ([], [("b", 2)], False),
        ([("b", 2)], [("b", "b")], False),
    ],
)
def test_only_one_and_the_same_free_dimension_is_a_batch(
    inputs: list[tuple[Any, ...]], outputs: list[tuple[Any, ...]], batched: bool
) -> None:
    read = Inputs(
        [Argument(f"i{index}", FLOAT, shape) for index, shape in enumerate(inputs)],
        [Argument(f"o{index}", FLOAT, shape) for index, shape in enumerate(outputs)],
    )
    assert read.signature.batched is batched


def test_outputs_that_are_no_tensors_are_left_out_and_then_nothing_is_batched() -> None:
    label, maps = Argument("label", "tensor(int64)", (None,)), Argument("p", "seq(map(int64,tensor(float)))", ())
    read = Inputs([Argument("x", FLOAT, (None, 4))], [label, maps])
    assert [each.name for each in read.signature.outputs] == ["label"]
    assert not read.signature.batched
    with pytest.raises(ModelFileError, match="no output that is a tensor"):
        Inputs([Argument("x", FLOAT, (None, 4))], [maps])
    with pytest.raises(ModelFileError, match="`p` is a seq"):
        Inputs([maps], [label])


def takes(**shapes: tuple[Any, ...]) -> Inputs:
    return Inputs([Argument(name, FLOAT, shape) for name, shape in shapes.items()], [Argument("y", FLOAT, ("b",))])


def zeros(*shape: int) -> np.ndarray[Any, np.dtype[np.float32]]:
    return np.zeros(shape, np.float32)


@pytest.mark.parametrize(
    ("given", "told", "param"),
    [
        ({}, "The input `ids` is missing; the model takes `ids`, `mask`", "ids"),
        ({"ids": zeros(1, 2)}, "The input `mask` is missing", "mask"),
        ({"ids": zeros(1, 2), "mask": zeros(1, 2), "\x1b": zeros(1)}, r"no input `\\x1b`", "\x1b"),
        ({"ids": np.zeros((1, 2)), "mask": zeros(1, 2)}, "`ids` is FP64; the model takes FP32", "ids"),
        ({"ids": np.zeros((1, 2), np.complex64), "mask": zeros(1, 2)}, "`ids` is complex64", "ids"),
        ({"ids": zeros(2), "mask": zeros(1, 2)}, r"`ids` has 1 dimensions; the model takes 2: \[b, n\]", "ids"),
        ({"ids": zeros(1, 2), "mask": zeros(1, 3)}, "`mask` has 3 where `ids` has 2: both are the model's `n`", "mask"),
        ({"ids": zeros(1, 2), "mask": zeros(4, 2)}, "`mask` has 4 where `ids` has 1", "mask"),
    ],
)
def test_tensors_that_do_not_fit_are_refused_by_name(given: dict[str, Any], told: str, param: str) -> None:
    with pytest.raises(InvalidRequestError, match=told) as caught:
        takes(ids=("b", "n"), mask=("b", "n")).check(given, ())
    assert caught.value.param == param


def test_fixed_sizes_are_held_and_free_ones_are_free() -> None:
    image = takes(image=(None, 3, "h"))
    image.check({"image": zeros(2, 3, 7)}, ("y",))
    with pytest.raises(InvalidRequestError, match=r"has the shape \[2, 4, 7\]; the model takes \[-1, 3, h\]"):
        image.check({"image": zeros(2, 4, 7)}, ())
    with pytest.raises(InvalidRequestError, match="no output `z`; it has `y`") as caught:
        image.check({"image": zeros(2, 3, 7)}, ("y", "z"))
    assert caught.value.param == "z"


def test_a_list_of_names_ends() -> None:
    with pytest.raises(InvalidRequestError, match="…") as caught:
        takes(**{f"i{number}": ("b",) for number in range(100)}).check({}, ())
    assert len(caught.value.message) < 400
