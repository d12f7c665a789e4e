"""One response on its way from the first step to its end.

Every step is kept before it acts: what the model said before its calls run, a call before it is made, its result
before the model reads it. So whatever ends the process, the journal says how far it got, and `decide` how to go on.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from appliance.agents.body import body_of, ended, ending_of, error_of, usage_of
from appliance.agents.calling import call_tool
from appliance.agents.citations import sources_of
from appliance.agents.feed import Feed
from appliance.agents.items import call_item, message, output_text
from appliance.agents.journal import calls_of, output_of, step_of
from appliance.agents.listening import Listener, heard, new_id
from appliance.agents.loop import (
    Ask,
    Call,
    Called,
    End,
    Entry,
    Listed,
    Resumed,
    Returned,
    Run,
    Said,
    Settle,
    decide,
)
from appliance.agents.means import RETRY_S, Means
from appliance.agents.narration import Narrator, terminal
from appliance.agents.pending import decided_calls
from appliance.agents.tools import Tools
from appliance.agents.unkept import Keeper
from appliance.core.agents import Event, Turn
from appliance.core.errors import ApplianceError, ConflictError, InvalidRequestError, OverloadedError
from appliance.core.sessions import Item, ResponseStatus
from appliance.core.tools import ToolChoice, ToolResult
from appliance.core.types import Generation, GenerationRequest, Session

logger = logging.getLogger("appliance.agents")


class ResponseRun:
    """Carries a response out."""

    def __init__(
        self,
        response: str,
        created: int,
        turn: Turn,
        *,
        means: Means,
        responses: Keeper,
        history: Sequence[Item],
        tools: Tools,
        session: Session | None = None,
        journal: Sequence[Entry] | None = None,
        told: Sequence[Event] = (),
    ) -> None:
        """Begin, or go on.

        Args:
            response: Its id.
            created: Unix seconds.
            turn: What was asked.
            means: What to work with.
            responses: Where it is kept.
            history: What was said before the turn's input.
            tools: What the model may call.
            session: Whose text the prompt is, from the store.
            journal: What another process has kept of it, or None for a new one.
            told: Events that are kept already.
        """
        self.id = response
        self.turn = turn
        self.accepted = asyncio.Event()
        self._means = means
        self._responses = responses
        self._history = history
        self._tools = tools
        self._session = session
        self._journal = list(journal or ())
        self._taken_up = journal is not None
        self._narrator = Narrator(told)
        self._resumed = bool(told)
        keep = (lambda events: responses.add_events(response, events)) if turn.stream else None
        self._feed = Feed(keep, keep_first=turn.background, told=told)
        self._body: Mapping[str, Any] = body_of(response, created, turn)
        self._ended = asyncio.Event()
        self._error: ApplianceError | None = None
        self._refusal: ApplianceError | None = None
        self._cancelled = False
        self._task: asyncio.Task[None] | None = None
        self._writing = asyncio.Lock()
        self._asked: GenerationRequest | None = None

    @property
    def streamed(self) -> bool:
        """Whether its events are kept."""
        return self.turn.stream

    @property
    def body(self) -> Mapping[str, Any]:
        """The response object as it is now."""
        return self._body

    @property
    def begun(self) -> bool:
        """Whether anything has been told."""
        return self._narrator.next_number > 0

    @property
    def error(self) -> ApplianceError | None:
        """What it failed with, or None."""
        return self._error

    def events(self, after: int = -1, *, silence_s: float | None = None) -> AsyncIterator[Sequence[Event]]:
        """Yield the events behind a number as they come."""
        return self._feed.read(after, silence_s)

    async def whole(self) -> Mapping[str, Any]:
        """Wait for the end. Raises what it failed with."""
        await self._ended.wait()
        if self._error is not None:
            raise self._error
        return self._body

    async def wait(self) -> None:
        """Wait for the end, whatever it is."""
        await self._ended.wait()

    def cancel(self) -> None:
        """End it without an answer."""
        if not self._ended.is_set() and not self._cancelled:
            self._cancelled = True
            if self._task is not None:
                self._task.cancel()

    def leave(self) -> None:
        """Stop work and keep the journal: another process goes on."""
        if self._task is not None:
            self._task.cancel()

    def stop_with(self, error: ApplianceError) -> None:
        """Have `work` end it as failed and do nothing else."""
        self._refusal = error

    async def work(self) -> None:
        """Carry it out to its end. Nothing is raised but the cancellation by a process that ends."""
        self._task = asyncio.current_task()
        try:
            if self._cancelled:
                await self._fail_quietly("cancelled", None)
            elif self._refusal is not None:
                await self._stop(self._refusal)
            else:
                await self._loop()
        except asyncio.CancelledError:
            if not self._cancelled:
                raise
            await self._fail_quietly("cancelled", None)
        except ApplianceError as error:
            await self._fail_quietly("failed", error)
        except Exception:
            logger.exception("A response failed on a mistake of ours.")
            await self._fail_quietly("failed", ApplianceError("An unexpected error."))
        finally:
            self._feed.close()
            self.accepted.set()
            self._ended.set()

    async def _loop(self) -> None:
        began = self._means.clock.monotonic()
        await self._begin_journal()
        if self._resumed:
            await self._tell(self._caught_up(self._output()))
        elif self.turn.background:
            await self._tell([self._narrator.lifecycle("response.created", self._body)])
        while True:
            elapsed_s = self._means.clock.monotonic() - began
            match decide(self._journal, self._tools.offer, self._means.limits, elapsed_s):
                case Ask() as ask:
                    await self._ask(ask)
                case Run(calls):
                    await self._run(calls, elapsed_s)
                case Settle(call, result):
                    await self._settle(call, result)
                case End() as end:
                    return await self._end(end)

    async def _stop(self, error: ApplianceError) -> None:
        """End it as failed; calls that were interrupted are shown as such, for they may have done their work."""
        await self._begin_journal()
        while isinstance(action := decide(self._journal, self._tools.offer, self._means.limits, 0), Settle):
            await self._settle(action.call, action.result)
        await self._fail_quietly("failed", error)

    async def _begin_journal(self) -> None:
        """Keep what the journal begins with: servers' tools, or that it is taken up, and calls that were decided on."""
        if self._taken_up:
            await self._keep(Resumed())
        elif new := self._tools.new_listings((*self._history, *self.turn.input)):
            await self._keep(Listed(tuple({"id": new_id("mcpl"), **each} for each in new)))
        if not any(isinstance(each, Said) for each in self._journal):
            for entry in decided_calls(self._history, self.turn.input):
                await self._keep(entry)

    async def _ask(self, ask: Ask) -> None:
        """Ask the model, tell what it says as it comes, and keep it."""
        generation = await self._generate(ask)
        self._body = {**self._body, "model": generation.model}
        await self._begin_telling()
        sources = sources_of([*self._history, *self.turn.input, *self._output()])
        listener = Listener(self._narrator, self._tools.offer.functions, sources)
        async for deltas in heard(generation):
            await self._tell([event for delta in deltas for event in listener.take(delta)])
        said, events = listener.said(generation)
        await self._keep(said)
        await self._tell(events)
        await self._feed.flush()

    async def _begin_telling(self) -> None:
        """Tell once that work has begun, and what there is of the output by then."""
        if self._body["status"] == "queued" or not self.accepted.is_set():
            await self._tell(self._beginning())
            await self._tell(self._caught_up(self._output()))
        self.accepted.set()

    def _beginning(self) -> list[Event]:
        """Return the events that say that work has begun."""
        begun: list[Event] = []
        if not self.turn.background:
            begun.append(self._narrator.lifecycle("response.created", self._body))
        self._body = {**self._body, "status": "in_progress"}
        return [*begun, self._narrator.lifecycle("response.in_progress", self._body)]

    async def _generate(self, ask: Ask) -> Generation:
        """Have the model accept the work; in the background, as often as it is too busy."""
        request, clock = await self._request(ask), self._means.clock
        until = clock.monotonic() + (request.deadline_s or 0) if self.turn.background else -math.inf
        while True:
            try:
                return await self._means.models.generate(request)
            except InvalidRequestError as error:
                if error.code == "context_length_exceeded":
                    error.advice += ' Or set truncation to "auto", and the oldest turns are left out.'
                raise
            except OverloadedError as error:
                if clock.monotonic() >= until:
                    raise
                await asyncio.sleep(error.retry_after_s or RETRY_S)

    async def _request(self, ask: Ask) -> GenerationRequest:
        turn = self.turn
        offered = (*turn.functions, *self._tools.built_in)
        request = GenerationRequest(
            model=turn.model,
            prompt=(),
            sampling=replace(turn.sampling, max_tokens=ask.most_tokens),
            tenant=turn.tenant,
            weight=turn.weight,
            pinned=turn.pinned,
            priority=turn.priority,
            deadline_s=turn.deadline_s,
            request_id=turn.request_id,
            tools=offered,
            tool_choice=self._tools.choice_for(ask.choice) if offered else ToolChoice(),
            parallel_tool_calls=turn.parallel_tool_calls,
            session=self._session,
        )
        shown = await self._means.fitting.shown(request, turn, [*self._history, *turn.input, *self._output()])
        self._body = {**self._body, "context": shown.told}
        self._asked = request
        return replace(request, prompt=shown.prompt)

    async def _run(self, calls: Sequence[Call], elapsed_s: float) -> None:
        """Run calls side by side. Each is kept before it begins, and its result before anybody reads it."""
        await self._begin_telling()
        for call in calls:
            await self._keep(Called(call.id))
        await self._tell([event for call in calls for event in self._narrator.call(self._item(call, None))])
        await self._feed.flush()
        limits = self._means.limits
        deadline_s = max(0.001, min(limits.tool_s, limits.total_s - elapsed_s))

        async def run(call: Call) -> None:
            tool, turn = self._tools.by_name[call.name], self.turn
            result = await call_tool(tool, call, tenant=turn.tenant, deadline_s=deadline_s, request_id=turn.request_id)
            await self._settle(call, result)

        try:
            async with asyncio.TaskGroup() as group:
                for call in calls:
                    group.create_task(run(call), name=f"tool of {self.id}")
        except BaseExceptionGroup as errors:
            raise errors.exceptions[0]  # noqa: B904  (the group is the context, and that is meant)

    async def _settle(self, call: Call, result: ToolResult) -> None:
        """Keep a call's result, and tell it."""
        await self._begin_telling()
        if "file_search_call.results" not in self.turn.include:
            kept = {key: each for key, each in result.details.items() if key != "results"}
            result = ToolResult(result.kind, result.output, kept)
        self._means.metrics.tool_called(result.kind)
        await self._keep(Returned(call.id, result))
        await self._tell(self._narrator.close(self._item(call, result)))
        await self._feed.flush()

    def _item(self, call: Call, result: ToolResult | None) -> Item:
        return call_item(call, self._tools.labels.get(call.name, "unknown"), result)

    def _caught_up(self, output: Sequence[Item]) -> list[Event]:
        """Return what has not been told of the output; calls that have no result yet are told when they have."""
        waiting = {call.item for call in calls_of(self._journal).values()}
        return self._narrator.catch_up(output, waiting)

    def _output(self, end: End | None = None) -> list[Item]:
        return output_of(self._journal, self._tools.labels, self._tools.offer.functions, end)

    async def _end(self, end: End) -> None:
        """Keep the end and then tell it."""
        status, details = ending_of(end)
        output = self._output(end)
        if end.explanation:
            name = f"msg_{self.id.partition('_')[2]}"  # the same again if the process ends before the response does
            output.append(message(name, [output_text(end.explanation)], "completed"))
        await self._tell(self._caught_up(output))
        await self._finish(status, output, incomplete_details=details)

    async def _finish(self, status: ResponseStatus, output: Sequence[Item] = (), **changes: Any) -> None:
        await self._feed.flush()
        now = int(self._means.clock.unix())
        body: Mapping[str, Any] = ended(self._body, status, output, usage_of(self._journal), now, **changes)
        answers = status in ("completed", "incomplete") and bool(self.turn.conversation)
        append = (*self.turn.input, *output) if answers else ()
        after = self.turn.after if answers else None
        try:
            body = await self._responses.end(self.id, status, body, append=append, after=after)
        except ConflictError:
            if not (answers and self.turn.fork):
                raise
            await self._means.models.forget({self.turn.conversation})  # its states have what is the fork's alone
            body = await self._responses.end(self.id, status, body, append=append, after=after, fork=True)
        self._body = body
        self._means.metrics.response_ended(status)
        self._feed.close(terminal(body, self._narrator.next_number))
        if answers and self._asked is not None:
            self._means.compaction.consider(self._asked, self.turn)

    async def _fail_quietly(self, status: ResponseStatus, error: ApplianceError | None) -> None:
        """End it without an answer; if not even that can be kept, say so to those who read along."""
        self._error = error
        if error is not None:
            logger.warning("A response ended with an error: %s", error)
        shown = None if error is None else error_of(error, self.turn.request_id)
        usage = usage_of(self._journal) if self._journal else None
        body = ended(self._body, status, self._output(), usage, 0, error=shown)
        self._body = body
        try:
            await self._feed.flush()
            await self._responses.end(self.id, status, body)
        except ApplianceError as worse:
            logger.warning("The end of a response was not kept: %s", worse)
            code = "server_error" if error is None else error.code
            self._feed.close(self._narrator.failure(code, str(error or worse)))
        else:
            self._feed.close(terminal(body, self._narrator.next_number))
        self._means.metrics.response_ended(status)

    async def _keep(self, entry: Entry) -> None:
        """Keep an entry of the journal; what it says may act once this returns."""
        async with self._writing:
            await self._responses.add_step(self.id, step_of(len(self._journal), entry))
            self._journal.append(entry)
        self._body = {**self._body, "output": self._output()}

    async def _tell(self, events: Sequence[Event]) -> None:
        if events:
            await self._feed.tell(events)
