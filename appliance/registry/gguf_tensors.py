"""Where the tensors of a GGUF file are, and whether that can be. Trusts no count, length or offset, as its callers."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace

from appliance.core.errors import ModelFileError
from appliance.registry.ggml_types import TENSOR_TYPES
from appliance.registry.gguf_values import ValueReader, damaged

MAX_TENSOR_NAME_BYTES = 63
MAX_DIMENSIONS = 4
MAX_ELEMENTS = 2**63 - 1


@dataclass(frozen=True, slots=True)
class TensorPlace:
    """One tensor of a sound file: its type, its shape (innermost dimension first), and where its bytes are."""

    type_name: str
    dimensions: tuple[int, ...]
    offset: int
    size: int

    @property
    def elements(self) -> int:
        """Return the number of elements."""
        return math.prod(self.dimensions)


def read_tensors(reader: ValueReader, count: int, alignment: int) -> dict[str, TensorPlace]:
    """Check every tensor's place and return them by name."""
    tensors: dict[str, TensorPlace] = {}
    data_end = 0
    for index in range(count):
        name = reader.string(f"the name of tensor {index}", MAX_TENSOR_NAME_BYTES)
        if name in tensors:
            raise damaged(f"tensor {name!r} is there twice")
        type_name, dimensions, tensor_bytes = _read_shape(reader, f"tensor {name!r}")
        offset = reader.unsigned(f"the offset of tensor {name!r}")
        if offset != data_end:
            raise damaged(f"tensor {name!r} is at byte {offset:,} of the data instead of {data_end:,}")
        last_end, data_end = offset + tensor_bytes, _aligned(offset + tensor_bytes, alignment)
        tensors[name] = TensorPlace(type_name, dimensions, offset, tensor_bytes)
    data_start = _aligned(reader.position, alignment)
    file_end = data_start + last_end
    if file_end > reader.position + reader.remaining:
        raise damaged(
            f"its tensors reach to byte {file_end:,}, and the file ends at byte {reader.position + reader.remaining:,}"
        )
    return {name: replace(each, offset=data_start + each.offset) for name, each in tensors.items()}


def _read_shape(reader: ValueReader, what: str) -> tuple[str, tuple[int, ...], int]:
    """Return a tensor's type, its dimensions and its size in bytes."""
    dimension_count = reader.unsigned(what, wide=False)
    if dimension_count > MAX_DIMENSIONS:
        raise damaged(f"{what} claims {dimension_count:,} dimensions; at most {MAX_DIMENSIONS} can be")
    dimensions = [reader.unsigned(what) for _ in range(dimension_count)] or [1]
    elements = 1
    for length in dimensions:
        elements *= length
    if not 1 <= elements <= MAX_ELEMENTS:
        raise damaged(f"{what} claims the shape {dimensions}")
    type_number = reader.unsigned(what, wide=False)
    kind = TENSOR_TYPES.get(type_number)
    if kind is None:
        raise ModelFileError(
            f"The model file's {what} has the type {type_number}, which this llama.cpp does not know.",
            advice="Use another quantisation of the model, or a newer version of this program.",
        )
    if dimensions[0] % kind.block_elements:
        raise damaged(
            f"{what} has rows of {dimensions[0]} elements, no multiple of {kind.name}'s {kind.block_elements}"
        )
    return kind.name, tuple(dimensions), elements // kind.block_elements * kind.block_bytes


def _aligned(position: int, alignment: int) -> int:
    return -(-position // alignment) * alignment


def dominant_type_of(tensors: Mapping[str, TensorPlace]) -> str:
    """Return the type that holds most elements."""
    elements_of_type: Counter[str] = Counter()
    for each in tensors.values():
        elements_of_type[each.type_name] += each.elements
    return elements_of_type.most_common(1)[0][0]
