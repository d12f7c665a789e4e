"""A link that keeps what was published, for tests of parts whose wire is tested elsewhere on a real broker."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

from appliance.core.errors import UnavailableError
from appliance.core.messaging import Message


class KeptLink:
    """Takes messages for as long as it is connected.

    Attributes:
        sent: What was published.
        connected: Whether anything is taken.
    """

    def __init__(self, answer: Callable[[Message], Awaitable[None]] | None = None) -> None:
        self.sent: list[Message] = []
        self.connected = True
        self._news = asyncio.Event()
        self._answer = answer

    async def publish(self, message: Message) -> None:
        if not self.connected:
            raise UnavailableError("There is no connection.")
        self.sent.append(message)
        self._news.set()
        if self._answer is not None:
            await self._answer(message)

    async def say_farewell(self, message: Message) -> None:
        await self.publish(message)

    async def wait_for(self, n: int, *, timeout_s: float = 10.0) -> None:
        """Wait until so many messages were published."""
        async with asyncio.timeout(timeout_s):
            while len(self.sent) < n:
                self._news.clear()
                await self._news.wait()


async def until(true: Callable[[], object], *, timeout_s: float = 20.0) -> None:
    """Wait until something is so; for states that nothing announces."""
    async with asyncio.timeout(timeout_s):
        while not true():  # noqa: ASYNC110  (there is nothing to be woken by)
            await asyncio.sleep(0.001)
