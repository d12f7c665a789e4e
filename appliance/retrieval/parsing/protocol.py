"""What `parser` and the process that takes text from files say to each other.

Each message is one frame: its length in 4 bytes, big-endian, then JSON. The child says `End` once when it is ready;
then for each `Job` any number of `Pieces` and one `End`, and for each `Look` any number of `Strip`s and one `End`.
"""

from __future__ import annotations

from typing import Literal

import msgspec

from appliance.retrieval.parsing.document import BlockKind

HEADER_BYTES = 4
PIECE_CHARACTERS = 64 * 1024
"""Longest piece of a block's text; a longer text comes in several."""
LARGEST_FRAME = 2**20
"""Bytes: pieces are sent when they have `PIECE_CHARACTERS` together, of up to 4 bytes each."""
STRIP_BYTES = 512 * 1024
"""Pixels that are sent together; they go as Base64."""
STRIDE, LONGEST_SIDE = 32, 1984
"""Sides of pictures, in pixels, are multiples of the one and at most the other."""
MOST_PICTURES = 8
"""Of one page."""


class Job(msgspec.Struct, frozen=True, tag=True):
    """Take the text from a file.

    Attributes:
        timeout_s: Seconds of CPU time after which the child ends itself.
        max_characters: Longest text.
    """

    path: str
    media_type: str
    timeout_s: float
    max_characters: int


class Look(msgspec.Struct, frozen=True, tag=True):
    """Show the pictures on a page, from 1.

    Attributes:
        timeout_s: Seconds of CPU time after which the child ends itself.
    """

    path: str
    media_type: str
    page: int
    timeout_s: float


class Strip(msgspec.Struct, frozen=True, tag=True):
    """The next rows of a picture's pixels, a byte each; another picture begins when all of one are there."""

    width: int
    height: int
    pixels: bytes


class Piece(msgspec.Struct, frozen=True, array_like=True):
    """A block, or a part of one; `more` says that the next piece belongs to it."""

    kind: BlockKind
    text: str
    page: int | None
    level: int
    more: bool


class Pieces(msgspec.Struct, frozen=True, tag=True):
    """Some of the text."""

    pieces: list[Piece]


class End(msgspec.Struct, frozen=True, tag=True):
    """How it went.

    Attributes:
        problem: None if it went well.
        message: The problem in words, as a sentence's end that begins after the file's name.
        advice: What to do about it.
        title: What the file calls itself.
        pages_without_text: Pages without a text layer.
    """

    problem: Literal["unsupported_file", "invalid_file"] | None = None
    message: str = ""
    advice: str = ""
    title: str = ""
    pages_without_text: list[int] = []


def to_frame(message: Job | Look | Pieces | Strip | End) -> bytes:
    """Return a message with its length before it.

    Raises:
        UnicodeEncodeError: A text has a lone surrogate.
    """
    body = msgspec.json.encode(message)
    return len(body).to_bytes(HEADER_BYTES, "big") + body
