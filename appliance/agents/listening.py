"""What a model says in one step: heard delta by delta, told as events, and in the end written down whole."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field

from appliance.agents.items import function_call, message, output_text
from appliance.agents.loop import Call, Said
from appliance.agents.narration import Narrator, begun_call, begun_message
from appliance.core.agents import Event
from appliance.core.sessions import Item
from appliance.core.tools import ToolCallDelta
from appliance.core.types import Delta, FinishReason, Generation, TokenLogprob


async def heard(generation: Generation) -> AsyncIterator[Sequence[Delta]]:
    """Yield what a generation brings as it comes, to the end; it is cancelled when this is closed.

    Raises:
        ApplianceError: What ended the work.
    """
    arrived = asyncio.Event()
    generation.notify(arrived.set)
    try:
        while True:
            arrived.clear()
            deltas = generation.take()
            if deltas:
                yield deltas
            elif generation.ended:
                return
            else:
                await arrived.wait()
    finally:
        generation.cancel()


def new_id(prefix: str) -> str:
    """Return an id as OpenAI has them: a prefix, and letters and digits."""
    return f"{prefix}_{secrets.token_hex(12)}"


@dataclass(slots=True)
class _Growing:
    """A call whose arguments grow."""

    id: str
    name: str
    item: str
    arguments: str = ""


@dataclass(slots=True)
class Listener:
    """Hears one step of the model.

    Attributes:
        functions: Names of the client's functions, whose calls are told as they grow. Others are told when they run.
    """

    narrator: Narrator
    functions: frozenset[str]
    _text: list[str] = field(default_factory=list)
    _logprobs: list[TokenLogprob] = field(default_factory=list)
    _message: str = ""
    _calls: dict[int, _Growing] = field(default_factory=dict)
    _finish: FinishReason | None = None

    def take(self, delta: Delta) -> list[Event]:
        """Return the events for a delta."""
        events: list[Event] = []
        if delta.text or delta.logprobs:
            events += self._begin_message()
            self._text.append(delta.text)
            self._logprobs += delta.logprobs
            events.append(self.narrator.text(self._message, delta.text, delta.logprobs))
        for each in delta.tool_calls:
            events += self._take_call(each)
        self._finish = delta.finish_reason or self._finish
        return events

    def said(self, generation: Generation) -> tuple[Said, list[Event]]:
        """Return the whole step, and the events that remain to be told of it once it is kept."""
        complete = self._finish is not None and self._finish is not FinishReason.LENGTH
        status = "completed" if complete else "incomplete"
        begun = [] if self._message or self._calls else self._begin_message()
        calls = tuple(Call(each.id, each.name, each.arguments, each.item) for each in self._calls.values())
        items: list[Item] = []
        if self._message:
            part = output_text("".join(self._text), self._logprobs)
            items.append(message(self._message, [part], status))
        items += [function_call(each, status) for each in calls if each.name in self.functions]
        usage = generation.usage
        step = Said(
            tuple(items),
            calls,
            complete,
            written_tokens=usage.completion_tokens,
            read_tokens=usage.prompt_tokens,
            cached_tokens=usage.cached_tokens,
            model=generation.model,
        )
        return step, begun + [event for item in items for event in self.narrator.close(item)]

    def _begin_message(self) -> list[Event]:
        if self._message:
            return []
        self._message = new_id("msg")
        return self.narrator.begin(begun_message(self._message))

    def _take_call(self, delta: ToolCallDelta) -> list[Event]:
        events: list[Event] = []
        if delta.index not in self._calls:
            is_function = delta.name in self.functions
            item = new_id("fc" if is_function else "mcp")
            self._calls[delta.index] = _Growing(delta.id or new_id("call"), delta.name, item)
            if is_function:
                events += self.narrator.begin(begun_call(item, self._calls[delta.index].id, delta.name))
        call = self._calls[delta.index]
        call.arguments += delta.arguments
        if delta.arguments and call.name in self.functions:
            events.append(self.narrator.arguments(call.item, delta.arguments))
        return events
