"""Desired twins on their way to the devices: signed, kept by the broker, and sent again to whoever does not have them.

Operators write to the database, in this process or in another; what has to be sent is a row there, so nothing is
forgotten by a kill. A device that reports an older version than it was sent, as after a broker lost its memory, is sent
it again; one that reports a newer one than we know of, as after a hub's restored backup, is overtaken.
"""

from __future__ import annotations

import asyncio
import logging
from typing import Protocol

from appliance.core.clock import Clock
from appliance.core.errors import ApplianceError, NotFoundError
from appliance.core.fleet import Answer, Question, Reported, UpKind, down
from appliance.core.messaging import Link, Message
from appliance.core.releases import DESIRED_TYPE
from appliance.hub.twin_store import SqliteTwins, Version

logger = logging.getLogger("appliance.hub")

POLL_S = 1.0
AT_ONCE = 64
SETTLE_S = 30.0
"""A device may take so long to apply what it was sent; a report before that is no reason to send it again."""

PROBLEM_S = 30.0
"""Pause after a failure that trying again at once would repeat."""


class Signer(Protocol):
    """Puts a payload of a type into an envelope that the devices believe."""

    def sign(self, payload: bytes, payload_type: str) -> bytes:
        """Return the envelope."""
        ...

    def key_id(self) -> str:
        """Return the id of the key that signs now."""
        ...


class Twins:
    """The part of the hub that tells devices what they should be."""

    kinds: frozenset[UpKind] = frozenset()

    def __init__(self, store: SqliteTwins, link: Link, signer: Signer, clock: Clock) -> None:
        self.store = store
        self._link = link
        self._signer = signer
        self._clock = clock
        self._reports: dict[str, int] = {}

    def note_report(self, device: str, reported: Reported) -> None:
        """Hear which desired twin a device has applied."""
        self._reports[device] = reported.desired_version

    async def answer(self, device: str, _question: Question) -> Answer:
        """Answer a device that asks what it should be.

        Raises:
            NotFoundError: Nothing was ever desired of it.
        """
        current = self.store.current(device)
        if current is None:
            raise NotFoundError(f"Nothing is desired of {device}.")
        data = self._signer.sign(current.document, DESIRED_TYPE)
        return Answer(True, data=data, total=len(data))

    async def handle(self, device: str, kind: UpKind, rest: str, message: Message) -> None:
        """Read nothing: reports come by way of the devices."""

    async def run(self) -> None:
        """Send what has to be sent, for as long as the hub runs."""
        while True:
            sent = 0
            try:
                await self._compare()
                if self._link.connected:
                    sent = await self._send()
            except ApplianceError as error:
                logger.warning("Desired twins could not be sent: %s", error)
                await asyncio.sleep(PROBLEM_S)
            if not sent:
                await asyncio.sleep(POLL_S)

    async def _compare(self) -> None:
        """Look whether devices have applied what they were sent."""
        reports, self._reports = self._reports, {}
        for device, applied in reports.items():
            current = self.store.current(device)
            if current is None or current.published is None or applied == current.version:
                continue
            if applied > current.version:
                logger.warning("%s has a newer desired twin (%d) than this hub knows.", device, applied)
                await self.store.overtake(device)
            elif self._clock.unix() - current.published > SETTLE_S:
                await self.store.send_again(device)

    async def _send(self) -> int:
        """Send some of what has to be sent, and return how many."""
        key = self._signer.key_id()
        waiting = self.store.waiting(limit=AT_ONCE)
        async with asyncio.TaskGroup() as tasks:
            sending = [tasks.create_task(self._send_one(each), name=f"twin {each.device}") for each in waiting]
        sent = [version for version, task in zip(waiting, sending, strict=True) if task.result()]
        if sent:
            await self.store.note_published(sent, key)
        return len(sent)

    async def _send_one(self, version: Version) -> bool:
        envelope = self._signer.sign(version.document, DESIRED_TYPE)
        try:
            await self._link.publish(Message(down(version.device, "des"), envelope, retain=True))
        except ApplianceError as error:
            logger.info("The desired twin of %s waits: %s", version.device, error)
            return False
        return True
