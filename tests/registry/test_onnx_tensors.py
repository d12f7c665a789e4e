from __future__ import annotations

from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnxruntime
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import ModelProto, SparseTensorProto, TensorProto, helper, numpy_helper

from appliance.core.errors import ModelFileError
from appliance.registry.onnx_tensors import StoredTensors, check_location, read_tensors
from appliance.registry.roles import MAX_FILES
from tests.registry.onnx_models import changed, stored
from tests.tiny_onnx import external, tabular

FLOAT, STRING, INT4 = TensorProto.FLOAT, TensorProto.STRING, TensorProto.INT4


def outside(entries: dict[str, str], kind: int = FLOAT, dims: tuple[int, ...] = (4,)) -> TensorProto:
    tensor = stored("w", kind, list(dims), data_location=TensorProto.EXTERNAL)
    for key, value in entries.items():
        tensor.external_data.add(key=key, value=value)
    return tensor


SOUND = [
    stored("raw", FLOAT, [2, 2], raw_data=bytes(16)),
    stored("typed", FLOAT, [2], float_data=[1.0, 2.0]),
    stored("scalar", TensorProto.INT64, [], int64_data=[1]),
    stored("empty", FLOAT, [0]),
    stored("half", TensorProto.FLOAT16, [2], int32_data=[1, 2]),
    stored("packed", INT4, [3], raw_data=bytes(2)),
    stored("packed and typed", INT4, [3], int32_data=[1, 2]),
    stored("complex", TensorProto.COMPLEX64, [1], float_data=[1.0, 2.0]),
    stored("text", STRING, [2], string_data=[b"a", b"b"]),
    numpy_helper.from_array(np.zeros(3, ml_dtypes.bfloat16), "bfloat16"),
]


@pytest.mark.parametrize("tensor", SOUND, ids=lambda each: each.name)
def test_a_sound_tensor_is_taken(tensor: TensorProto) -> None:
    found = StoredTensors()
    found.add(tensor)
    assert found.external == {}


BAD: dict[str, tuple[TensorProto, str]] = {
    "negative size": (stored("w", FLOAT, [-1], raw_data=b""), "the shape [-1], which cannot be"),
    "too many dimensions": (stored("w", FLOAT, [1] * 65, raw_data=bytes(4)), "which cannot be"),
    "petabytes": (stored("w", FLOAT, [2**40, 2**20], raw_data=b""), "claims 1.15e+18 elements"),
    "overflow": (stored("w", FLOAT, [2**62, 4], raw_data=b""), "claims 1.84e+19 elements"),
    "raw too short": (stored("w", FLOAT, [4], raw_data=bytes(15)), "has 15 bytes; its shape needs 16"),
    "raw too long": (stored("w", FLOAT, [4], raw_data=bytes(17)), "has 17 bytes; its shape needs 16"),
    "typed too few": (stored("w", FLOAT, [4], float_data=[1.0]), "has 1 of 4 elements"),
    "nothing stored": (stored("w", FLOAT, [4]), "has 0 of 4 elements"),
    "raw text": (stored("w", STRING, [1], raw_data=b"a"), "has 1 bytes"),
    "unknown type": (stored("w", 99, [1], raw_data=b"a"), "the element type 99"),
    "no type": (stored("w", 0, [1], raw_data=b"a"), "the element type 0"),
    "external text": (outside({"location": "w.bin"}, STRING), "keeps texts in a data file"),
    "external without place": (outside({}), "keeps data in ''"),
    "external length wrong": (outside({"location": "w.bin", "length": "15"}), "claims 15 bytes in a data file"),
    "external offset negative": (outside({"location": "w.bin", "offset": "-4"}), "gives '-4' as the offset"),
    "external offset no number": (outside({"location": "w.bin", "offset": "0x10"}), "gives '0x10' as the offset"),
    "external offset in other digits": (outside({"location": "w.bin", "offset": "٣"}), "as the offset"),
    "external length huge": (outside({"location": "w.bin", "length": "9" * 16}), "as the length"),
}


@pytest.mark.parametrize(("tensor", "reason"), BAD.values(), ids=BAD.keys())
def test_a_tensor_that_cannot_be_is_refused(tensor: TensorProto, reason: str) -> None:
    with pytest.raises(ModelFileError) as refused:
        StoredTensors().add(tensor)
    assert reason in refused.value.message


HOSTILE_LOCATIONS = [
    "/etc/passwd",
    "../weights.bin",
    "a/../../weights.bin",
    "a\\..\\weights.bin",
    "C:weights.bin",
    "*/_ORT_MEM_ADDR_/*",
    "weights.bin\0.txt",
    "./",
    "././weights.bin",
    "model.onnx",
    "",
    "x" * 300,
]


