"""Log probabilities in OpenAI's two forms: the chat one, and the older one of text completions."""

from __future__ import annotations

import codecs
import math
from collections.abc import Sequence

import msgspec

from appliance.core.types import TokenLogprob

SMALLEST_LOGPROB = -9999.0
"""Stands for minus infinity, which JSON cannot say; OpenAI uses the same value."""


class TopLogprob(msgspec.Struct, frozen=True):
    """One of the likeliest tokens at a place."""

    token: str
    logprob: float
    bytes: list[int]


class ContentLogprob(msgspec.Struct, frozen=True):
    """One token of the answer. `bytes` are exact where `token` cannot be, since a character may span tokens."""

    token: str
    logprob: float
    bytes: list[int]
    top_logprobs: list[TopLogprob]


class ChatLogprobs(msgspec.Struct, frozen=True):
    """Log probabilities of a chat choice."""

    content: list[ContentLogprob]
    refusal: None = None


class TextLogprobs(msgspec.Struct):
    """Log probabilities of a text completion, as parallel lists; `text_offset` counts characters of the choice."""

    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]]
    text_offset: list[int]


def chat_logprobs(logprobs: Sequence[TokenLogprob]) -> list[ContentLogprob]:
    """Return the chat form."""
    return [
        ContentLogprob(
            token=_text(each.piece),
            logprob=_finite(each.logprob),
            bytes=list(each.piece),
            top_logprobs=[TopLogprob(_text(piece), _finite(value), list(piece)) for _, piece, value in each.top],
        )
        for each in logprobs
    ]


class TextOffsets:
    """Counts the characters of one choice, token by token; a token within a character starts where that does."""

    def __init__(self, start: int) -> None:
        """Begin behind `start` characters, those of an echoed prompt."""
        self._offset = start
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def next(self, piece: bytes) -> int:
        """Return where the token starts, and go on behind it."""
        offset = self._offset
        self._offset += len(self._decoder.decode(piece))
        return offset


def text_logprobs(logprobs: Sequence[TokenLogprob], offsets: TextOffsets) -> TextLogprobs:
    """Return the older form; the chosen token is among the top ones, as OpenAI has it."""
    return TextLogprobs(
        tokens=[_name(each.piece) for each in logprobs],
        token_logprobs=[_finite(each.logprob) for each in logprobs],
        top_logprobs=[
            {_name(piece): _finite(value) for piece, value in (*((p, v) for _, p, v in each.top), _chosen(each))}
            for each in logprobs
        ],
        text_offset=[offsets.next(each.piece) for each in logprobs],
    )


def _chosen(logprob: TokenLogprob) -> tuple[bytes, float]:
    return logprob.piece, logprob.logprob


def _text(piece: bytes) -> str:
    return piece.decode(errors="replace")


def _name(piece: bytes) -> str:
    r"""Return the text, or `bytes:\xe4\xb8` for a part of a character, so that different tokens keep apart."""
    try:
        return piece.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in piece)


def _finite(logprob: float) -> float:
    return logprob if math.isfinite(logprob) else SMALLEST_LOGPROB
