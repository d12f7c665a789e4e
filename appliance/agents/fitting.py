"""What of a history goes to the model: the policy's decisions carried out, counted in tokens of the model that answers.

With `truncation: "disabled"` everything goes, and what is too long is refused by the engine with both figures. With
`"auto"`, what does not fit is left out, and a summary and memory stand for it, where there is a conversation to keep
them. What a turn has in tokens is remembered by its content, so a history is counted once, from its newest turn back
as far as there is room. What is sent is measured whole if it is near the limit.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from hashlib import sha256
from typing import Any

import msgspec

from appliance.agents.transcript import messages_of, said, with_notes
from appliance.core.agents import Turn
from appliance.core.context import ContextPolicy, Parts
from appliance.core.errors import InvalidRequestError, NotFoundError
from appliance.core.sessions import Conversations, Item
from appliance.core.types import ChatMessage, GenerationRequest, TextModels

REMEMBERED = 20_000
"""Counts that are kept, about 200 bytes each."""

TRIES = 4
NEAR = 0.9
"""Share of the room from where on the sum of the parts is not trusted, and the whole is measured."""

MEMORIES = 6
MEMORY_CHARACTERS = 600
QUESTION_CHARACTERS = 2000

BYTES_A_TOKEN = 2
"""Fewer than most models make of any language, so that memory keeps to its share before it is measured."""

SUMMARISE = (
    "Summarise our conversation so far, for yourself, as short notes: names, facts, numbers, decisions, and what is "
    "still open. Write nothing else."
)

_BEFORE = (ChatMessage("user", "x"), ChatMessage("assistant", "x"))
"""Stands before what is counted, so that nothing counts which a template writes at the start."""


@dataclass(frozen=True, slots=True)
class Shown:
    """What a model is shown.

    Attributes:
        told: What the response says of it; None where the client did not ask for truncation.
        spans: Counts of the turns that are shown, oldest first; () where nothing was counted.
        room: What turns may have.
        summary: The summary that stands for earlier turns, or "".
    """

    prompt: tuple[ChatMessage, ...]
    told: Mapping[str, Any] | None = None
    spans: tuple[int, ...] = ()
    room: int = 0
    summary: str = ""


@dataclass(frozen=True, slots=True)
class Overdue:
    """A summary that is to be written.

    Attributes:
        prompt: What the model is asked.
        until: Id of the last item that it covers.
        covered: How many items it covers.
        most_tokens: What it may have.
    """

    prompt: tuple[ChatMessage, ...]
    until: str
    covered: int
    most_tokens: int


@dataclass(frozen=True, slots=True)
class _Figures:
    window: int
    answer: int
    fixed: int
    model: str

    @property
    def room(self) -> int:
        return self.window - self.answer - self.fixed


@dataclass(frozen=True, slots=True)
class _Case:
    """What is to be cut, and the counts of its newest turns."""

    request: GenerationRequest
    turn: Turn
    items: Sequence[Item]
    parts: Parts
    figures: _Figures
    counts: Sequence[int]

    @property
    def whole(self) -> bool:
        """Whether all may fit."""
        return len(self.counts) == len(self.parts.spans) and sum(self.counts) <= self.figures.room


class Fitting:
    """Fits histories into windows, of all responses."""

    def __init__(
        self, models: TextModels, conversations: Conversations, policy: ContextPolicy, result_bytes: int
    ) -> None:
        """Fit by a policy.

        Args:
            models: What counts.
            conversations: Where summaries and memory are.
            policy: What decides.
            result_bytes: Of a tool's result, what a model is shown.
        """
        self._models = models
        self._conversations = conversations
        self._policy = policy
        self._result_bytes = result_bytes
        self._counts: OrderedDict[bytes, int] = OrderedDict()

    async def shown(self, request: GenerationRequest, turn: Turn, items: Sequence[Item]) -> Shown:
        """Return what of the items the model is shown.

        Args:
            request: What it is to be asked, but for the prompt.
            turn: Whose answer it is.
            items: The history, the input, and what the response has come to so far.

        Raises:
            InvalidRequestError: The newest turn does not fit, with the figures.
            ApplianceError: As `TextModels.generate`.
        """
        if turn.truncation == "disabled":
            return Shown(self._messages(turn, items))
        parts = self._policy.parts(items)
        figures = await self._figures(request, turn, items[: parts.pinned])
        counts = await self._newest(figures.model, items, parts, figures.room)
        if not parts.spans or (len(counts) == len(parts.spans) and sum(counts) <= NEAR * figures.room):
            told = _told(0, figures, figures.fixed + sum(counts))
            return Shown(self._messages(turn, items), told, counts, figures.room)
        if counts[-1] > figures.room:
            raise self._too_long(figures, counts[-1])
        return await self._cut(_Case(request, turn, items, parts, figures, counts))

    async def overdue(self, request: GenerationRequest, turn: Turn, items: Sequence[Item]) -> Overdue | None:
        """Return the summary that a conversation needs, or None; its prompt begins as the conversation's does.

        Args:
            request: What it was last continued with.
            turn: The same, as it was asked.
            items: The conversation.

        Raises:
            ApplianceError: As `TextModels.generate`.
        """
        shown = await self.shown(request, replace(turn, input=()), items)
        if not shown.told or not shown.spans:
            return None
        parts = self._policy.parts(items)
        known, covered = self._summary(turn, items, parts)
        first = len(parts.spans) - len(shown.spans)
        start = max(first, covered)
        turns = self._policy.compact(shown.spans[start - first :], room=shown.room)
        if not turns:
            return None
        end = parts.spans[start + turns - 1].end
        begin = parts.spans[start if known else first].first
        messages = self._messages(turn, [*items[: parts.pinned], *items[begin:end]])
        prompt = (*with_notes(messages, known, ()), ChatMessage("user", SUMMARISE))
        most = self._policy.notes(shown.told["context_length"])
        return Overdue(prompt, str(items[end - 1]["id"]), end, most)

    async def _cut(self, case: _Case) -> Shown:
        """Return what is shown of what may not fit as a whole; it is measured, and cut further until it fits."""
        excess = 0
        for attempt in range(TRIES):
            shown = await self._attempt(case, excess, attempt)
            over = shown.told["input_tokens"] - (case.figures.window - case.figures.answer) if shown.told else 0
            if over <= 0:
                return shown
            excess += over
        raise self._too_long(case.figures, case.counts[-1])

    async def _attempt(self, case: _Case, excess: int, attempt: int) -> Shown:
        """Return what may fit; of the notes, memory goes first, and then the summary."""
        turn, parts, figures = case.turn, case.parts, case.figures
        notes = self._policy.notes(figures.window) if turn.conversation else 0
        summary, covered = self._summary(turn, case.items, parts)
        room = figures.room - excess - (0 if case.whole and not excess else 2 * notes)
        first = self._policy.first(parts.spans, case.counts, window=figures.window, room=room, covered=covered)
        text = summary if first and attempt < TRIES - 1 else ""
        start = parts.spans[first].first if first else parts.pinned
        memory = self._memory(turn, case.items, start, notes) if first and attempt < TRIES - 2 else ()
        prompt = with_notes(self._messages(turn, [*case.items[: parts.pinned], *case.items[start:]]), text, memory)
        size = await self._models.prompt_size(replace(case.request, prompt=prompt))
        told = _told(start - parts.pinned, figures, size.tokens, bool(text), len(memory))
        return Shown(prompt, told, tuple(case.counts[first - len(parts.spans) :]), room, text)

    def _messages(self, turn: Turn, items: Sequence[Item]) -> tuple[ChatMessage, ...]:
        return messages_of(turn.instructions, items, self._result_bytes)

    async def _figures(self, request: GenerationRequest, turn: Turn, pinned: Sequence[Item]) -> _Figures:
        """Return what there is room for beside instructions and tools."""
        size = await self._models.prompt_size(replace(request, prompt=(*self._messages(turn, pinned), *_BEFORE)))
        answer = self._policy.reserve(size.context_length, request.sampling.max_tokens)
        before = await self._size(size.model, (*_BEFORE, *_BEFORE)) - await self._size(size.model, _BEFORE)
        return _Figures(size.context_length, answer, size.tokens - before, size.model)

    async def _newest(self, model: str, items: Sequence[Item], parts: Parts, room: int) -> tuple[int, ...]:
        """Return the tokens of the newest turns, oldest first: of all, or of as many as are over the room."""
        counts: list[int] = []
        total = 0
        for span in reversed(parts.spans):
            if total > room:
                break
            counts.append(await self._count(model, items[span.first : span.end]))
            total += counts[-1]
        return tuple(reversed(counts))

    async def _count(self, model: str, items: Sequence[Item]) -> int:
        """Return the tokens of a turn, behind another."""
        messages = messages_of("", items, self._result_bytes)
        return max(0, await self._size(model, (*_BEFORE, *messages)) - await self._size(model, _BEFORE))

    async def _size(self, model: str, messages: tuple[ChatMessage, ...]) -> int:
        """Return the tokens of messages; `model` is a full name, so what is remembered stays true."""
        key = sha256(msgspec.json.encode((model, messages))).digest()
        if key not in self._counts:
            self._counts[key] = len((await self._models.tokenize(model, messages)).tokens)
            if len(self._counts) > REMEMBERED:
                self._counts.popitem(last=False)
        self._counts.move_to_end(key)
        return self._counts[key]

    def _summary(self, turn: Turn, items: Sequence[Item], parts: Parts) -> tuple[str, int]:
        """Return the summary of the turn's conversation, and how many turns it stands for."""
        try:
            found = self._conversations.summary(turn.conversation, tenant=turn.tenant) if turn.conversation else None
        except NotFoundError:
            return "", 0  # deleted meanwhile: the end of the response says so
        if found is None:
            return "", 0
        index = next((index for index, each in enumerate(items) if each.get("id") == found.until), -1)
        covered = sum(each.end <= index + 1 for each in parts.spans)
        return (found.text, covered) if covered else ("", 0)

    def _memory(self, turn: Turn, items: Sequence[Item], start: int, most: int) -> tuple[str, ...]:
        """Return what of the turns that are left out speaks of the newest turn, best first, of so many bytes or so."""
        question = said(turn.input)
        if not (turn.conversation and turn.after and question):
            return ()
        past = next((index + 1 for index, each in enumerate(items) if each.get("id") == turn.after), 0)
        before = items[start]["id"] if start < past else ""
        try:
            found = self._conversations.memory(
                turn.conversation, question[:QUESTION_CHARACTERS], tenant=turn.tenant, before=before, limit=2 * MEMORIES
            )
        except NotFoundError:
            return ()  # deleted meanwhile: the end of the response says so
        texts: list[str] = []
        for each in found:
            text = said([each])[:MEMORY_CHARACTERS]
            if text and len(texts) < MEMORIES and len("".join((*texts, text)).encode()) <= most * BYTES_A_TOKEN:
                texts.append(f"{each['role']}: {text}")
        return tuple(texts)

    def _too_long(self, figures: _Figures, newest: int) -> InvalidRequestError:
        return InvalidRequestError(
            f"The newest turn has {newest} tokens; the context of {figures.model} has {figures.window}, of which "
            f"{figures.fixed} are instructions and tools and {figures.answer} are kept for the answer.",
            advice="Shorten the input, send fewer tools, or lower max_output_tokens.",
            param="input",
            code="context_length_exceeded",
        )


def _told(left_out: int, figures: _Figures, tokens: int, summary: bool = False, memory: int = 0) -> dict[str, Any]:
    return {
        "items_left_out": left_out,
        "input_tokens": tokens,
        "context_length": figures.window,
        "answer_tokens": figures.answer,
        "summary": summary,
        "memory_items": memory,
    }
