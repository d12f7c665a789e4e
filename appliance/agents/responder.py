"""The room as a whole: responses are begun, found, cancelled, erased, and taken up after a restart.

What a restart finds unfinished: a background response goes on from its journal, a call that was being made counts as
failed, and the stream goes on behind the last number that was kept. One in the foreground has lost its client, so it
ends: with its answer if the journal has it, as failed otherwise. A foreground response whose client leaves is
cancelled, as OpenAI does.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from appliance.agents.body import body_of, error_of
from appliance.agents.citations import sources_of
from appliance.agents.compaction import Compaction
from appliance.agents.fitting import Fitting
from appliance.agents.journal import entry_of, output_of, read_turn, write_turn
from appliance.agents.listening import new_id
from appliance.agents.loop import End, Limits, Resumed, decide
from appliance.agents.means import RETRY_S, Means
from appliance.agents.run import ResponseRun
from appliance.agents.stored import Stored
from appliance.agents.tools import Tools, tools_of
from appliance.agents.transcript import check_calls
from appliance.agents.unkept import Unkept
from appliance.core.agents import Answer, BuiltInTools, Turn
from appliance.core.clock import Clock
from appliance.core.context import ContextPolicy
from appliance.core.errors import (
    ApplianceError,
    ConflictError,
    InvalidRequestError,
    OverloadedError,
    UnavailableError,
)
from appliance.core.sessions import Conversations, Item, Responses, StoredResponse
from appliance.core.settings import Settings
from appliance.core.tools import BuiltInTool, NumbersPassages
from appliance.core.types import IdleTime, Session, TextModels
from appliance.observe.metrics import ResponseMetrics

logger = logging.getLogger("appliance.agents")

MOST_RESTARTS = 3
"""After so many, the response itself may be what ends the process."""


def loop_limits(settings: Settings) -> Limits:
    """Return how far a loop may go on this box."""
    return Limits(
        steps=settings.max_loop_steps,
        calls=settings.max_tool_calls,
        total_s=settings.loop_timeout_s,
        tool_s=settings.tool_timeout_s,
        result_bytes=settings.max_tool_result_bytes,
    )


class Responder:
    """Answers `core.agents.Agents`. `run` it for as long as it serves."""

    def __init__(
        self,
        *,
        models: TextModels,
        idle: IdleTime,
        conversations: Conversations,
        responses: Responses,
        tools: BuiltInTools,
        metrics: ResponseMetrics,
        clock: Clock,
        limits: Limits,
        context: ContextPolicy,
        most_in_background: int,
    ) -> None:
        """Connect it; nothing runs yet.

        Args:
            models: What answers.
            idle: When nobody wants these.
            conversations: Where histories are.
            responses: Where responses and their journals are.
            tools: Built-in tools by type.
            metrics: Where to count.
            clock: For times.
            limits: How far a loop may go.
            context: What of a long history a model is shown.
            most_in_background: Responses in the background that may run at once.
        """
        fitting = Fitting(models, conversations, context, limits.result_bytes)
        self._compaction = Compaction(models, idle, conversations, fitting)
        self._means = Means(models, conversations, metrics, clock, limits, fitting, self._compaction)
        self._responses = responses
        self._built_in = tools
        self._most_in_background = most_in_background
        self._runs: dict[str, ResponseRun] = {}
        self._busy: set[str] = set()
        self._tasks: asyncio.TaskGroup | None = None
        self._started = asyncio.Event()

    @property
    def tool_types(self) -> Sequence[str]:
        """Return the types of built-in tools that there are."""
        return self._built_in.types

    async def run(self) -> None:
        """Take up what was left, and carry out what comes, until cancelled."""
        try:
            async with asyncio.TaskGroup() as tasks:
                self._tasks = tasks
                for stored in self._responses.unfinished():
                    self._busy.add(stored.conversation)
                    tasks.create_task(self._take_up(stored), name=f"response {stored.id}")
                self._started.set()
                await self._compaction.run()
        finally:
            self._tasks = None

    def drain(self) -> None:
        """Begin nothing more in the background: the process is about to stop, and the next one goes on."""
        for each in self._runs.values():
            if each.turn.background:
                each.leave()

    async def create(self, turn: Turn) -> Answer:
        """Begin a response; see `core.agents.Agents.create`."""
        await self._started.wait()
        if turn.background:
            self._check_room()
        turn, session, history = await self._with_history(turn)
        if turn.conversation and turn.conversation in self._busy:
            raise ConflictError(
                f"Another response works on the conversation {turn.conversation}.",
                advice="Try again when it has ended, or set `fork` to go on in a fork.",
                code="conversation_locked",
                param="conversation",
                retry_after_s=RETRY_S,
            )
        if turn.conversation:
            self._busy.add(turn.conversation)
        try:
            run = await self._begin(turn, session, history)
        except BaseException:
            self._busy.discard(turn.conversation)
            raise
        if not turn.background:
            await self._accepted(run)
        return run

    def find(self, response: str, *, tenant: str) -> Answer:
        """Return a response; see `core.agents.Agents.find`."""
        run = self._runs.get(response)
        if run is not None and run.turn.store and run.turn.tenant == tenant:
            return run
        return Stored(self._responses, self._responses.get(response, tenant=tenant))

    async def cancel(self, response: str, *, tenant: str) -> Mapping[str, Any]:
        """End a background response; see `core.agents.Agents.cancel`."""
        answer = self.find(response, tenant=tenant)
        if not answer.body.get("background"):
            raise InvalidRequestError(
                f"{response} is not a background response, so it cannot be cancelled.",
                advice="Close its connection instead, or create it with `background`.",
                code="not_in_background",
            )
        if isinstance(answer, ResponseRun):
            answer.cancel()
            await answer.wait()
            answer = self.find(response, tenant=tenant)
        if answer.body["status"] != "cancelled":
            raise InvalidRequestError(
                f"{response} has ended already: its status is {answer.body['status']}.", code="response_ended"
            )
        return answer.body

    async def delete(self, response: str, *, tenant: str) -> None:
        """Erase a response; see `core.agents.Agents.delete`."""
        answer = self.find(response, tenant=tenant)
        if isinstance(answer, ResponseRun):
            answer.cancel()
            await answer.wait()
        await self._responses.delete(response, tenant=tenant)

    def input_items(self, response: str, *, tenant: str) -> Sequence[Item]:
        """Return the items that a response answers; see `core.agents.Agents.input_items`."""
        stored = self._responses.get(response, tenant=tenant)
        past = self._responses.past(stored.previous, tenant=tenant) if stored.previous else ()
        return [*past, *stored.input]

    def _check_room(self) -> None:
        running = sum(each.turn.background for each in self._runs.values())
        if running >= self._most_in_background:
            raise OverloadedError(
                f"{running} responses run in the background; {self._most_in_background} are allowed.",
                advice="Wait until one has ended, or raise max_background_responses.",
                retry_after_s=RETRY_S,
            )

    async def _with_history(self, turn: Turn) -> tuple[Turn, Session, Sequence[Item]]:
        """Return the turn with where it begins, whose text it is, and what was said before it."""
        conversations, tenant = self._means.conversations, turn.tenant
        if turn.previous:
            before = self._responses.get(turn.previous, tenant=tenant)
            if before.status in ("queued", "in_progress"):
                raise ConflictError(
                    f"The response {turn.previous} has not ended yet.",
                    code="response_in_progress",
                    param="previous_response_id",
                    retry_after_s=RETRY_S,
                )
        if turn.conversation and turn.fork and turn.conversation in self._busy:
            forked = await conversations.fork(turn.conversation, tenant=tenant)
            turn = replace(turn, conversation=forked.id)
        if turn.conversation:
            turn = replace(turn, after=conversations.get(turn.conversation, tenant=tenant).last)
        session, history = self._past(turn)
        check_calls(history, turn.input)
        return turn, session, history

    def _past(self, turn: Turn) -> tuple[Session, Sequence[Item]]:
        """Return whose text a turn goes on with, "" if with nobody's, and that text, which is read last."""
        as_of = self._means.clock.monotonic()
        first = self._responses.first(turn.previous, tenant=turn.tenant) if turn.previous else ""
        return Session(turn.conversation or first, as_of), self._history(turn)

    def _history(self, turn: Turn) -> Sequence[Item]:
        """Return what was said before a turn, as it was when the turn began."""
        if turn.previous:
            return self._responses.past(turn.previous, tenant=turn.tenant)
        if not turn.conversation or not turn.after:
            return ()
        items, _ = self._means.conversations.items(turn.conversation, tenant=turn.tenant)
        ids = [each["id"] for each in items]
        return items[: ids.index(turn.after) + 1] if turn.after in ids else items

    async def _begin(self, turn: Turn, session: Session, history: Sequence[Item]) -> ResponseRun:
        """Keep a new response and start its work."""
        tools = await self._open_tools(turn, history)
        tasks = self._tasks
        if tasks is None:
            raise UnavailableError("The appliance is stopping.", retry_after_s=RETRY_S)
        response, created = new_id("resp"), int(self._means.clock.unix())
        if turn.store:
            body = body_of(response, created, turn)
            await self._responses.begin(
                StoredResponse(
                    response,
                    created,
                    body["status"],
                    request=write_turn(turn),
                    body=body,
                    input=turn.input,
                    previous=turn.previous,
                    conversation=turn.conversation,
                    background=turn.background,
                    tenant=turn.tenant,
                )
            )
        run = ResponseRun(
            response,
            created,
            turn,
            means=self._means,
            responses=self._responses if turn.store else Unkept(),
            history=history,
            session=session if session.id or not turn.store else replace(session, id=response),
            tools=tools,
        )
        self._runs[response] = run
        tasks.create_task(self._work(run), name=f"response {response}")
        return run

    async def _accepted(self, run: ResponseRun) -> None:
        """Wait until the model has accepted the work; of a response that it refuses nothing is left."""
        try:
            await run.accepted.wait()
        except asyncio.CancelledError:
            run.cancel()
            raise
        if run.error is not None and not run.begun:
            if run.turn.store:
                await self._responses.delete(run.id, tenant=run.turn.tenant)
            raise run.error

    async def _work(self, run: ResponseRun) -> None:
        try:
            await run.work()
        finally:
            self._runs.pop(run.id, None)
            self._busy.discard(run.turn.conversation)

    async def _open_tools(self, turn: Turn, items: Sequence[Item]) -> Tools:
        """Return the tools of a turn, those that its choice leaves to the model.

        Args:
            turn: Whose tools they are.
            items: What has been said and found so far.

        Raises:
            InvalidRequestError: Two have one name, or as `BuiltInTools.open`.
        """
        names = [each.name for each in turn.functions]
        by_name: dict[str, BuiltInTool] = {}
        for definition in turn.built_in:
            tool = await self._built_in.open(definition, tenant=turn.tenant, request_id=turn.request_id)
            if isinstance(tool, NumbersPassages):
                tool.number_from(1 + max(sources_of([*items, *turn.input]), default=0))
            names += [each.name for each in tool.tools]
            by_name |= {each.name: tool for each in tool.tools}
        twice = next((name for index, name in enumerate(names) if name in names[:index]), None)
        if twice is not None:
            raise InvalidRequestError(
                f"Two tools have the name {twice!r}.", param="tools", code="invalid_value", advice="Rename one."
            )
        return tools_of(turn, by_name)

    async def _take_up(self, stored: StoredResponse) -> None:
        """Go on with what another process left, or end it."""
        try:
            run = await self._left(stored)
        except ApplianceError as error:
            logger.warning("The response %s cannot be taken up: %s", stored.id, error)
            await self._abandon(stored, error)
            return
        finally:
            self._busy.discard(stored.conversation)
        self._runs[stored.id] = run
        self._busy.add(stored.conversation)
        await self._work(run)

    async def _left(self, stored: StoredResponse) -> ResponseRun:
        """Return a run that goes on from the journal."""
        turn = read_turn(stored.request)
        journal = [entry_of(each) for each in self._responses.steps(stored.id)]
        session, history = self._past(turn)
        tools = await self._open_tools(
            turn, [*history, *output_of(journal, {"file_search": "file_search"}, frozenset())]
        )
        run = ResponseRun(
            stored.id,
            stored.created,
            turn,
            means=self._means,
            responses=self._responses,
            history=history,
            session=session if session.id else replace(session, id=stored.id),
            tools=tools,
            journal=journal,
            told=self._responses.events(stored.id, tenant=stored.tenant) if turn.stream else (),
        )
        over = isinstance(decide(journal, tools.offer, self._means.limits, 0), End)
        if not turn.background and not over:
            run.stop_with(UnavailableError("The appliance restarted before the answer was whole.", advice="Ask again."))
        elif sum(isinstance(each, Resumed) for each in journal) >= MOST_RESTARTS:
            run.stop_with(UnavailableError(f"The appliance restarted {MOST_RESTARTS} times on this response."))
        return run

    async def _abandon(self, stored: StoredResponse, error: ApplianceError) -> None:
        body = {**stored.body, "status": "failed", "error": error_of(error, "")}
        try:
            await self._responses.end(stored.id, "failed", body)
        except ApplianceError as worse:
            logger.warning("The end of the response %s was not kept: %s", stored.id, worse)
