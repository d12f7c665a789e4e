"""Tiny ONNX models, for tests that need a real session but no sense in its answers.

Each is written in milliseconds and returns the path it was given. Unless its function says otherwise, a model is
batched: the first dimension of every tensor is the free dimension `batch`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper, numpy_helper

OPSET = 20
IR_VERSION = 9

BATCH = "batch"

ELEMENT_TYPES = {
    "BOOL": TensorProto.BOOL,
    "UINT8": TensorProto.UINT8,
    "UINT16": TensorProto.UINT16,
    "UINT32": TensorProto.UINT32,
    "UINT64": TensorProto.UINT64,
    "INT8": TensorProto.INT8,
    "INT16": TensorProto.INT16,
    "INT32": TensorProto.INT32,
    "INT64": TensorProto.INT64,
    "FP16": TensorProto.FLOAT16,
    "BF16": TensorProto.BFLOAT16,
    "FP32": TensorProto.FLOAT,
    "FP64": TensorProto.DOUBLE,
    "BYTES": TensorProto.STRING,
}
"""ONNX's element types by the protocol's datatypes."""

TABULAR_FEATURES = 4
TABULAR_CLASSES = 3
TABLE_ROWS = 4
"""`fallible` fails on indices that are not below it."""
PARTICULAR_LENGTH = 7

Dimension = int | str | None


def tensor(name: str, datatype: str, shape: Sequence[Dimension]) -> onnx.ValueInfoProto:
    """Describe an input or output by the protocol's datatype."""
    return helper.make_tensor_value_info(name, ELEMENT_TYPES[datatype], list(shape))


def write(
    path: Path,
    nodes: Sequence[onnx.NodeProto],
    inputs: Sequence[onnx.ValueInfoProto],
    outputs: Sequence[onnx.ValueInfoProto],
    constants: dict[str, npt.NDArray[Any]] | None = None,
    *,
    opsets: dict[str, int] | None = None,
) -> Path:
    """Write any graph; nothing is checked, since some of the models are wrong on purpose."""
    initializers = [numpy_helper.from_array(array, name) for name, array in (constants or {}).items()]
    graph = helper.make_graph(list(nodes), "tiny", list(inputs), list(outputs), initializers)
    versions = [helper.make_opsetid(*each) for each in {"": OPSET, **(opsets or {})}.items()]
    model = helper.make_model(graph, opset_imports=versions, ir_version=IR_VERSION, producer_name="tiny")
    path.write_bytes(model.SerializeToString())
    return path


# Models that work


def identity(path: Path, datatype: str = "FP32", shape: Sequence[Dimension] = (BATCH, "n")) -> Path:
    """`x` → `y`, the same."""
    node = helper.make_node("Identity", ["x"], ["y"])
    return write(path, [node], [tensor("x", datatype, shape)], [tensor("y", datatype, shape)])


def fixed(path: Path, shape: Sequence[int] = (1, 4)) -> Path:
    """`x` → `y`, twice as much, FP32 of one shape: it has no batch."""
    node = helper.make_node("Add", ["x", "x"], ["y"])
    return write(path, [node], [tensor("x", "FP32", shape)], [tensor("y", "FP32", shape)])


def two_inputs(path: Path) -> Path:
    """`a`, `b` FP32 [batch, n] → `sum`, `difference` of the same shape."""
    shape = (BATCH, "n")
    nodes = [helper.make_node("Add", ["a", "b"], ["sum"]), helper.make_node("Sub", ["a", "b"], ["difference"])]
    inputs = [tensor(name, "FP32", shape) for name in ("a", "b")]
    return write(path, nodes, inputs, [tensor(name, "FP32", shape) for name in ("sum", "difference")])


def tabular(path: Path, *, seed: int = 0) -> Path:
    """`features` FP32 [batch, 4] → `probabilities` FP32 [batch, 3]: a logistic regression."""
    weights = np.random.default_rng(seed).standard_normal((TABULAR_FEATURES, TABULAR_CLASSES)).astype(np.float32)
    nodes = [
        helper.make_node("MatMul", ["features", "weights"], ["logits"]),
        helper.make_node("Softmax", ["logits"], ["probabilities"], axis=-1),
    ]
    inputs = [tensor("features", "FP32", (BATCH, TABULAR_FEATURES))]
    outputs = [tensor("probabilities", "FP32", (BATCH, TABULAR_CLASSES))]
    return write(path, nodes, inputs, outputs, {"weights": weights})


def strings(path: Path) -> Path:
    """`text` BYTES [batch, n] → `twice`, each string twice in a row."""
    node = helper.make_node("StringConcat", ["text", "text"], ["twice"])
    return write(path, [node], [tensor("text", "BYTES", (BATCH, "n"))], [tensor("twice", "BYTES", (BATCH, "n"))])


