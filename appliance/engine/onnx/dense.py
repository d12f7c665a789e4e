"""The dense layer that some encoders have behind their pooling, with its weights in a safetensors file.

Weights in a `pytorch_model.bin` are refused: that is a pickle, and reading it runs what it says.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from appliance.core.errors import ModelFileError
from appliance.engine.onnx.pooling import Floats

LARGEST_FILE = 256 * 2**20
LARGEST_HEADER = 2**20
_DTYPES: dict[str, np.dtype[Any]] = {"F32": np.dtype("<f4"), "F16": np.dtype("<f2")}


def _same(vectors: Floats) -> Floats:
    return vectors


_ACTIVATIONS: dict[str, Callable[[Floats], Floats]] = {"Tanh": np.tanh, "Identity": _same}


class _Config(msgspec.Struct):
    in_features: int
    out_features: int
    bias: bool = True
    activation_function: str = "torch.nn.modules.activation.Tanh"


class _Entry(msgspec.Struct):
    """A tensor in the header of a safetensors file."""

    dtype: str
    shape: list[int]
    data_offsets: tuple[int, int]


@dataclass(frozen=True, slots=True, eq=False)
class Dense:
    """A layer.

    Attributes:
        weight: Shape (outputs, inputs).
        bias: Shape (outputs,).
    """

    weight: Floats
    bias: Floats
    activation: Callable[[Floats], Floats]

    def __call__(self, vectors: Floats) -> Floats:
        """Return the vectors behind the layer, shape (texts, outputs)."""
        return self.activation(np.einsum("ni,oi->no", vectors, self.weight) + self.bias)


def read_dense(folder: Path) -> Dense:
    """Read the layer's `config.json` and `model.safetensors`.

    Raises:
        ModelFileError: One is missing, damaged, or not of the size that the other says.
    """
    try:
        config = msgspec.json.decode(_bytes(folder / "config.json", LARGEST_HEADER), type=_Config)
        tensors = _tensors(_bytes(folder / "model.safetensors", LARGEST_FILE))
    except FileNotFoundError as error:
        raise ModelFileError(
            f"The model has a dense layer whose {Path(error.filename).name} is not there.",
            advice="Add the layer's config.json and model.safetensors, or export it in the graph.",
        ) from error
    except OSError as error:
        raise ModelFileError(f"The files of the model's dense layer cannot be read: {error.strerror}.") from error
    except (msgspec.DecodeError, RecursionError) as error:
        raise ModelFileError(f"The files of the model's dense layer cannot be used: {error}.") from error
    shape = (config.out_features, config.in_features)
    weight = tensors.get("linear.weight")
    bias = tensors.get("linear.bias") if config.bias else np.zeros(max(0, config.out_features), np.float32)
    if weight is None or bias is None or weight.shape != shape or bias.shape != shape[:1]:
        raise ModelFileError(f"The model's dense layer has no weights of shape {list(shape)}.")
    activation = _ACTIVATIONS.get(config.activation_function.rpartition(".")[2])
    if activation is None:
        raise ModelFileError(
            f"The model's dense layer has the activation {config.activation_function!r}; "
            f"known are {', '.join(_ACTIVATIONS)}."
        )
    return Dense(weight, bias, activation)


def _bytes(path: Path, largest: int) -> bytes:
    size = path.stat().st_size
    if size > largest:
        raise ModelFileError(f"The {path.name} of the model's dense layer has {size} bytes; {largest} are allowed.")
    return path.read_bytes()


def _tensors(content: bytes) -> dict[str, Floats]:
    """Return the tensors of a safetensors file: the length of a JSON header in 8 bytes, the header, the numbers."""
    length = int.from_bytes(content[:8], "little")
    if length > min(LARGEST_HEADER, len(content) - 8):
        raise ModelFileError(f"The safetensors file of the model's dense layer announces a header of {length} bytes.")
    header: dict[str, Any] = msgspec.json.decode(content[8 : 8 + length], type=dict[str, Any])
    body = memoryview(content)[8 + length :]
    return {
        name: _tensor(msgspec.convert(entry, _Entry), body) for name, entry in header.items() if name != "__metadata__"
    }


def _tensor(entry: _Entry, body: memoryview) -> Floats:
    dtype, (start, end) = _DTYPES.get(entry.dtype), entry.data_offsets
    if dtype is None:
        raise ModelFileError(f"The model's dense layer has weights of type {entry.dtype}; known: {', '.join(_DTYPES)}.")
    whole = 0 <= start <= end <= len(body) and min(entry.shape, default=1) >= 0
    if not whole or math.prod(entry.shape) * dtype.itemsize != end - start:
        raise ModelFileError("The safetensors file of the model's dense layer is damaged.")
    result: Floats = np.frombuffer(body[start:end], dtype).reshape(entry.shape).astype(np.float32)
    return result
