"""The choices of one HTTP request as they grow: one generation or several, merged into one stream of deltas.

The engine is never held up by a client: what a slow one has not taken yet waits in its generation, and is merged into
at most one delta a choice when it is taken, so it costs the memory of the text and nothing else.

This runs for each token of each stream, with caches that the engine has emptied since the token before. So a step costs
one wake-up, whatever the number of choices, and no timer.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace

from appliance.core.errors import ApplianceError, EngineError
from appliance.core.tools import ToolCallDelta
from appliance.core.types import Delta, Generation, GenerationRequest, TextModels, Timings, Usage

Take = Callable[[Sequence[Delta]], Awaitable[None]]
"""Receives what has come since the last call, at most one delta a choice; an empty sequence after a silence."""


def merged(deltas: Sequence[Delta]) -> Sequence[Delta]:
    """Return one delta for each choice that gained something, in the order of their first gain. Pure."""
    if len(deltas) == 1:
        return deltas
    of_choice: dict[int, list[Delta]] = {}
    for delta in deltas:
        of_choice.setdefault(delta.index, []).append(delta)
    return [each[0] if len(each) == 1 else _merged(each) for each in of_choice.values()]


def _merged(deltas: Sequence[Delta]) -> Delta:
    return Delta(
        index=deltas[0].index,
        text="".join(each.text for each in deltas),
        token_count=sum(each.token_count for each in deltas),
        logprobs=tuple(logprob for each in deltas for logprob in each.logprobs),
        finish_reason=deltas[-1].finish_reason,
        tool_calls=_merged_calls([call for each in deltas for call in each.tool_calls]),
    )


def _merged_calls(deltas: Sequence[ToolCallDelta]) -> tuple[ToolCallDelta, ...]:
    """Return one delta for each call that gained something."""
    of_call: dict[int, list[ToolCallDelta]] = {}
    for delta in deltas:
        of_call.setdefault(delta.index, []).append(delta)
    return tuple(
        replace(first, arguments=first.arguments + "".join(each.arguments for each in more))
        for first, *more in of_call.values()
    )


class Arrivals:
    """Wakes one task when something has come, or after a silence.

    There is one timer for many waits: when it fires, it looks how long the present wait has lasted, and is set again
    for what is left of the silence.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, idle_s: float | None) -> None:
        """Take a wait of `idle_s` seconds for a silence; None is never."""
        self._loop = loop
        self._idle_s = idle_s
        self._waiter: asyncio.Future[bool] | None = None
        self._waiting_since = 0.0
        self._timer: asyncio.TimerHandle | None = None

    def note(self) -> None:
        """Say that something has come."""
        waiter = self._waiter
        if waiter is not None and not waiter.done():
            waiter.set_result(True)

    async def wait(self) -> bool:
        """Wait for what comes from now on; False after a silence."""
        if self._idle_s is not None:
            self._waiting_since = self._loop.time()
            if self._timer is None:
                self._timer = self._loop.call_later(self._idle_s, self._look, self._idle_s)
        self._waiter = self._loop.create_future()
        return await self._waiter

    def close(self) -> None:
        """Stop the timer."""
        if self._timer is not None:
            self._timer.cancel()

    def _look(self, idle_s: float) -> None:
        self._timer = None
        if self._waiter is None or self._waiter.done():
            return  # the next wait sets it again
        silent_at = self._waiting_since + idle_s
        if silent_at <= self._loop.time():
            self._waiter.set_result(False)
        else:
            self._timer = self._loop.call_at(silent_at, self._look, idle_s)


