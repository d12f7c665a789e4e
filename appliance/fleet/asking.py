"""Questions to the hub: `up/<dev>/req`, answered on `dn/<dev>/res` with the same correlation data.

    ask ──> one of MOST_AT_ONCE turns ──> publish ──> answer with its correlation │ time over │ connection lost

An answer without a question, one that comes a second time and one that comes too late are dropped: nothing here rests
on the broker's memory. Whoever got no answer asks again if he likes; every question may be asked twice.
"""

from __future__ import annotations

import asyncio
import logging
import secrets

import msgspec

from appliance.core.errors import UnavailableError
from appliance.core.fleet import Answer, DownKind, Question, down, up
from appliance.core.messaging import Link, Message

LOGGER = logging.getLogger("appliance.fleet")
MOST_AT_ONCE = 8
EXPIRY_S = 60


class Questions:
    """A part of the agent that answers `Asking` for the others."""

    def __init__(self, device: str, link: Link) -> None:
        """Ask over a link in a device's name."""
        self._device = device
        self._link = link
        self._turns = asyncio.Semaphore(MOST_AT_ONCE)
        self._open: dict[bytes, asyncio.Future[Answer]] = {}

    @property
    def kinds(self) -> frozenset[DownKind]:
        """Return the topic of answers."""
        return frozenset({"res"})

    async def ask(self, question: Question, *, timeout_s: float = 10.0) -> Answer:
        """Return the hub's answer; that it refuses is an answer too.

        Raises:
            UnavailableError: There is no connection, or no answer came in time.
        """
        try:
            async with asyncio.timeout(timeout_s), self._turns:
                return await self._ask(question)
        except TimeoutError as error:
            raise UnavailableError(
                f"The hub did not answer the question {question.kind!r} within {timeout_s:g} s.",
                advice="Look whether the hub runs; it is asked again by itself.",
                code="hub_silent",
            ) from error

    async def handle(self, kind: DownKind, message: Message) -> None:  # noqa: ARG002
        """Give an answer to whoever waits for it."""
        waiting = self._open.get(message.correlation or b"")
        if waiting is None or waiting.done():
            LOGGER.debug("dropped an answer of the hub that nobody waits for any more")
            return
        try:
            waiting.set_result(msgspec.msgpack.decode(message.payload, type=Answer))
        except (msgspec.DecodeError, RecursionError) as error:
            LOGGER.warning("the hub's answer is none: %s", error)

    async def connected(self) -> None:
        """Do nothing: whoever still waits for an answer may yet get it, for the hub may have had the question."""

    async def run(self) -> None:
        """Do nothing in between."""

    async def _ask(self, question: Question) -> Answer:
        correlation = secrets.token_bytes(16)
        answer: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
        self._open[correlation] = answer
        try:
            await self._link.publish(
                Message(
                    topic=up(self._device, "req"),
                    payload=msgspec.json.encode(question),
                    expiry_s=EXPIRY_S,
                    correlation=correlation,
                    response_topic=down(self._device, "res"),
                )
            )
            return await answer
        finally:
            del self._open[correlation]
