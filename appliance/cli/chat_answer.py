"""One question and its answer: asked, shown as it comes, stopped by Ctrl-C, measured."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from appliance.cli.chat_client import AnswerStream, ChatClient, Statistics
from appliance.cli.chat_wire import Message

_CONTROL_CHARACTERS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


@dataclass(frozen=True, slots=True)
class Answer:
    """What came of a question.

    Attributes:
        finish_reason: As the server says; None if the answer was stopped.
        interrupted: Ctrl-C stopped it.
    """

    model: str
    text: str
    finish_reason: str | None = None
    interrupted: bool = False
    statistics: Statistics = field(default_factory=Statistics)

    def document(self) -> dict[str, Any]:
        """Return the answer for scripts."""
        statistics = self.statistics
        return {
            "model": self.model,
            "content": self.text,
            "finish_reason": self.finish_reason,
            "usage": {
                "prompt_tokens": statistics.prompt_tokens,
                "cached_tokens": statistics.cached_tokens,
                "completion_tokens": statistics.completion_tokens,
            },
            "time_to_first_token_s": statistics.first_token_s,
            "seconds": statistics.seconds,
            "tokens_per_second": statistics.tokens_per_second,
        }


def get_answer(
    client: ChatClient,
    model: str,
    messages: Sequence[Message],
    parameters: Mapping[str, Any],
    show: Callable[[str], None],
) -> Answer:
    """Ask and show each piece of text as it comes. Ctrl-C ends the answer by closing the connection.

    Raises:
        ApplianceError: The server cannot be reached, refuses, or fails midway; what it said has been shown.
    """
    pieces: list[str] = []
    stream: AnswerStream | None = None
    interrupted = False
    try:
        with client.ask(model, messages, parameters) as stream:
            for piece in stream:
                pieces.append(piece)
                show(piece)
    except KeyboardInterrupt:
        interrupted = True
    if stream is None:
        return Answer(model, "", interrupted=True)
    return Answer(
        model=stream.model or model,
        text="".join(pieces),
        finish_reason=None if interrupted else stream.finish_reason,
        interrupted=interrupted,
        statistics=stream.statistics(),
    )


def show(piece: str) -> None:
    """Write a piece of an answer: a terminal gets what cannot steer it, a file or pipe the text as it is."""
    sys.stdout.write(without_controls(piece) if sys.stdout.isatty() else piece)
    sys.stdout.flush()


def without_controls(text: str) -> str:
    """Return text of many lines without what would steer a terminal; models may say anything."""
    return _CONTROL_CHARACTERS.sub("", text)


def describe(statistics: Statistics) -> str:
    """Return the figures of an answer in a line."""
    parts = []
    if statistics.completion_tokens:
        parts.append(f"{statistics.completion_tokens} tokens")
    if statistics.first_token_s is not None:
        parts.append(f"first after {statistics.first_token_s:.2f} s")
    if statistics.tokens_per_second is not None:
        parts.append(f"then {statistics.tokens_per_second:.1f} tokens/s")
    return ", ".join(parts) or "no tokens"
