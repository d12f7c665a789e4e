"""The choices of one HTTP request as they grow: one generation or several, merged into one stream of deltas.

The engine is never held up by a client: what a slow one has not taken yet waits here, merged into at most one delta a
choice, so it costs the memory of the text and nothing else.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace

from appliance.api.disconnect import task_group
from appliance.core.errors import ApplianceError, EngineError
from appliance.core.types import Delta, Generation, GenerationRequest, TextModels, Timings, Usage

Take = Callable[[Sequence[Delta]], Awaitable[None]]
"""Receives what has come since the last call, at most one delta a choice; an empty sequence after a silence."""


class DeltaBuffer:
    """Deltas that nobody has taken yet, merged by choice. Pure."""

    def __init__(self) -> None:
        self._waiting: dict[int, list[Delta]] = {}

    def __bool__(self) -> bool:
        return bool(self._waiting)

    def add(self, delta: Delta) -> None:
        """Put a delta behind those of its choice."""
        self._waiting.setdefault(delta.index, []).append(delta)

    def drain(self) -> list[Delta]:
        """Return one delta for each choice that gained something, in the order of their first gain."""
        waiting, self._waiting = self._waiting, {}
        return [deltas[0] if len(deltas) == 1 else _merged(deltas) for deltas in waiting.values()]


def _merged(deltas: Sequence[Delta]) -> Delta:
    return Delta(
        index=deltas[0].index,
        text="".join(each.text for each in deltas),
        token_count=sum(each.token_count for each in deltas),
        logprobs=tuple(logprob for each in deltas for logprob in each.logprobs),
        finish_reason=deltas[-1].finish_reason,
    )


class Choices:
    """Owns the accepted generations of one HTTP request. `run` it once, or `cancel` it."""

    def __init__(self, generations: Sequence[Generation], n: int) -> None:
        """Number the choices through: `n` for each generation, in order."""
        self._generations = tuple(generations)
        self._n = n
        self._buffer = DeltaBuffer()
        self._wake = asyncio.Event()
        self._running = len(self._generations)
        self._error: ApplianceError | None = None
        self._unfinished = set(range(n * len(self._generations)))

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

    async def run(self, take: Take, *, idle_s: float | None = None) -> None:
        """Hand everything to `take`, to the end of every choice or up to an error; nothing runs on after this.

        Args:
            take: Awaited before more is handed over.
            idle_s: Silence after which `take` gets an empty sequence; None is never.

        Raises:
            ApplianceError: What ended one of the generations.
        """
        try:
            async with task_group() as group:
                pumps = [
                    group.create_task(self._pump(position * self._n, generation), name="deltas of a generation")
                    for position, generation in enumerate(self._generations)
                ]
                while (self._running and self._error is None) or self._buffer:
                    if not await self._gained(idle_s):
                        await take(())
                    elif self._buffer:
                        await take(self._buffer.drain())
                for pump in pumps:
                    pump.cancel()
            if self._error is not None:
                raise self._error
            if self._unfinished:
                raise EngineError(f"{len(self._unfinished)} choices ended without a reason.")
        finally:
            self.cancel()

    async def collect(self) -> list[Delta]:
        """Return one whole delta for each choice, in order of index.

        Raises:
            ApplianceError: As `run`.
        """
        whole = DeltaBuffer()

        async def take(deltas: Sequence[Delta]) -> None:
            for delta in deltas:
                whole.add(delta)

        await self.run(take)
        return sorted(whole.drain(), key=lambda delta: delta.index)

    async def _pump(self, first_index: int, generation: Generation) -> None:
        try:
            async for delta in generation:
                shifted = delta if first_index == 0 else replace(delta, index=first_index + delta.index)
                if shifted.finish_reason is not None:
                    self._unfinished.discard(shifted.index)
                self._buffer.add(shifted)
                self._wake.set()
        except ApplianceError as error:
            self._error = self._error or error
        self._running -= 1
        self._wake.set()

    async def _gained(self, idle_s: float | None) -> bool:
        """Wait for news; False after a silence."""
        if not self._buffer:
            try:
                async with asyncio.timeout(idle_s):
                    await self._wake.wait()
            except TimeoutError:
                return False
        self._wake.clear()
        return True
