"""Tensors as JSON: nested or flat row-major lists in, flat lists out. Pure; may run in a thread.

Lists of numbers are converted a piece at a time. Each piece is one call that holds the GIL, so a large tensor does not
keep the event loop waiting, and never exists as a list of Python objects as a whole. simdjson reads them straight into
an array; where it will not, msgspec says which element is wrong.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

import msgspec
import numpy as np
import simdjson
from msgspec import Meta
from numpy.typing import NDArray

from appliance.api.oip.datatypes import BINARY_ONLY, DTYPES, element_count, invalid, shown
from appliance.api.oip.float_text import float32_text
from appliance.core.errors import InvalidRequestError
from appliance.core.tensors import Datatype

PIECE_BYTES = 128 * 1024
"""Length of the text of one piece: its conversion takes about a millisecond."""

PIECE_ELEMENTS = 16_384
"""Elements that are written at once: they take about a millisecond too."""

READABLE_ELEMENTS = 1024
"""FP32 tensors with more elements are written in the way that is quicker, and not so nice to read."""

_WHITESPACE = b" \t\r\n"
_NOT_STRUCTURE = bytes(set(range(256)) - set(b"[],"))
_NESTED = re.compile(rb"\[[ \t\r\n]*\[")
_AT_INDEX = re.compile(r" - at `\$\[(\d+)\]`$")


def _number_type(datatype: Datatype) -> Any:
    if datatype is Datatype.BOOL:
        return bool
    if datatype in (Datatype.FP32, Datatype.FP64):
        return float
    limits = np.iinfo(DTYPES[datatype])
    most = None if datatype is Datatype.UINT64 else int(limits.max)  # msgspec's limits are 64-bit and signed
    return Annotated[int, Meta(ge=int(limits.min), le=most)]


_DECODERS: Mapping[Datatype, msgspec.json.Decoder[list[Any]]] = {
    datatype: msgspec.json.Decoder(list[_number_type(datatype)])  # type: ignore[misc]
    for datatype in Datatype
    if datatype not in (*BINARY_ONLY, Datatype.BYTES)
}


_WIDE: Mapping[str, tuple[Literal["d", "i", "u"], type[np.generic]]] = {
    "f": ("d", np.float64),
    "i": ("i", np.int64),
    "u": ("u", np.uint64),
}
"""What simdjson calls the widest type of each kind of numbers; booleans it cannot read."""


def array_from_json(text: bytes, datatype: Datatype, shape: Sequence[int], place: str) -> NDArray[Any]:
    """Return the array that a `data` field holds.

    Args:
        text: The field's value: well-formed JSON.
        datatype: What its elements must be.
        shape: Dimensions, none negative; nested lists must have exactly these.
        place: Which tensor, for the error.

    Raises:
        InvalidRequestError: The elements are of another kind or out of range, or are not as many as the shape says.
    """
    if datatype in BINARY_ONLY:
        raise invalid(
            f"{place}: {datatype} has no JSON.", "Send it as binary data: the parameter binary_data_size says how much."
        )
    count = element_count(shape, place)
    if not text.startswith(b"["):
        if shape:
            raise invalid(f"{place}: data must be a list.")
        text = b"[" + text + b"]"
    if count > len(text):  # each element takes a character and a comma or bracket
        raise invalid(f"{place}: a shape of {shown(shape)} has {count} elements, and data has fewer.")
    if datatype is Datatype.BYTES:
        return _strings(text, count, shape, place)
    return _numbers(text, datatype, count, shape, place)


def array_to_json(array: NDArray[Any], datatype: Datatype, place: str) -> bytes:
    """Return the flat list that stands for an array.

    Args:
        array: Of the datatype, in any shape.
        datatype: One that has a JSON form.
        place: Which tensor, for the error.

    Raises:
        InvalidRequestError: JSON cannot say it: a number is NaN or infinite, or a string is not UTF-8.
    """
    if datatype in BINARY_ONLY:
        raise no_json(place, f"{datatype} has no JSON")
    flat = array.reshape(-1)
    if datatype in (Datatype.FP32, Datatype.FP64) and not np.isfinite(flat).all():
        raise no_json(place, "JSON has no NaN and no infinity, and the tensor has")
    write = _string_piece if datatype is Datatype.BYTES else _number_piece
    if datatype is Datatype.FP32 and flat.size > READABLE_ELEMENTS:
        write = _float32_piece
    pieces = (write(flat[at : at + PIECE_ELEMENTS], place) for at in range(0, flat.size, PIECE_ELEMENTS))
    return b"[" + b",".join(pieces) + b"]"


def no_json(place: str, why: str) -> InvalidRequestError:
    """Return the error for an output that only binary data can carry."""
    return invalid(f"{place}: {why}.", "Ask for it as binary data: `binary_data` of the output, or binary_data_output.")


def _number_piece(flat: NDArray[Any], _: str) -> bytes:
    return msgspec.json.encode(flat.tolist())[1:-1]


def _float32_piece(flat: NDArray[Any], _: str) -> bytes:
    return float32_text(flat)


def _string_piece(flat: NDArray[Any], place: str) -> bytes:
    try:
        return msgspec.json.encode([each.decode() for each in flat.tolist()])[1:-1]
    except UnicodeDecodeError as error:
        raise no_json(place, "a string of it is not UTF-8") from error


def _numbers(text: bytes, datatype: Datatype, count: int, shape: Sequence[int], place: str) -> NDArray[Any]:
    flat, position, stop = text, 1, len(text) - 1
    if text.find(b"[", 1) >= 0:
        _check_nesting(text, shape, place)
        flat = text.translate(None, b"[]")
        position, stop = 0, len(flat)
    if count == 0 and not flat[position:stop].translate(None, _WHITESPACE + b","):
        position = stop
    array = np.empty(count, DTYPES[datatype])
    filled = 0
    while position < stop:
        end = flat.find(b",", position + PIECE_BYTES, stop)
        end = stop if end < 0 else end
        numbers = _piece(b"[" + flat[position:end] + b"]", array.dtype)
        if numbers is None:
            numbers = _checked_piece(flat[position:end], datatype, filled, place)
        if filled + len(numbers) > count:
            raise invalid(f"{place}: a shape of {shown(shape)} has {count} elements, and data has more.")
        array[filled : filled + len(numbers)] = numbers
        filled += len(numbers)
        position = end + 1
    if filled < count:
        raise invalid(f"{place}: a shape of {shown(shape)} has {count} elements, and data has {filled}.")
    return array.reshape(tuple(shape))


def _piece(text: bytes, dtype: np.dtype[Any]) -> NDArray[Any] | None:
    """Return the numbers of a flat list, or None where one is of another kind or does not fit."""
    if dtype.kind not in _WIDE:
        return None
    kind, widest = _WIDE[dtype.kind]
    try:
        numbers = simdjson.Parser().parse(text)
        assert isinstance(numbers, simdjson.Array)
        wide: NDArray[Any] = np.frombuffer(numbers.as_buffer(of_type=kind), widest)
    except (ValueError, TypeError):
        return None
    if dtype.itemsize == 8 or wide.size == 0:
        return wide
    if dtype.kind == "f":
        with np.errstate(over="ignore"):
            narrow = wide.astype(dtype)
        return narrow if np.isfinite(narrow).all() else None
    limits = np.iinfo(dtype)
    return wide if limits.min <= wide.min() and wide.max() <= limits.max else None


def _checked_piece(text: bytes, datatype: Datatype, before: int, place: str) -> NDArray[Any]:
    """Return the numbers of a flat list.

    Raises:
        InvalidRequestError: One is of another kind or does not fit; the message says which.
    """
    try:
        numbers = _DECODERS[datatype].decode(b"[" + text + b"]")
        with np.errstate(over="ignore"):
            array = np.array(numbers, DTYPES[datatype])
    except OverflowError as error:
        raise invalid(f"{place}: an element of data from {before} on is too large for {datatype}.") from error
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        problem = str(error)
        match = _AT_INDEX.search(problem)
        if match is None:
            raise invalid(f"{place}: data must be a list of {datatype} numbers.") from error
        raise invalid(
            f"{place}: element {before + int(match[1])} of data is no {datatype}: {_AT_INDEX.sub('', problem)}."
        ) from error
    finite = np.isfinite(array)
    if not finite.all():
        raise invalid(f"{place}: element {before + int(finite.argmin())} of data is too large for {datatype}.")
    return array


def _check_nesting(text: bytes, shape: Sequence[int], place: str) -> None:
    """See that lists are nested as the shape says. What is between brackets and commas is left to the decoder."""
    if text.translate(None, _NOT_STRUCTURE) != _structure(shape, len(text)):
        raise _badly_nested(shape, place)


def _badly_nested(shape: Sequence[int], place: str) -> InvalidRequestError:
    return invalid(
        f"{place}: the lists of data are not nested as the shape {shown(shape)} says.",
        "Send one flat list in row-major order, or lists in lists, one level for each dimension.",
    )


def _structure(shape: Sequence[int], longest: int) -> bytes:
    """Return the brackets and commas of nested lists, or nothing where they are longer than that."""
    inner = b""
    depth = list(shape).index(0) + 1 if 0 in shape else len(shape)  # an empty list has no lists in it
    for dimension in reversed(shape[:depth]):
        if (len(inner) + 1) * dimension > longest:
            return b""
        inner = b"[" + b",".join([inner] * dimension) + b"]"
    return inner


def _strings(text: bytes, count: int, shape: Sequence[int], place: str) -> NDArray[Any]:
    """Decode a list of strings, or lists in lists of them."""
    levels = len(shape) if _NESTED.match(text) else 1
    kind: Any = str
    for _ in range(levels):
        kind = list[kind]
    try:
        found = [msgspec.json.decode(text, type=kind)]
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise invalid(f"{place}: data is no list of strings of the shape {shown(shape)}: {error}.") from error
    for dimension in shape if levels > 1 else (count,):
        if any(len(each) != dimension for each in found):
            if levels > 1:
                raise _badly_nested(shape, place)
            raise invalid(f"{place}: a shape of {shown(shape)} has {count} elements, and data has {len(found[0])}.")
        found = [inner for each in found for inner in each]
    array = np.empty(count, np.object_)
    array[:] = [each.encode() for each in found]
    return array.reshape(tuple(shape))
