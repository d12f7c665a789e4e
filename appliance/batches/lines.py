"""The lines of a batch: cut from the pieces of a file, read, checked against each other, tried again. Pure."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from appliance.core.batches import BatchEndpoint, BatchError

MOST_ERRORS = 100
"""Of a file, as many are told; one who has more has another mistake."""

MOST_INTERRUPTIONS = 4
"""A line during which the process ended so often may be what ends it."""

MOST_TRIES = 8
"""Of a line that is told to come again later; the pauses add up to four minutes."""

_LONGEST_PAUSE_S = 60.0
_LATER = frozenset((429, 503))
"""Statuses that pass."""


@dataclass(frozen=True, slots=True)
class Line:
    """A line that is not blank; `data` is None where it is too long, `number` counts from 1."""

    number: int
    data: bytes | None


class LineCutter:
    """Cuts the pieces of a file into lines, and never holds more than the longest line that is taken."""

    def __init__(self, most_bytes: int) -> None:
        """Take lines of up to `most_bytes`."""
        self._most_bytes = most_bytes
        self._rest = b""
        self._too_long = False
        self._number = 1

    def feed(self, piece: bytes) -> Iterator[Line]:
        """Yield the lines that a piece ends."""
        *ended, last = piece.split(b"\n")
        for part in ended:
            self._append(part)
            yield from self._end()
        self._append(last)

    def close(self) -> Iterator[Line]:
        """Yield the last line, if nothing ended it."""
        yield from self._end()

    def _append(self, part: bytes) -> None:
        self._too_long = self._too_long or len(self._rest) + len(part) > self._most_bytes
        self._rest = b"" if self._too_long else self._rest + part

    def _end(self) -> Iterator[Line]:
        number, data, too_long = self._number, self._rest.strip(), self._too_long
        self._number, self._rest, self._too_long = number + 1, b"", False
        if too_long:
            yield Line(number, None)
        elif data:
            yield Line(number, data)


class RequestLine(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A line as it is uploaded."""

    custom_id: Annotated[str, Meta(min_length=1, max_length=512)]
    method: Literal["POST"]
    url: str
    body: msgspec.Raw


_DECODER = msgspec.json.Decoder(RequestLine)


def read_line(line: Line, endpoint: BatchEndpoint, most_bytes: int) -> RequestLine | BatchError:
    """Return what a line asks for, or what is wrong with it; its body is checked when it is answered."""
    number = line.number
    if line.data is None:
        return BatchError("line_too_long", f"The line has more than {most_bytes} bytes.", number)
    try:
        request = _DECODER.decode(line.data)
        request.custom_id.encode()
    except msgspec.ValidationError as error:
        return BatchError("invalid_request_line", f"The line is no request: {error}.", number, _param(error))
    except (msgspec.DecodeError, UnicodeError, RecursionError) as error:
        return BatchError("invalid_json_line", f"The line is not valid JSON: {error}.", number)
    if request.url != endpoint:
        message = f"The url is {request.url[:100]!r}; all lines must name the batch's endpoint, {endpoint}."
        return BatchError("mismatched_url", message, number, "url")
    if bytes(request.body)[:1] != b"{":
        return BatchError("invalid_request_line", "The body must be a JSON object.", number, "body")
    return request


class Check:
    """Looks through all lines of a file before the first is answered."""

    def __init__(self, endpoint: BatchEndpoint, *, most_lines: int, most_bytes: int) -> None:
        """Take up to `most_lines` of up to `most_bytes` each."""
        self.total = 0
        self.errors: list[BatchError] = []
        self._endpoint: BatchEndpoint = endpoint
        self._most_lines = most_lines
        self._most_bytes = most_bytes
        self._cutter = LineCutter(most_bytes)
        self._seen: set[bytes] = set()

    @property
    def hopeless(self) -> bool:
        """Whether nothing that follows can matter."""
        return self.total > self._most_lines or len(self.errors) >= MOST_ERRORS

    def feed(self, piece: bytes) -> None:
        """Look at the lines that a piece ends."""
        for line in self._cutter.feed(piece):
            self._look_at(line)

    def close(self) -> None:
        """Look at the last line, and at the file as a whole."""
        for line in self._cutter.close():
            self._look_at(line)
        if not self.total:
            self.errors.append(BatchError("empty_batch", "The file has no lines."))

    def _look_at(self, line: Line) -> None:
        if self.hopeless:
            return
        self.total += 1
        if self.total > self._most_lines:
            message = f"The file has more than {self._most_lines} lines. Split it, or raise `max_batch_lines`."
            self.errors.append(BatchError("too_many_lines", message, line.number))
            return
        read = read_line(line, self._endpoint, self._most_bytes)
        if isinstance(read, BatchError):
            self.errors.append(read)
            return
        digest = hashlib.blake2b(read.custom_id.encode(), digest_size=16).digest()
        if digest in self._seen:
            message = f"Another line has the custom_id {read.custom_id[:100]!r} already."
            self.errors.append(BatchError("duplicate_custom_id", message, line.number, "custom_id"))
        self._seen.add(digest)


def pause_before_retry(status: int, tries: int, retry_after_s: float | None) -> float | None:
    """Return how long to wait before a line is tried again, or None if its answer stands.

    Args:
        status: Of the answer.
        tries: How often it was tried.
        retry_after_s: What the answer asks for.
    """
    if status not in _LATER or tries >= MOST_TRIES:
        return None
    least = retry_after_s if retry_after_s is not None and math.isfinite(retry_after_s) else 0.0
    return min(max(least, 2.0 ** (tries - 1)), _LONGEST_PAUSE_S)


def answered_line(identity: str, custom_id: str, status: int, request_id: str, body: bytes) -> bytes:
    """Return the line that an answer becomes."""
    response = {"status_code": status, "request_id": request_id, "body": msgspec.Raw(body)}
    return _line(identity, custom_id, response, None)


def failed_line(identity: str, custom_id: str, code: str, message: str) -> bytes:
    """Return the line for a request that has no answer."""
    return _line(identity, custom_id, None, {"code": code, "message": message})


def _line(identity: str, custom_id: str, response: object, error: object) -> bytes:
    return msgspec.json.encode({"id": identity, "custom_id": custom_id, "response": response, "error": error}) + b"\n"


def _param(error: msgspec.ValidationError) -> str | None:
    """Return the field that the message names: `… - at `$.custom_id``, or missing `custom_id`."""
    names = [name for name in RequestLine.__struct_fields__ if f"`{name}`" in str(error) or f"`$.{name}`" in str(error)]
    return names[0] if names else None
