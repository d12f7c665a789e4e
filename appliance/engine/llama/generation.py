"""One request's answer on the event loop's side: what the worker delivered and the caller has not taken yet."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

from appliance.core.errors import ApplianceError, DeadlineExceededError
from appliance.core.types import Delta, Timings, Usage


@dataclass(frozen=True, slots=True)
class Admitted:
    """A choice was given a slot; `cached` of its prompt tokens need not be computed."""

    cached: int
    at: float
    can_wait: ClassVar[bool] = False


@dataclass(frozen=True, slots=True)
class Gained:
    """A choice gained a delta."""

    delta: Delta
    at: float

    @property
    def can_wait(self) -> bool:
        """Return True in the middle of an answer: then it may be told together with what comes next."""
        return self.delta.finish_reason is None


@dataclass(frozen=True, slots=True)
class Failed:
    """A choice ended with an error."""

    error: ApplianceError
    at: float
    can_wait: ClassVar[bool] = False


Event = Admitted | Gained | Failed


class LlamaGeneration:
    """Accepted work of one request with one or more choices; see `core.types.Generation` for how to use it.

    What waits here is bounded by the choices' own token limits, so a slow reader costs at most its answers' size.

    Attributes:
        ended: True once every choice has finished, failed or been cancelled.
        gained_at: When each choice gained something last, by its index.
    """

    def __init__(
        self,
        *,
        model: str,
        prompt_tokens: int,
        choices: int,
        now: float,
        cancel: Callable[[], None],
        adapter: str = "",
        on_end: Callable[[], None] = lambda: None,
    ) -> None:
        """Wait for `choices` choices of one prompt; `cancel` tells the engine to stop them, `on_end` is called once."""
        self.model = model
        self.adapter = adapter
        self.submitted_at = now
        self.admitted_at: float | None = None
        self.first_token_at: float | None = None
        self.gained_at: dict[int, float] = {}
        self.ended = False
        self.ended_at: float | None = None
        self.error: ApplianceError | None = None
        self.open_choices = choices
        self._prompt_tokens = prompt_tokens
        self._completion_tokens = 0
        self._cached_tokens = 0
        self._cancel = cancel
        self._on_end = on_end
        self._deltas: list[Delta] = []
        self._wake: Callable[[], None] | None = None
        self._deadline: asyncio.TimerHandle | None = None

    @property
    def usage(self) -> Usage:
        """Return the counts so far."""
        return Usage(self._prompt_tokens, self._completion_tokens, self._cached_tokens)

    @property
    def timings(self) -> Timings:
        """Return the times so far, in seconds; a phase that has not begun took 0."""
        admitted = self.submitted_at if self.admitted_at is None else self.admitted_at
        first = admitted if self.first_token_at is None else self.first_token_at
        end = first if self.ended_at is None else self.ended_at
        return Timings(admitted - self.submitted_at, first - admitted, max(0.0, end - first))

    def expire_at(self, when: float, seconds: float) -> None:
        """Give the work up at the loop's time `when`, `seconds` after it was accepted."""
        error = DeadlineExceededError(
            f"The answer was not complete after {seconds:.3g} s.",
            advice="Ask for fewer tokens, or raise `timeout_s` and `request_timeout_s`.",
        )

        def expire() -> None:
            self.fail(error, when)
            self._cancel()

        self._deadline = asyncio.get_running_loop().call_at(when, expire)

    def notify(self, wake: Callable[[], None]) -> None:
        """Have `wake` called after each arrival from now on, and after the end."""
        self._wake = wake

    def take(self) -> list[Delta]:
        """Return what came since the last call, or raise the error that ended the work behind it."""
        deltas, self._deltas = self._deltas, []
        if self.error is not None and not deltas:
            raise self.error
        return deltas

    def cancel(self) -> None:
        """Stop the choices that still run; their cells are free within one engine step. Idempotent."""
        if not self.ended:
            self._cancel()

    def receive(self, event: Event) -> None:
        """Take what the worker says of one choice."""
        if self.ended:
            return
        match event:
            case Gained(delta, at):
                if self.first_token_at is None:
                    self.first_token_at = at
                self.gained_at[delta.index] = at
                self._completion_tokens += delta.token_count
                self._deltas.append(delta)
                if delta.finish_reason is not None:
                    self.open_choices -= 1
                if self.open_choices:
                    self._tell()
                else:
                    self.end(at)
            case Admitted(cached, at):
                if self.admitted_at is None:  # the first choice counts: the others share its prompt
                    self.admitted_at = at
                    self._cached_tokens = cached
            case Failed(error, at):
                self.fail(error, at)
                self._cancel()

    def fail(self, error: ApplianceError, at: float) -> None:
        """End the work with an error, unless it has ended already."""
        if not self.ended:
            self.error = error
            self.end(at)

    def end(self, at: float) -> None:
        """Close the books; nothing is received afterwards. Idempotent."""
        if not self.ended:
            self.ended = True
            self.ended_at = at
            self._on_end()
        if self._deadline is not None:
            self._deadline.cancel()
        self._tell()

    def _tell(self) -> None:
        if self._wake is not None:
            self._wake()
