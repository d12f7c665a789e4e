"""Bounded reading of the values that a GGUF header is made of.

The file is hostile until proven otherwise: no count or length in it is believed before it is compared with what is left
of the file and with a limit of ours, and nothing that is not wanted is kept. Memory stays at one window of the file
whatever the header claims; time is bounded by `MAX_HEADER_BYTES` and `MAX_STRINGS_IN_ARRAYS`.

Source of the format: docs/gguf.md of ggml.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import BinaryIO

from appliance.core.errors import ModelFileError

MAX_HEADER_BYTES = 256 * 1024 * 1024
"""A vocabulary of 256,000 tokens with its merges takes about 10 MB; llama.cpp holds all of the header in memory."""

MAX_STRING_BYTES = 1024 * 1024
MAX_STRINGS_IN_ARRAYS = 8 * 1024 * 1024

_WINDOW_BYTES = 1024 * 1024
_LENGTH = struct.Struct("<Q")

FLOAT32, STRING, ARRAY = 6, 8, 9
SCALARS: dict[int, struct.Struct] = {
    0: struct.Struct("<B"),
    1: struct.Struct("<b"),
    2: struct.Struct("<H"),
    3: struct.Struct("<h"),
    4: struct.Struct("<I"),
    5: struct.Struct("<i"),
    6: struct.Struct("<f"),
    7: struct.Struct("<?"),
    10: struct.Struct("<Q"),
    11: struct.Struct("<q"),
    12: struct.Struct("<d"),
}
"""Value type to its layout; `STRING` and `ARRAY` are the other two. `FLOAT32` is among them."""


@dataclass(frozen=True, slots=True)
class ArrayOf:
    """An array that was checked and skipped, not read."""

    element_type: int
    count: int


Value = int | float | bool | str | ArrayOf


def damaged(what: str) -> ModelFileError:
    """Return the error for a file that is cut off or altered; `what` completes "The model file is damaged: "."""
    return ModelFileError(
        f"The model file is damaged: {what}.",
        advice="Fetch it again from its source; if the same happens there, the file was published broken.",
    )


class ValueReader:
    """Reads values from the start of a file, forwards only. Raises ModelFileError, never anything else."""

    def __init__(self, file: BinaryIO, size: int) -> None:
        """Read from `file`, which stands at its start and is `size` bytes long."""
        self._file = file
        self._size = size
        self._window = b""
        self._window_start = 0
        self._at = 0
        self._strings_left = MAX_STRINGS_IN_ARRAYS

    @property
    def position(self) -> int:
        """Return how many bytes of the file have been passed."""
        return self._window_start + self._at

    @property
    def remaining(self) -> int:
        """Return how many bytes of the file are left."""
        return self._size - self.position

    def take(self, count: int, what: str) -> bytes:
        """Return the next `count` bytes, at most `MAX_STRING_BYTES`."""
        self._require(count, what)
        if count > len(self._window) - self._at:
            self._fill(count, what)
        start, self._at = self._at, self._at + count
        return self._window[start : self._at]

    def scalar(self, kind: int, what: str) -> int | float | bool:
        """Return the next number or truth value of the type `kind`, a key of `SCALARS`."""
        layout = SCALARS[kind]
        (value,) = layout.unpack(self.take(layout.size, what))
        return value  # type: ignore[no-any-return]

    def unsigned(self, what: str, *, wide: bool = True) -> int:
        """Return the next unsigned integer, of 64 bits if `wide` and else of 32."""
        return int(self.scalar(10 if wide else 4, what))

    def string(self, what: str, limit: int = MAX_STRING_BYTES) -> str:
        """Return the next length-prefixed UTF-8 string, of at most `limit` bytes."""
        length = self.unsigned(what)
        if length > limit:
            raise damaged(f"{what} claims {length:,} bytes, more than the {limit:,} allowed")
        try:
            return self.take(length, what).decode()
        except UnicodeDecodeError as error:
            raise damaged(f"{what} is not valid UTF-8") from error

    def value(self, kind: int, what: str, *, keep_text: bool) -> Value:
        """Return the next value, of the type `kind`. An array is checked and skipped; so is a text not kept."""
        if kind == STRING and keep_text:
            return self.string(what)
        if kind == STRING:
            self._skip(self.unsigned(what), what)
            return ""
        if kind == ARRAY:
            return self._array(what)
        if kind not in SCALARS:
            raise damaged(f"{what} has the unknown type {kind}")
        return self.scalar(kind, what)

    def _array(self, what: str) -> ArrayOf:
        kind = self.unsigned(what, wide=False)
        count = self.unsigned(what)
        if kind == STRING:
            self._skip_strings(count, what)
        elif kind in SCALARS:
            self._skip(count * SCALARS[kind].size, what)
        else:
            raise damaged(f"{what} is an array of the type {kind}, which llama.cpp cannot read")
        return ArrayOf(kind, count)

    def _skip_strings(self, count: int, what: str) -> None:
        """Pass `count` strings. Written for speed: a vocabulary has hundreds of thousands."""
        self._require(count * _LENGTH.size, what)
        if count > self._strings_left:
            raise damaged(f"{what} claims {count:,} texts, more than the {MAX_STRINGS_IN_ARRAYS:,} allowed")
        self._strings_left -= count
        read_length = _LENGTH.unpack_from
        while count:
            window, at = self._window, self._at
            last = len(window) - _LENGTH.size
            while count and at <= last:
                at += 8 + read_length(window, at)[0]
                count -= 1
            self._skip(at - self._at, what)
            if count:
                self._require(_LENGTH.size, what)
                self._fill(_LENGTH.size, what)

    def _skip(self, count: int, what: str) -> None:
        self._require(count, what)
        if self._at + count <= len(self._window):
            self._at += count
        else:
            self._window_start = self.position + count
            self._window, self._at = b"", 0
            self._file.seek(self._window_start)

    def _require(self, count: int, what: str) -> None:
        """Refuse to go past the end of the file or of what a header may take."""
        if count > self.remaining:
            raise damaged(
                f"{what} needs {count:,} bytes at byte {self.position:,}, and the file ends at byte {self._size:,}"
            )
        if self.position + count > MAX_HEADER_BYTES:
            raise damaged(f"its header is over {MAX_HEADER_BYTES:,} bytes at {what}")

    def _fill(self, count: int, what: str) -> None:
        """Slide the window to the position and make it hold at least `count` bytes."""
        rest = self._window[self._at :]
        self._window_start, self._at = self.position, 0
        self._window = rest + self._file.read(max(_WINDOW_BYTES, count) - len(rest))
        if count > len(self._window):
            raise damaged(f"the file was cut off while it was read, at {what}")
