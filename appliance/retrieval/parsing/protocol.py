"""What `parser` and the process that takes text from files say to each other.

Each message is one frame: its length in 4 bytes, big-endian, then JSON. The child says `End` once when it is ready;
then for each `Job` any number of `Pieces` and one `End`.
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


def to_frame(message: Job | Pieces | End) -> bytes:
    """Return a message with its length before it.

    Raises:
        UnicodeEncodeError: A text has a lone surrogate.
    """
    body = msgspec.json.encode(message)
    return len(body).to_bytes(HEADER_BYTES, "big") + body
