"""Summaries of what will soon be left out, written by the model that answers while nobody else wants it.

They are begun when no model works, at the lowest priority, and given up the moment any request comes; then they wait
for the next quiet moment. The prompt begins as the conversation's own does, so most of it is in the KV cache; where
there are tools it does not, since the model is offered none. What is waited for is not kept: after a restart, the next
turn asks again.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from appliance.agents.fitting import Fitting, Overdue
from appliance.agents.listening import heard
from appliance.core.agents import Turn
from appliance.core.errors import ApplianceError, ConflictError, NotFoundError
from appliance.core.sessions import Conversations, Item, Summary
from appliance.core.types import Generation, GenerationRequest, IdleTime, Priority, SamplingParams, TextModels

logger = logging.getLogger("appliance.agents")

LOOK_EVERY_S = 0.5
"""How often it is looked whether the box is quiet, while there is something to write."""

MOST_WAITING = 256


class Compaction:
    """Writes summaries. `run` it for as long as it serves."""

    def __init__(self, models: TextModels, idle: IdleTime, conversations: Conversations, fitting: Fitting) -> None:
        """Write them with the models, when they are idle."""
        self._models = models
        self._idle = idle
        self._conversations = conversations
        self._fitting = fitting
        self._waiting: dict[str, tuple[GenerationRequest, Turn]] = {}
        self._wanted = asyncio.Event()

    def consider(self, request: GenerationRequest, turn: Turn) -> None:
        """Look at a conversation when there is time; the request is the one that it was last continued with."""
        if turn.truncation == "auto" and turn.conversation:
            self._waiting.pop(turn.conversation, None)
            self._waiting[turn.conversation] = request, turn
            if len(self._waiting) > MOST_WAITING:
                del self._waiting[next(iter(self._waiting))]
            self._wanted.set()

    async def run(self) -> None:
        """Write what is wanted, until cancelled."""
        while True:
            await self._wanted.wait()
            if not self._idle.idle:
                await asyncio.sleep(LOOK_EVERY_S)
                continue
            name, (request, turn) = self._waiting.popitem()
            if not self._waiting:
                self._wanted.clear()
            try:
                if not await self._compact(request, turn) and name not in self._waiting:
                    self.consider(request, turn)
            except (NotFoundError, ConflictError):
                continue  # the conversation is gone, or another than the one that was read
            except ApplianceError as error:
                logger.warning("A conversation was not summed up: %s", error)

    async def _compact(self, request: GenerationRequest, turn: Turn) -> bool:
        """Write a summary if it is time for one; False if somebody came meanwhile."""
        items = await self._items(turn)
        overdue = await self._fitting.overdue(request, turn, items)
        if overdue is None:
            return True
        asking = _request(request, overdue)
        written = await self._written(asking)
        if written is None:
            return False
        model, text = written
        if text:
            summary = Summary(overdue.until, text, model)
            await self._conversations.keep_summary(
                turn.conversation, summary, tenant=turn.tenant, covered=overdue.covered
            )
        return True

    async def _items(self, turn: Turn) -> list[Item]:
        items, _ = self._conversations.items(turn.conversation, tenant=turn.tenant)
        return list(items)

    async def _written(self, asking: GenerationRequest) -> tuple[str, str] | None:
        """Return the model's full name and what it writes, or None once anybody else asks for a model."""
        came = False
        generation: Generation | None = None

        def look(request: GenerationRequest) -> None:
            nonlocal came
            came = came or request is not asking
            if came and generation is not None:
                generation.cancel()

        with self._idle.watch(look):
            generation = await self._models.generate(asking)
            if came:
                generation.cancel()
            text = [each.text async for deltas in heard(generation) for each in deltas]
        return None if came else (generation.model, "".join(text).strip())


def _request(request: GenerationRequest, overdue: Overdue) -> GenerationRequest:
    fields: Mapping[str, Any] = {"temperature": 0.0, "max_tokens": overdue.most_tokens}
    return replace(
        request,
        prompt=overdue.prompt,
        sampling=SamplingParams(**fields),
        priority=Priority.FLEX,
        tool_choice=replace(request.tool_choice, mode="none"),
        pinned=False,
        request_id="",
    )
