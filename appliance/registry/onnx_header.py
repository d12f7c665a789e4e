"""Whether an ONNX file is sound, and what it takes and gives, before native code sees it.

The onnx package parses the file, without its data files; nothing is believed that native code would rely on. Whether
onnxruntime can run the model is seen when it is loaded; what could harm this process or reach other files is refused.

Sources: docs/IR.md of ONNX; onnx.proto.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from google.protobuf.message import DecodeError
from onnx import ModelProto, TensorProto, TensorShapeProto, ValueInfoProto

from appliance.core.errors import ModelFileError
from appliance.core.tensors import Datatype, ModelSignature, TensorSpec
from appliance.registry.files import open_regular, storage_errors
from appliance.registry.onnx_operators import check_operators, checked_text
from appliance.registry.onnx_tensors import read_tensors
from appliance.registry.onnx_wire import check_messages

MAX_GRAPH_BYTES = 2**31 - 1
"""What one protobuf message can have; larger models keep their weights in data files."""

MAX_IR_VERSION = 13
"""Newest version of the file format that onnxruntime 1.31 takes; a test asks the installed one."""

MIN_IR_VERSION = 3
"""Oldest version with versions of operators."""

MAX_TENSORS = 1024
MAX_NAME_CHARACTERS = 512
MAX_RANK = 64

DATATYPES: Mapping[int, Datatype] = {
    TensorProto.BOOL: Datatype.BOOL,
    TensorProto.UINT8: Datatype.UINT8,
    TensorProto.UINT16: Datatype.UINT16,
    TensorProto.UINT32: Datatype.UINT32,
    TensorProto.UINT64: Datatype.UINT64,
    TensorProto.INT8: Datatype.INT8,
    TensorProto.INT16: Datatype.INT16,
    TensorProto.INT32: Datatype.INT32,
    TensorProto.INT64: Datatype.INT64,
    TensorProto.FLOAT16: Datatype.FP16,
    TensorProto.BFLOAT16: Datatype.BF16,
    TensorProto.FLOAT: Datatype.FP32,
    TensorProto.DOUBLE: Datatype.FP64,
    TensorProto.STRING: Datatype.BYTES,
}
"""The protocol's words for ONNX's element types."""


@dataclass(frozen=True, slots=True)
class OnnxHeader:
    """What a sound ONNX file says of itself.

    Attributes:
        label: The type that most of its weights have, for example `int8`; "" for one without weights.
        external: Bytes that each data file must have at least, by its path beside the graph.
        licence: As its publisher wrote it, or "".
    """

    signature: ModelSignature
    label: str
    external: Mapping[str, int]
    licence: str


def read_onnx(path: Path) -> OnnxHeader:
    """Read an ONNX file, and check all of it but its data files.

    Raises:
        ModelFileError: It is no ONNX file, damaged, hostile, or of a kind that cannot be served.
        NotFoundError: There is no such file.
    """
    with _as_model_file_error():
        model = _parse(path)
        if not MIN_IR_VERSION <= model.ir_version <= MAX_IR_VERSION:
            raise ModelFileError(
                f"{path.name} has version {model.ir_version} of the ONNX format; {MIN_IR_VERSION} to {MAX_IR_VERSION} "
                "can be run.",
                advice="Check that it is an ONNX file, or export it again with a lower version.",
            )
        if not model.graph.node or not model.graph.output:
            raise ModelFileError(
                f"{path.name} is no ONNX model: it has {len(model.graph.node)} operators and "
                f"{len(model.graph.output)} outputs.",
                advice="It is damaged, or another kind of file.",
            )
        opset = check_operators(model)
        tensors = read_tensors(model)
        licences = [checked_text(each.value) for each in model.metadata_props if each.key in _LICENCE_KEYS]
        return OnnxHeader(_signature(model, opset), tensors.label, tensors.external, "".join(licences[:1]))


def check_external(header: OnnxHeader, files: Mapping[str, Path]) -> None:
    """Check that the data files are all there, and long enough.

    Args:
        header: Of the graph.
        files: Where each file is, by its path beside the graph.

    Raises:
        ModelFileError: One is missing or too short.
    """
    for location, due in header.external.items():
        if location not in files:
            raise ModelFileError(
                f"The ONNX model keeps data in {location!r:.100}, which is missing.",
                advice="Fetch that file too, and name the folder that holds both.",
            )
        with storage_errors(files[location]), open_regular(files[location]) as content:
            size = os.fstat(content.fileno()).st_size
        if size < due:
            raise ModelFileError(
                f"The ONNX model's data file {location!r:.100} has {size:,} bytes; {due:,} are due.",
                advice="It was cut off, or belongs to another model; fetch it again.",
            )


def _parse(path: Path) -> ModelProto:
    with storage_errors(path), open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size > MAX_GRAPH_BYTES:
            raise ModelFileError(
                f"{path.name} has {size:,} bytes; an ONNX file has at most {MAX_GRAPH_BYTES:,}.",
                advice="Save it with its weights in a data file: onnx.save(…, save_as_external_data=True).",
            )
        content = file.read(MAX_GRAPH_BYTES)
    check_messages(content)
    model: ModelProto = ModelProto.FromString(content)
    return model


@contextmanager
def _as_model_file_error() -> Iterator[None]:
    try:
        yield
    except (DecodeError, UnicodeError) as error:
        raise ModelFileError(
            f"The file is no ONNX model, or damaged: {error!s:.200}.",
            advice="Check where it comes from; fetch it again.",
        ) from error


def _signature(model: ModelProto, opset: int) -> ModelSignature:
    """Return what the graph takes and gives. Outputs that are no tensors are left out, as the engine does."""
    graph = model.graph
    stored = {each.name for each in graph.initializer} | {each.values.name for each in graph.sparse_initializer}
    asked = [each for each in graph.input if each.name not in stored]
    given = [each for each in graph.output if each.type.WhichOneof("value") == "tensor_type"]
    if max(len(asked), len(graph.output)) > MAX_TENSORS:
        raise ModelFileError(
            f"The ONNX model has {len(asked):,} inputs and {len(graph.output):,} outputs; {MAX_TENSORS:,} are taken."
        )
    if not given:
        raise ModelFileError(
            "The ONNX model has no output that is a tensor.",
            advice="Export it with tensors only; for scikit-learn models with the option zipmap=False.",
        )
    inputs = tuple(_spec(each, "input") for each in asked)
    outputs = tuple(_spec(each, "output") for each in given)
    for what, specs in (("inputs", inputs), ("outputs", outputs)):
        if len({each.name for each in specs}) != len(specs):
            raise ModelFileError(f"Two {what} of the ONNX model have one name.", advice="Export it again.")
    batched = len(given) == len(graph.output) and _is_batched(asked, given)
    return ModelSignature(inputs=inputs, outputs=outputs, batched=batched, opset=opset)


def _spec(value: ValueInfoProto, what: str) -> TensorSpec:
    if not 0 < len(checked_text(value.name)) <= MAX_NAME_CHARACTERS or not value.name.isprintable():
        raise ModelFileError(f"An {what} of the ONNX model has the name {value.name!r:.80}, which cannot be.")
    kind = value.type.WhichOneof("value")
    if kind != "tensor_type":
        raise ModelFileError(
            f"The {what} {value.name!r:.80} of the ONNX model is {_KINDS.get(kind or '', 'of no type')}; only tensors "
            "can be sent.",
            advice="Export it with tensors only; for scikit-learn models with the option zipmap=False.",
        )
    tensor = value.type.tensor_type
    datatype = DATATYPES.get(tensor.elem_type)
    if datatype is None:
        raise ModelFileError(
            f"The {what} {value.name!r:.80} of the ONNX model has the element type {tensor.elem_type}, which cannot be "
            "sent.",
            advice="Export it with inputs and outputs of a usual type, such as float32.",
        )
    if what == "input" and not tensor.HasField("shape"):
        raise ModelFileError(
            f"The input {value.name!r:.80} of the ONNX model has no shape, not even the number of its dimensions.",
            advice="Export it with the shapes of its inputs; dimensions may be free.",
        )
    if len(tensor.shape.dim) > MAX_RANK:
        raise ModelFileError(f"The {what} {value.name!r:.80} of the ONNX model has {len(tensor.shape.dim)} dimensions.")
    shape = tuple(_size(each) for each in tensor.shape.dim) if tensor.HasField("shape") else (-1,)
    return TensorSpec(value.name, datatype, shape)


_LICENCE_KEYS = ("license", "License", "licence", "Licence")

_KINDS = {
    "sequence_type": "a sequence",
    "map_type": "a map",
    "optional_type": "optional",
    "sparse_tensor_type": "a sparse tensor",
    "opaque_type": "opaque",
}


def _size(dimension: TensorShapeProto.Dimension) -> int:
    """Return a dimension, or -1 for a free one, which some exporters write as a negative number."""
    return dimension.dim_value if dimension.HasField("dim_value") and dimension.dim_value >= 0 else -1


def _is_batched(inputs: Sequence[ValueInfoProto], outputs: Sequence[ValueInfoProto]) -> bool:
    """Tell whether all have one free dimension in front, and none has it elsewhere; an output's may have lost its name.

    The engine judges by the same rule when it loads the model.
    """
    shapes = [[*each.type.tensor_type.shape.dim] for each in (*inputs, *outputs)]
    if not inputs or any(not shape or _size(shape[0]) >= 0 for shape in shapes):
        return False
    names = {shape[0].dim_param for shape in shapes[: len(inputs)]}
    return (
        len(names) == 1
        and {shape[0].dim_param for shape in shapes[len(inputs) :]} <= names | {""}
        and (names == {""} or not any(each.dim_param in names for shape in shapes for each in shape[1:]))
    )