@pytest.mark.parametrize("location", HOSTILE_LOCATIONS)
def test_data_outside_the_folder_is_refused(location: str) -> None:
    with pytest.raises(ModelFileError, match="no plain path inside its folder"):
        check_location(location)


@given(st.text(alphabet="a./\\*:\0", max_size=10))
def test_a_location_that_is_taken_stays_in_the_folder(location: str) -> None:
    try:
        path = check_location(location)
    except ModelFileError:
        return
    assert (Path("/folder") / path).resolve().is_relative_to("/folder")
    assert (Path("/folder") / location).resolve() == Path("/folder") / path


def test_data_files_are_listed_with_the_bytes_they_need(tmp_path: Path) -> None:
    found = StoredTensors()
    for tensor in (
        outside({"location": "./w.bin", "offset": "4096", "length": "16"}),
        outside({"location": "w.bin"}),
        outside({"location": "more/b.bin", "offset": "1"}, TensorProto.INT8),
        outside({"location": "empty.bin"}, dims=(0,)),
    ):
        found.add(tensor)
    assert found.external == {"w.bin": 4112, "more/b.bin": 5, "empty.bin": 1}


def test_too_many_data_files_are_refused() -> None:
    found = StoredTensors()
    for number in range(MAX_FILES - 1):
        found.add(outside({"location": f"{number}.bin"}))
    with pytest.raises(ModelFileError, match=f"has {MAX_FILES} data files or more"):
        found.add(outside({"location": "one more.bin"}))


@pytest.mark.parametrize(
    ("kinds", "label"),
    [
        ({"FLOAT": 4}, "fp32"),
        ({"FLOAT": 4, "INT8": 20}, "int8"),
        ({"FLOAT16": 4, "FLOAT": 1}, "fp16"),
        ({"INT64": 99}, ""),
        ({}, ""),
    ],
)
def test_the_label_is_the_type_of_most_bytes(kinds: dict[str, int], label: str) -> None:
    found = StoredTensors()
    for name, count in kinds.items():
        kind = TensorProto.DataType.Value(name)
        bits = {"FLOAT": 32, "INT8": 8, "FLOAT16": 16, "INT64": 64}[name]
        found.add(stored("w", kind, [count], raw_data=bytes(count * bits // 8)))
    assert found.label == label


def _spoiled(kind: str, model: ModelProto) -> None:
    """Put a tensor that is cut off in one of the places where a model can have one."""
    bad: Any = stored("bad", FLOAT, [4], raw_data=b"")
    index = stored("index", TensorProto.INT64, [1], int64_data=[0])
    node = helper.make_node("Constant", [], ["c"])
    graph = helper.make_graph([], "inner", [], [])
    sparse = SparseTensorProto(values=bad, indices=index, dims=[9])
    if kind == "initializer":
        model.graph.initializer.append(bad)
    elif kind == "sparse initializer":
        model.graph.sparse_initializer.append(sparse)
    elif kind == "initializer of an inner graph":
        graph.initializer.append(bad)
        node.attribute.append(helper.make_attribute("g", graph))
    elif kind == "function":
        node.attribute.append(helper.make_attribute("value", bad))
        model.functions.append(helper.make_function("mine", "F", [], ["c"], [node], []))
        return
    else:
        value = {"attribute": bad, "attributes": [bad], "sparse attribute": sparse, "sparse attributes": [sparse]}[kind]
        node.attribute.append(helper.make_attribute("value", value))
    model.graph.node.append(node)


@pytest.mark.parametrize(
    "kind",
    [
        "initializer",
        "sparse initializer",
        "initializer of an inner graph",
        "function",
        "attribute",
        "attributes",
        "sparse attribute",
        "sparse attributes",
    ],
)
def test_tensors_are_looked_at_wherever_they_are(tmp_path: Path, kind: str) -> None:
    path = changed(tabular(tmp_path / "model.onnx"), lambda model: _spoiled(kind, model))
    with pytest.raises(ModelFileError, match="'bad' has 0 bytes; its shape needs 16"):
        read_tensors(ModelProto.FromString(path.read_bytes()))


def test_what_the_exporter_writes_is_taken_here_and_by_onnxruntime(tmp_path: Path) -> None:
    path = external(tmp_path / "model.onnx")
    assert read_tensors(ModelProto.FromString(path.read_bytes())).external == {"weights.bin": 64}
    assert onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
