"""The protocol's datatypes in NumPy's terms, and the arithmetic of shapes. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import ml_dtypes
import numpy as np

from appliance.core.errors import InvalidRequestError
from appliance.core.tensors import Datatype

MOST_DIMENSIONS = 32
"""So many NumPy has had at all times; ONNX models have a handful."""

MOST_ELEMENTS = 2**63 - 1
"""What the protocol's 64-bit sizes can count."""

DTYPES: Mapping[Datatype, np.dtype[Any]] = {
    Datatype.BOOL: np.dtype(np.bool_),
    Datatype.UINT8: np.dtype(np.uint8),
    Datatype.UINT16: np.dtype(np.uint16),
    Datatype.UINT32: np.dtype(np.uint32),
    Datatype.UINT64: np.dtype(np.uint64),
    Datatype.INT8: np.dtype(np.int8),
    Datatype.INT16: np.dtype(np.int16),
    Datatype.INT32: np.dtype(np.int32),
    Datatype.INT64: np.dtype(np.int64),
    Datatype.FP16: np.dtype(np.float16),
    Datatype.BF16: np.dtype(ml_dtypes.bfloat16),
    Datatype.FP32: np.dtype(np.float32),
    Datatype.FP64: np.dtype(np.float64),
    Datatype.BYTES: np.dtype(np.object_),
}

BINARY_ONLY = frozenset({Datatype.FP16, Datatype.BF16})
"""Datatypes for which the protocol has no JSON."""


def element_count(shape: Sequence[int], place: str) -> int:
    """Return how many elements a tensor of a shape has.

    Args:
        shape: Dimensions, none negative.
        place: Which tensor, for the error.

    Raises:
        InvalidRequestError: There are too many dimensions, or more elements than can be counted in 63 bits.
    """
    if len(shape) > MOST_DIMENSIONS:
        raise invalid(f"{place}: the shape has {len(shape)} dimensions; {MOST_DIMENSIONS} are allowed.")
    count = 1
    for dimension in shape:
        count *= dimension
    if count > MOST_ELEMENTS:
        raise invalid(f"{place}: a shape of {shown(shape)} has more elements than can be counted in 63 bits.")
    return count


def shown(shape: Sequence[int]) -> str:
    """Return a shape as in JSON."""
    return f"[{', '.join(map(str, shape))}]"


def invalid(message: str, advice: str = "") -> InvalidRequestError:
    """Return the error for a tensor or parameter that will not do."""
    return InvalidRequestError(message, advice=advice, code="invalid_value")