class Choices:
    """Owns the accepted generations of one HTTP request. `run` it once, or `cancel` it."""

    def __init__(self, generations: Sequence[Generation], n: int) -> None:
        """Number the choices through: `n` for each generation, in order."""
        self._generations = tuple(generations)
        self._open = {position * n: generation for position, generation in enumerate(self._generations)}
        self._unfinished = set(range(n * len(self._generations)))
        self._error: ApplianceError | None = None
        self._keep: Take | None = None

    @classmethod
    async def accept(cls, models: TextModels, requests: Sequence[GenerationRequest]) -> Choices:
        """Have every request accepted, or none.

        Args:
            models: The serving floor.
            requests: One a prompt, with the same `n`.

        Raises:
            ApplianceError: As `TextModels.generate`; those accepted before are cancelled.
        """
        accepted: list[Generation] = []
        try:
            for request in requests:
                accepted.append(await models.generate(request))  # noqa: PERF401  (one by one: what was accepted counts)
        except BaseException:
            for generation in accepted:
                generation.cancel()
            raise
        return cls(accepted, requests[0].n)

    @property
    def model(self) -> str:
        """The full `name:version` that answers."""
        return self._generations[0].model

    @property
    def usage(self) -> Usage:
        """The sum over all generations."""
        each = [generation.usage for generation in self._generations]
        return Usage(
            prompt_tokens=sum(one.prompt_tokens for one in each),
            completion_tokens=sum(one.completion_tokens for one in each),
            cached_tokens=sum(one.cached_tokens for one in each),
        )

    @property
    def timings(self) -> Timings:
        """The longest of each time, since several generations run side by side."""
        each = [generation.timings for generation in self._generations]
        return Timings(
            queue_s=max(one.queue_s for one in each),
            prefill_s=max(one.prefill_s for one in each),
            decode_s=max(one.decode_s for one in each),
        )

    def cancel(self) -> None:
        """Free what the generations hold. Idempotent, returns at once."""
        for generation in self._generations:
            generation.cancel()

    def then(self, keep: Take) -> None:
        """Have `keep` take all choices whole once they have ended without an error, before `run` returns."""
        self._keep = keep

    async def run(self, take: Take, *, idle_s: float | None = None) -> None:
        """Hand everything to `take`, to the end of every choice or up to an error; nothing runs on after this.

        Args:
            take: Awaited before more is handed over.
            idle_s: Silence after which `take` gets an empty sequence; None is never.

        Raises:
            ApplianceError: What ended one of the generations, or as what `then` was given.
        """
        if self._keep is None:
            await self._run(take, idle_s)
            return
        whole: list[Delta] = []

        async def take_both(deltas: Sequence[Delta]) -> None:
            whole.extend(deltas)
            await take(deltas)

        await self._run(take_both, idle_s)
        await self._keep(_whole(whole))

    async def _run(self, take: Take, idle_s: float | None) -> None:
        arrivals = Arrivals(asyncio.get_running_loop(), idle_s)
        try:
            for generation in self._generations:
                generation.notify(arrivals.note)
            while self._open:
                deltas = self._gather()
                if deltas:
                    await take(merged(deltas))
                elif self._open and not await arrivals.wait():
                    await take(())
            if self._error is not None:
                raise self._error
            if self._unfinished:
                raise EngineError(f"{len(self._unfinished)} choices ended without a reason.")
        finally:
            arrivals.close()
            self.cancel()

    async def collect(self) -> list[Delta]:
        """Return one whole delta for each choice, in order of index.

        Raises:
            ApplianceError: As `run`.
        """
        whole: list[Delta] = []

        async def take(deltas: Sequence[Delta]) -> None:
            whole.extend(deltas)

        await self.run(take)
        return _whole(whole)

    def _gather(self) -> list[Delta]:
        """Return what has come since the last call. The error of one generation closes them all."""
        gathered: list[Delta] = []
        try:
            for first_index, generation in tuple(self._open.items()):
                deltas = generation.take()
                if deltas:
                    gathered += deltas if first_index == 0 else _shifted(deltas, first_index)
                elif generation.ended:
                    del self._open[first_index]
        except ApplianceError as error:
            self._error = error
            self._open.clear()
        for delta in gathered:
            if delta.finish_reason is not None:
                self._unfinished.discard(delta.index)
        return gathered


def _whole(deltas: Sequence[Delta]) -> list[Delta]:
    return sorted(merged(deltas), key=lambda delta: delta.index)


def _shifted(deltas: Sequence[Delta], first_index: int) -> list[Delta]:
    return [replace(delta, index=first_index + delta.index) for delta in deltas]
