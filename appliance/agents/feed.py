"""The events of one response, for those who read along and those who come back."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence

from appliance.core.agents import Event

Keep = Callable[[Sequence[Event]], Awaitable[None]]
"""Puts events on the disk."""


class Feed:
    """The events so far, by their numbers.

    Of a response in the background an event is on the disk before anybody sees it, so that a stream which is taken up
    again never tells something else under a number that was seen. In the foreground events are shown at once and kept
    at the borders of steps: a reader waits for no disk, and a restart ends the response anyway.
    """

    def __init__(self, keep: Keep | None, *, keep_first: bool, told: Sequence[Event] = ()) -> None:
        """Go on behind what was told before.

        Args:
            keep: None keeps nothing.
            keep_first: Show an event only when it is kept.
            told: Events that are kept already.
        """
        self._keep = keep
        self._keep_first = keep_first and keep is not None
        self._events = list(told)
        self._kept = self._shown = len(told)
        self._closed = False
        self._readers: set[asyncio.Event] = set()
        self._keeping = asyncio.Lock()

    async def tell(self, events: Sequence[Event]) -> None:
        """Add events. Raises StorageError."""
        self._events += events
        if self._keep_first:
            await self.flush()
        self._show()

    async def flush(self) -> None:
        """Keep what is not kept yet. Raises StorageError."""
        async with self._keeping:
            new = self._events[self._kept :]
            if self._keep is not None and new:
                await self._keep(new)
            self._kept += len(new)

    def close(self, *last: Event) -> None:
        """Show a last event, which is not kept because it can be made again, and end every reading."""
        self._events += last
        self._closed = True
        self._keep_first = False
        self._show()

    async def read(self, after: int, silence_s: float | None) -> AsyncIterator[Sequence[Event]]:
        """Yield the events behind a number as they come, up to the last; none after a silence."""
        changed = asyncio.Event()
        self._readers.add(changed)
        at = after + 1
        try:
            while True:
                changed.clear()
                if at < self._shown:
                    at, new = self._shown, self._events[at : self._shown]
                    yield new
                elif self._closed:
                    return
                elif not await _comes(changed, silence_s):
                    yield ()
        finally:
            self._readers.discard(changed)

    def _show(self) -> None:
        self._shown = self._kept if self._keep_first else len(self._events)
        for each in self._readers:
            each.set()


async def _comes(changed: asyncio.Event, silence_s: float | None) -> bool:
    """Wait for a change; False after a silence."""
    try:
        async with asyncio.timeout(silence_s):
            await changed.wait()
    except TimeoutError:
        return False
    return True
