"""An engine's answer with its calls apart."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import pytest

from appliance.core.errors import EngineError
from appliance.core.tools import ToolCallDelta
from appliance.core.types import Delta, FinishReason, Timings, TokenLogprob, Usage
from appliance.serving.tools import dialects
from appliance.serving.tools.generation import ToolCallGeneration, new_call_id
from appliance.serving.tools.reader import CallReader

CALL = '<tool_call>\n{"name": "f", "arguments": {}}\n</tool_call>'


class Answer:
    """Work that has delivered what a test says, in as many goes, and perhaps failed."""

    def __init__(self, *goes: Sequence[Delta], error: Exception | None = None) -> None:
        self.model = "tiny:1"
        self.usage = Usage(1, 2, 3)
        self.timings = Timings(1, 2, 3)
        self.ended = True
        self.cancelled = False
        self.wake: Callable[[], None] | None = None
        self._goes = list(goes)
        self._error = error

    def notify(self, wake: Callable[[], None]) -> None:
        self.wake = wake

    def take(self) -> list[Delta]:
        if self._goes:
            return list(self._goes.pop(0))
        if self._error is not None:
            raise self._error
        return []

    def cancel(self) -> None:
        self.cancelled = True


def wrapped(*goes: Sequence[Delta], error: Exception | None = None) -> ToolCallGeneration:
    numbers = itertools.count()

    def reader() -> CallReader:
        return CallReader(dialects.HERMES, ["f"], lambda: f"call_{next(numbers)}")

    return ToolCallGeneration(Answer(*goes, error=error), reader)


def says(text: str, reason: FinishReason | None = None, index: int = 0, *logprobs: TokenLogprob) -> Delta:
    return Delta(index, text, 1, logprobs, reason)


def whole(generation: ToolCallGeneration) -> list[Delta]:
    deltas: list[Delta] = []
    while taken := generation.take():
        deltas += taken
    return deltas


def test_all_else_is_the_engines() -> None:
    inner = Answer()
    outer = ToolCallGeneration(inner, lambda: CallReader(dialects.HERMES, ["f"], new_call_id))
    assert (outer.model, outer.usage, outer.timings, outer.ended) == ("tiny:1", Usage(1, 2, 3), Timings(1, 2, 3), True)
    outer.notify(print)
    outer.cancel()
    assert inner.wake is print
    assert inner.cancelled


def test_tokens_of_what_is_held_back_are_counted_with_what_comes_next() -> None:
    first, second, last = whole(wrapped([says("Hi ")], [says("<tool")], [says("s> "), says("", FinishReason.STOP)]))
    assert [(each.text, each.token_count) for each in (first, second, last)] == [("Hi", 1), (" <tools>", 2), (" ", 1)]
    assert last.finish_reason is FinishReason.STOP


@pytest.mark.parametrize(
    ("text", "reason", "told"),
    [
        (CALL, FinishReason.STOP, FinishReason.TOOL_CALLS),
        (CALL, FinishReason.LENGTH, FinishReason.LENGTH),
        (CALL[:40], FinishReason.STOP, FinishReason.STOP),
        (CALL[:40], FinishReason.LENGTH, FinishReason.LENGTH),
        ("No.", FinishReason.STOP, FinishReason.STOP),
    ],
)
def test_why_an_answer_ended(text: str, reason: FinishReason, told: FinishReason) -> None:
    assert whole(wrapped([says(text, reason)]))[-1].finish_reason is told


def test_choices_are_read_apart() -> None:
    half = CALL.index("{}") + 1
    deltas = whole(
        wrapped([says(CALL[:half], None, 0), says(CALL[:half], None, 1)], [says(CALL[half:], FinishReason.STOP, 1)])
    )
    assert [(each.index, call.index, call.id) for each in deltas for call in each.tool_calls if call.id] == [
        (0, 0, "call_0"),
        (1, 0, "call_1"),
    ]


def test_an_error_comes_behind_what_is_held_back() -> None:
    generation = wrapped([says("Hi")], [says(" <tool_c")], error=EngineError("Broken."))
    assert [each.text for each in generation.take()] == ["Hi"]
    with pytest.raises(EngineError):
        generation.take()


def test_log_probabilities_are_those_of_the_text() -> None:
    a, b, c, d, e = (
        TokenLogprob(each, piece, -1.0) for each, piece in enumerate((b"H\xc3", b"\xa9", b" ", b"<tool", b"x"))
    )
    text = wrapped(
        [says("H", None, 0, a), says("é ", None, 0, b, c)],
        [says("<tool", None, 0, d), says("x", FinishReason.STOP, 0, e)],
    )
    assert [each for delta in whole(text) for each in delta.logprobs] == [a, b, c, d, e]
    rest = CALL.removeprefix("<tool")
    called = wrapped(
        [says("Hé ", None, 0, a, b, c), says("<tool", None, 0, d)],
        [says(rest, FinishReason.STOP, 0, e)],
        [says("\nDone.", None, 0, e)],
    )
    deltas = whole(called)
    assert [each for delta in deltas for each in delta.logprobs] == [a, b]
    assert deltas[1].tool_calls == (ToolCallDelta(0, "", "call_0", "f"), ToolCallDelta(0, "{}"))
    assert deltas[-1].text == "\nDone."


def test_ids_are_as_openais_and_fresh() -> None:
    ids = {new_call_id() for _ in range(100)}
    assert len(ids) == 100
    assert all(each.startswith("call_") and len(each) == 29 and each[5:].isalnum() for each in ids)