def stateful(path: Path) -> Path:
    """`x` FP32 [batch, n], `state` FP32 [2, batch, n], scalar `rate` INT64 → `y`, `state_out`: it has no batch.

    Voice detectors are made so.
    """
    nodes = [
        helper.make_node("Cast", ["rate"], ["factor"], to=TensorProto.FLOAT),
        helper.make_node("Mul", ["x", "factor"], ["y"]),
        helper.make_node("Add", ["state", "x"], ["state_out"]),
    ]
    state = (2, BATCH, "n")
    inputs = [tensor("x", "FP32", (BATCH, "n")), tensor("state", "FP32", state), tensor("rate", "INT64", ())]
    return write(path, nodes, inputs, [tensor("y", "FP32", (BATCH, "n")), tensor("state_out", "FP32", state)])


def slow(path: Path, *, rounds: int = 200, size: int = 256) -> Path:
    """`x` FP32 [batch, size] → `y`: so many matrix products one after another, each a few µs a row."""
    weights = (np.random.default_rng(0).standard_normal((size, size)) / np.sqrt(size)).astype(np.float32)
    body = helper.make_graph(
        [
            helper.make_node("MatMul", ["state", "weights"], ["product"]),
            helper.make_node("Tanh", ["product"], ["next"]),
            helper.make_node("Identity", ["go_on"], ["still"]),
        ],
        "round",
        [tensor("round", "INT64", ()), tensor("go_on", "BOOL", ()), tensor("state", "FP32", (None, size))],
        [tensor("still", "BOOL", ()), tensor("next", "FP32", (None, size))],
    )
    node = helper.make_node("Loop", ["rounds", "true", "x"], ["y"], body=body)
    shape = (BATCH, size)
    constants = {"rounds": np.array(rounds), "true": np.array(True), "weights": weights}
    return write(path, [node], [tensor("x", "FP32", shape)], [tensor("y", "FP32", shape)], constants)


def external(path: Path, location: str = "weights.bin") -> Path:
    """`x` FP32 [batch, 4] → `y`, twice as much, by weights in the file `location` relative to the model's folder.

    The file is only written if its name stays in that folder; a location that does not is a hostile model.
    """
    node = helper.make_node("MatMul", ["x", "weights"], ["y"])
    shape = (BATCH, TABULAR_FEATURES)
    weights = np.eye(TABULAR_FEATURES, dtype=np.float32) * 2
    write(path, [node], [tensor("x", "FP32", shape)], [tensor("y", "FP32", shape)], {"weights": weights})
    model = onnx.load(path)
    content = model.graph.initializer[0].raw_data
    initializer = model.graph.initializer[0]
    initializer.ClearField("raw_data")
    initializer.data_location = TensorProto.EXTERNAL
    for key, value in (("location", location), ("offset", "0"), ("length", str(len(content)))):
        initializer.external_data.add(key=key, value=value)
    path.write_bytes(model.SerializeToString())
    if not Path(location).is_absolute() and ".." not in Path(location).parts:
        target = path.parent / location
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(content)
    return path


# Models that fail


def fallible(path: Path) -> Path:
    """`index` INT64 [batch, n] → `value` FP32 [batch, n, 2] of a table; fails at run time past its last row."""
    node = helper.make_node("Gather", ["table", "index"], ["value"])
    table = np.arange(TABLE_ROWS * 2, dtype=np.float32).reshape(TABLE_ROWS, 2)
    outputs = [tensor("value", "FP32", (BATCH, "n", 2))]
    return write(path, [node], [tensor("index", "INT64", (BATCH, "n"))], outputs, {"table": table})


def particular(path: Path) -> Path:
    """`x` FP32 [batch, n] → `y` FP32 [batch, 2]; it runs only where `n` is 7, and does not say so."""
    node = helper.make_node("MatMul", ["x", "weights"], ["y"])
    weights = np.ones((PARTICULAR_LENGTH, 2), np.float32)
    # A shape that is computed keeps the loader from seeing the contradiction.
    reshape = helper.make_node("Reshape", ["weights", "shape"], ["matrix"])
    node.input[1] = "matrix"
    constants = {"weights": weights, "shape": np.array([PARTICULAR_LENGTH, 2])}
    inputs, outputs = [tensor("x", "FP32", (BATCH, "n"))], [tensor("y", "FP32", (BATCH, 2))]
    return write(path, [reshape, node], inputs, outputs, constants)


def unknown_operator(path: Path) -> Path:
    """A standard operator that does not exist."""
    node = helper.make_node("Frobnicate", ["x"], ["y"])
    return write(path, [node], [tensor("x", "FP32", (BATCH, 4))], [tensor("y", "FP32", (BATCH, 4))])


def custom_domain(path: Path, domain: str = "com.example") -> Path:
    """An operator that needs a library of its own."""
    node = helper.make_node("Custom", ["x"], ["y"], domain=domain)
    inputs, outputs = [tensor("x", "FP32", (BATCH, 4))], [tensor("y", "FP32", (BATCH, 4))]
    return write(path, [node], inputs, outputs, opsets={domain: 1})


def truncated(path: Path, share: float = 0.5) -> Path:
    """The first part of `tabular`."""
    whole = tabular(path).read_bytes()
    path.write_bytes(whole[: int(len(whole) * share)])
    return path
