"""An engine's answer with its tool calls apart from its text, as `core.types.Generation`."""

from __future__ import annotations

import codecs
import secrets
import string
from collections import deque
from collections.abc import Callable

from appliance.core.types import Delta, FinishReason, Generation, Timings, TokenLogprob, Usage
from appliance.serving.tools.reader import CallReader

_ID_LETTERS = string.ascii_letters + string.digits


def new_call_id() -> str:
    """Return a fresh id of a call, as OpenAI's look."""
    return "call_" + "".join(secrets.choice(_ID_LETTERS) for _ in range(24))


class ToolCallGeneration:
    """Wraps a generation whose choices may call tools."""

    def __init__(self, inner: Generation, new_reader: Callable[[], CallReader]) -> None:
        """Own the generation; each of its choices gets a reader."""
        self._inner = inner
        self._new_reader = new_reader
        self._choices: dict[int, _Choice] = {}

    @property
    def model(self) -> str:
        """See `core.types.Generation.model`."""
        return self._inner.model

    @property
    def usage(self) -> Usage:
        """See `core.types.Generation.usage`."""
        return self._inner.usage

    @property
    def timings(self) -> Timings:
        """See `core.types.Generation.timings`."""
        return self._inner.timings

    @property
    def ended(self) -> bool:
        """See `core.types.Generation.ended`."""
        return self._inner.ended

    def notify(self, wake: Callable[[], None]) -> None:
        """See `core.types.Generation.notify`."""
        self._inner.notify(wake)

    def take(self) -> list[Delta]:
        """See `core.types.Generation.take`. What is held back is no reason to return nothing while more is there."""
        while deltas := self._inner.take():
            read = [each for delta in deltas if (each := self._read(delta)) is not None]
            if read:
                return read
        return []

    def cancel(self) -> None:
        """See `core.types.Generation.cancel`."""
        self._inner.cancel()

    def _read(self, delta: Delta) -> Delta | None:
        choice = self._choices.get(delta.index)
        if choice is None:
            choice = self._choices[delta.index] = _Choice(self._new_reader())
        return choice.read(delta)


class _Choice:
    """One choice: its reader, and what waits with the text that the reader holds back.

    Log probabilities are those of the text, as OpenAI has it: from the first call on they are dropped.
    """

    def __init__(self, reader: CallReader) -> None:
        self._reader = reader
        self._tokens = 0
        self._received = self._released = 0
        self._called = False
        self._logprobs: deque[tuple[int, TokenLogprob]] = deque()
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def read(self, delta: Delta) -> Delta | None:
        """Return what is clear now, or None if that is nothing."""
        self._tokens += delta.token_count
        for each in delta.logprobs:
            self._logprobs.append((self._received, each))
            self._received += len(self._decoder.decode(each.piece))
        reading = self._reader.push(delta.text)
        text, calls, reason = reading.text, reading.calls, delta.finish_reason
        if reason is not None:
            text += self._reader.finish().text
            if reason is FinishReason.STOP and self._reader.begun and self._reader.whole:
                reason = FinishReason.TOOL_CALLS
        elif not text and not calls:
            return None
        logprobs = self._logprobs_of(text, to_the_end=reason is not None)
        count, self._tokens = self._tokens, 0
        return Delta(delta.index, text, count, logprobs, reason, calls)

    def _logprobs_of(self, text: str, *, to_the_end: bool) -> tuple[TokenLogprob, ...]:
        if not self._called:
            self._released += len(text)
        self._called = self._reader.begun > 0
        found = []
        while self._logprobs and (self._logprobs[0][0] < self._released or (to_the_end and not self._called)):
            found.append(self._logprobs.popleft()[1])
        return tuple(found)
