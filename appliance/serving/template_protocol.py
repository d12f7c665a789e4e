"""What `prompts` and the process that renders chat templates say to each other.

Each message is one frame: its length in 4 bytes, big-endian, then JSON. The child says `Reply` once when it is
ready to compile, and once for each message it gets.
"""

from __future__ import annotations

from typing import Any, Literal

import msgspec

HEADER_BYTES = 4

Segment = tuple[str, bool]
"""A piece of a prompt, and whether control tokens may be read in it."""


class Compile(msgspec.Struct, frozen=True, tag=True):
    """Compile the template; said first, and once.

    Attributes:
        control_texts: Texts of the vocabulary's control tokens, which messages must not bring in.
        timeout_s: Seconds after which the parent gives up on a message.
        max_bytes: Largest rendered text, in UTF-8.
    """

    template: str
    bos_token: str
    eos_token: str
    control_texts: list[str]
    timeout_s: float
    max_bytes: int


class Render(msgspec.Struct, frozen=True, tag=True):
    """Render a conversation.

    Attributes:
        messages: As the template sees them.
        extra: Further variables for the template.
        protect: Keep control tokens in messages apart from the template's own.
    """

    messages: list[dict[str, Any]]
    add_generation_prompt: bool
    extra: dict[str, Any]
    protect: bool


class Reply(msgspec.Struct, frozen=True):
    """How it went.

    Attributes:
        problem: None if it went well; `refused` if the template itself raised an error on purpose; `forged` if a
            message holds control tokens that cannot be kept apart.
        message: The problem in words.
        segments: The rendered prompt, in pieces.
    """

    problem: Literal["refused", "failed", "too_large", "forged"] | None = None
    message: str = ""
    segments: list[Segment] = []


def to_frame(message: Compile | Render | Reply) -> bytes:
    """Return a message with its length before it.

    Raises:
        UnicodeEncodeError: A text has a lone surrogate.
    """
    body = msgspec.json.encode(message)
    return len(body).to_bytes(HEADER_BYTES, "big") + body
