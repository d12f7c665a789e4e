"""How many messages an ONNX file has, counted before they are made.

An empty message takes two bytes in a file and 150 in memory, so a small file can fill the memory of a box. This walks
over the bytes, makes nothing of them, and refuses what no honest model has. It takes about a second for each million
fields; weights are one field each.

Source: the encoding of Protocol Buffers.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

from onnx import ModelProto

from appliance.core.errors import ModelFileError

MAX_MESSAGES = 2_000_000
MAX_FIELDS = 20_000_000
MAX_DEPTH = 100
"""As deep as protobuf itself goes."""

_VARINT, _EIGHT_BYTES, _LENGTH, _FOUR_BYTES = 0, 1, 2, 5
_MAX_VARINT_BYTES = 10
_BYTES = {_EIGHT_BYTES: 8, _FOUR_BYTES: 4}


def check_messages(content: bytes) -> None:
    """Count the messages and fields of a serialised model.

    Raises:
        ModelFileError: There are too many, they are nested too deeply, or the bytes are no messages.
    """
    kind = ModelProto.DESCRIPTOR
    place, end = 0, len(content)
    outer: list[tuple[int, Any]] = []
    messages = fields = 0
    while True:
        if place == end:
            if not outer:
                return
            end, kind = outer.pop()
            continue
        number, wire, place = _tag(content, place, end)
        fields += 1
        inner, stop = None, _skipped(content, place, end, wire)
        if wire == _LENGTH:
            length, place = _varint(content, place, end)
            inner, stop = _messages_of(kind).get(number), place + length
        if stop > end:
            raise _damaged("a field goes beyond its message")
        if inner is None:
            place = stop
        else:
            messages += 1
            outer.append((end, kind))
            end, kind = stop, inner
        _check_counts(messages, fields, len(outer))


def _check_counts(messages: int, fields: int, depth: int) -> None:
    if messages > MAX_MESSAGES or fields > MAX_FIELDS:
        raise ModelFileError(
            f"The ONNX file has more than {MAX_MESSAGES:,} messages or {MAX_FIELDS:,} fields; no honest model has.",
            advice="It may be made to fill the memory. Do not use it before you know why.",
        )
    if depth > MAX_DEPTH:
        raise _damaged(f"its messages are nested more than {MAX_DEPTH} deep")


def _tag(content: bytes, place: int, end: int) -> tuple[int, int, int]:
    tag, place = _varint(content, place, end)
    return tag >> 3, tag & 7, place


def _skipped(content: bytes, place: int, end: int, wire: int) -> int:
    """Return where a field ends that is no length-delimited one."""
    if wire == _VARINT:
        return _varint(content, place, end)[1]
    if wire == _LENGTH:
        return place
    if wire not in _BYTES:
        raise _damaged(f"a field has the wire type {wire}")
    return place + _BYTES[wire]


def _varint(content: bytes, place: int, end: int) -> tuple[int, int]:
    """Return a number of variable length, and where it ends."""
    value = 0
    for index, byte in enumerate(content[place : min(end, place + _MAX_VARINT_BYTES)]):
        value |= (byte & 0x7F) << 7 * index
        if byte < 0x80:
            return value, place + index + 1
    raise _damaged("a number has no end")


@functools.cache
def _messages_of(kind: Any) -> Mapping[int, Any]:
    """Return the fields of a message that are messages themselves, by their numbers."""
    return {each.number: each.message_type for each in kind.fields if each.message_type is not None}


def _damaged(fault: str) -> ModelFileError:
    return ModelFileError(f"The file is no ONNX model, or damaged: {fault}.", advice="Fetch it again.")
