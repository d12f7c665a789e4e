"""Tensors as bytes: little-endian, row-major, without padding; the binary tensor data extension. Pure.

https://docs.nvidia.com/deeplearning/triton-inference-server/user-guide/docs/protocol/extension_binary_data.html
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from appliance.api.oip.datatypes import DTYPES, element_count, invalid, shown
from appliance.core.tensors import Datatype

_LENGTH = struct.Struct("<I")


def array_from_bytes(data: memoryview, datatype: Datatype, shape: Sequence[int], place: str) -> NDArray[Any]:
    """Return the array that bytes stand for: a view of them, where the datatype and their place in memory allow it.

    Args:
        data: All of the tensor.
        datatype: What its elements are.
        shape: Dimensions, none negative.
        place: Which tensor, for the error.

    Raises:
        InvalidRequestError: The bytes are not as many as the shape says, or are no booleans or no strings.
    """
    count = element_count(shape, place)
    if datatype is Datatype.BYTES:
        return _strings(data, count, shape, place)
    dtype = DTYPES[datatype]
    if len(data) != count * dtype.itemsize:
        raise invalid(
            f"{place}: a shape of {shown(shape)} with {datatype} takes {count * dtype.itemsize} bytes, "
            f"and binary_data_size is {len(data)}."
        )
    if datatype is Datatype.BOOL:
        flags = np.frombuffer(data, np.uint8)
        if flags.size and flags.max() > 1:
            raise invalid(f"{place}: byte {int((flags > 1).argmax())} is neither 0 nor 1, so it is no BOOL.")
    array = np.frombuffer(data, dtype).reshape(tuple(shape))
    return array if array.flags.aligned else array.copy()


def array_to_bytes(array: NDArray[Any], datatype: Datatype) -> memoryview:
    """Return the bytes of an array: its own memory if it is row-major there, and not of strings."""
    if datatype is Datatype.BYTES:
        parts: list[bytes] = []
        for each in array.reshape(-1).tolist():
            parts += (_LENGTH.pack(len(each)), each)
        return memoryview(b"".join(parts))
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8).data


def _strings(data: memoryview, count: int, shape: Sequence[int], place: str) -> NDArray[Any]:
    """Read strings with their lengths before them."""
    wanted = f"{place}: a shape of {shown(shape)} has {count} strings, each 4 bytes of length and then its bytes"
    size = len(data)
    if count * _LENGTH.size > size:
        raise invalid(f"{wanted}; binary_data_size is {size}.")
    found: list[bytes] = []
    at = 0
    while at < size and len(found) < count:
        begin = at + _LENGTH.size
        if begin > size:
            break
        at = begin + _LENGTH.unpack_from(data, at)[0]
        if at > size:
            break
        found.append(bytes(data[begin:at]))
    if at != size or len(found) != count:
        raise invalid(f"{wanted}; string {len(found)} does not end with the {size} bytes of binary_data_size.")
    array = np.empty(count, np.object_)
    array[:] = found
    return array.reshape(tuple(shape))
