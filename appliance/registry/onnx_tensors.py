"""Whether the tensors stored in an ONNX model are there in full, in the file or in data files beside it.

The path of a data file comes from the model: it must stay in the model's folder. onnxruntime takes the path
`*/_ORT_MEM_ADDR_/*` for an address in memory, so an asterisk is refused.

Source: docs/ExternalData.md of ONNX; onnx.proto, message TensorProto.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from onnx import GraphProto, ModelProto, NodeProto, TensorProto

from appliance.core.errors import ModelFileError
from appliance.registry.onnx_operators import checked_text, nodes_of
from appliance.registry.roles import MAX_FILES, check_path_role

MAX_RANK = 64
MAX_ELEMENTS = 2**40

_BITS: Mapping[int, int] = {
    TensorProto.FLOAT: 32,
    TensorProto.UINT8: 8,
    TensorProto.INT8: 8,
    TensorProto.UINT16: 16,
    TensorProto.INT16: 16,
    TensorProto.INT32: 32,
    TensorProto.INT64: 64,
    TensorProto.BOOL: 8,
    TensorProto.FLOAT16: 16,
    TensorProto.DOUBLE: 64,
    TensorProto.UINT32: 32,
    TensorProto.UINT64: 64,
    TensorProto.COMPLEX64: 64,
    TensorProto.COMPLEX128: 128,
    TensorProto.BFLOAT16: 16,
    TensorProto.FLOAT8E4M3FN: 8,
    TensorProto.FLOAT8E4M3FNUZ: 8,
    TensorProto.FLOAT8E5M2: 8,
    TensorProto.FLOAT8E5M2FNUZ: 8,
    TensorProto.UINT4: 4,
    TensorProto.INT4: 4,
    TensorProto.FLOAT4E2M1: 4,
}
"""Bits of one element in `raw_data` and in data files."""

_LABELS: Mapping[int, str] = {
    TensorProto.FLOAT: "fp32",
    TensorProto.FLOAT16: "fp16",
    TensorProto.BFLOAT16: "bf16",
    TensorProto.DOUBLE: "fp64",
    TensorProto.UINT8: "int8",
    TensorProto.INT8: "int8",
    TensorProto.UINT4: "int4",
    TensorProto.INT4: "int4",
    TensorProto.FLOAT8E4M3FN: "fp8",
    TensorProto.FLOAT8E4M3FNUZ: "fp8",
    TensorProto.FLOAT8E5M2: "fp8",
    TensorProto.FLOAT8E5M2FNUZ: "fp8",
    TensorProto.FLOAT4E2M1: "fp4",
}

_FIELDS: Mapping[int, str] = {
    TensorProto.FLOAT: "float_data",
    TensorProto.DOUBLE: "double_data",
    TensorProto.INT64: "int64_data",
    TensorProto.UINT32: "uint64_data",
    TensorProto.UINT64: "uint64_data",
    TensorProto.INT32: "int32_data",
    TensorProto.INT16: "int32_data",
    TensorProto.UINT16: "int32_data",
    TensorProto.INT8: "int32_data",
    TensorProto.UINT8: "int32_data",
    TensorProto.BOOL: "int32_data",
    TensorProto.FLOAT16: "int32_data",
    TensorProto.BFLOAT16: "int32_data",
    TensorProto.STRING: "string_data",
}
"""Where the elements are that are not in `raw_data`, of types with one entry for each element."""


@dataclass(slots=True)
class StoredTensors:
    """What is known of a model's tensors.

    Attributes:
        external: Bytes that each data file must have at least, by its path beside the graph.
    """

    external: dict[str, int] = field(default_factory=dict)
    _bytes: Counter[str] = field(default_factory=Counter)

    @property
    def label(self) -> str:
        """Return the type that most of the weights' bytes have, for example `int8`, or "" without weights."""
        return self._bytes.most_common(1)[0][0] if self._bytes else ""

    def add(self, tensor: TensorProto) -> None:
        """Check and count a tensor.

        Raises:
            ModelFileError: Its shape, type, length or place cannot be.
        """
        elements = _elements(tensor)
        bits = _BITS.get(tensor.data_type)
        if bits is None and tensor.data_type != TensorProto.STRING:
            raise _bad(tensor, f"has the element type {tensor.data_type}, which is not known")
        if label := _LABELS.get(tensor.data_type):
            self._bytes[label] += elements * (bits or 0)
        if tensor.data_location == TensorProto.EXTERNAL:
            self._add_external(tensor, elements, bits)
        elif tensor.HasField("raw_data"):
            _check_raw(tensor, elements, bits)
        elif (name := _FIELDS.get(tensor.data_type)) and (found := len(getattr(tensor, name))) != elements:
            raise _bad(tensor, f"has {found:,} of {elements:,} elements")

    def _add_external(self, tensor: TensorProto, elements: int, bits: int | None) -> None:
        entries = {checked_text(each.key): checked_text(each.value) for each in tensor.external_data}
        if bits is None:
            raise _bad(tensor, "keeps texts in a data file, which cannot be")
        location = check_location(entries.get("location", ""))
        offset = _number(tensor, entries, "offset", 0)
        due = -(-elements * bits // 8)
        length = _number(tensor, entries, "length", due)
        if length != due:
            raise _bad(tensor, f"claims {length:,} bytes in a data file; its shape needs {due:,}")
        self.external[location] = max(self.external.get(location, 1), offset + length)
        if len(self.external) >= MAX_FILES:
            raise ModelFileError(f"The ONNX file has {MAX_FILES} data files or more; fewer are taken.")


def check_location(location: str) -> str:
    """Return the path of a data file, in its shortest form.

    Raises:
        ModelFileError: It is no plain path inside the model's folder.
    """
    path = location.removeprefix("./")
    refusal = ModelFileError(
        f"The ONNX file keeps data in {location!r:.100}, which is no plain path inside its folder.",
        advice="It was made to reach other files, or with paths of another machine; save it again beside its data.",
    )
    if "*" in path or ":" in path:
        raise refusal
    try:
        return check_path_role(path)
    except ModelFileError as error:
        raise refusal from error


def read_tensors(model: ModelProto) -> StoredTensors:
    """Check every tensor of a model: initializers and attributes, in all graphs and functions.

    Raises:
        ModelFileError: As `StoredTensors.add`.
    """
    found = StoredTensors()
    for tensor in _tensors(model):
        found.add(tensor)
    return found


def _tensors(model: ModelProto) -> Iterator[TensorProto]:
    yield from _initializers(model.graph)
    yield from _attributes(nodes_of(model.graph.node))
    for function in model.functions:
        yield from _attributes(nodes_of(function.node))


def _attributes(nodes: Iterable[NodeProto]) -> Iterator[TensorProto]:
    for node in nodes:
        for attribute in node.attribute:
            if attribute.HasField("t"):
                yield attribute.t
            yield from attribute.tensors
            sparse = [attribute.sparse_tensor] if attribute.HasField("sparse_tensor") else []
            for each in [*sparse, *attribute.sparse_tensors]:
                yield from (each.values, each.indices)
            for graph in [*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs]:
                yield from _initializers(graph)


def _initializers(graph: GraphProto) -> Iterator[TensorProto]:
    yield from graph.initializer
    for each in graph.sparse_initializer:
        yield from (each.values, each.indices)


def _elements(tensor: TensorProto) -> int:
    if len(tensor.dims) > MAX_RANK or any(each < 0 for each in tensor.dims):
        raise _bad(tensor, f"has the shape {list(tensor.dims)[:8]}, which cannot be")
    elements: int = math.prod(tensor.dims)
    if elements > MAX_ELEMENTS:
        raise _bad(tensor, f"claims {elements:.3g} elements")
    return elements


def _check_raw(tensor: TensorProto, elements: int, bits: int | None) -> None:
    due = -(-elements * (bits or 0) // 8)
    if bits is None or len(tensor.raw_data) != due:
        raise _bad(tensor, f"has {len(tensor.raw_data):,} bytes; its shape needs {due:,}")


def _number(tensor: TensorProto, entries: Mapping[str, str], name: str, default: int) -> int:
    text = entries.get(name, str(default))
    if not (text.isascii() and text.isdecimal() and len(text) <= 15):
        raise _bad(tensor, f"gives {text!r:.40} as the {name} of its data")
    return int(text)


def _bad(tensor: TensorProto, fault: str) -> ModelFileError:
    return ModelFileError(
        f"The ONNX file is damaged: the tensor {tensor.name!r:.80} {fault}.", advice="Fetch or export it again."
    )
