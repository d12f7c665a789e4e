"""The devices' births, Wills and reported twins, from their messages into the store."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Any

import msgspec

from appliance.core.clock import Clock
from appliance.core.errors import ApplianceError
from appliance.core.fleet import DeviceState, Reported, UpKind, down, up
from appliance.core.messaging import Link, Message
from appliance.hub.device_records import DeviceStore
from appliance.hub.dispatch import Complaints, Dispatcher

logger = logging.getLogger("appliance.hub")

SEEN_EVERY_S = 10.0
"""How often it is written down who was heard of: that much is lost at most when the hub is killed."""

RECONNECT_S = 600.0
"""After so long with a broker whoever is there has said so: devices come back within five minutes."""

_STATES = msgspec.json.Decoder(DeviceState)
_REPORTS = msgspec.json.Decoder(Reported)

Reporting = Callable[[str, Reported], None]
"""Is told of each new reported twin; returns at once."""


class Devices:
    """The part of the hub that keeps track of who is there."""

    kinds: frozenset[UpKind] = frozenset({"state", "rep"})

    def __init__(self, store: DeviceStore, link: Link, complaints: Complaints, clock: Clock) -> None:
        self.store = store
        self._link = link
        self._complaints = complaints
        self._clock = clock
        self._reporting: list[Reporting] = []
        self._dispatcher: Dispatcher | None = None
        self._anew_since: float | None = None

    def on_report(self, reporting: Reporting) -> None:
        """Have somebody told of each new reported twin."""
        self._reporting.append(reporting)

    def watch(self, dispatcher: Dispatcher) -> None:
        """Note whom the dispatcher hears of."""
        self._dispatcher = dispatcher

    def said_anew(self) -> None:
        """Note that from now on the broker says anew who is there."""
        self._anew_since = self._clock.unix()

    async def handle(self, device: str, kind: UpKind, rest: str, message: Message) -> None:  # noqa: ARG002
        """Take in a state or a reported twin."""
        if not message.payload:
            return  # the hub itself cleared the topic
        decoder: msgspec.json.Decoder[Any] = _STATES if kind == "state" else _REPORTS
        try:
            document = decoder.decode(message.payload)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            self._complaints.refuse(device, "bad_document", f"{kind}: {error}")
            return
        if isinstance(document, DeviceState):
            await self._note_state(device, document, message)
        elif await self.store.note_report(device, document, message.payload, retained=message.retain):
            for each in self._reporting:
                each(device, document)

    async def run(self) -> None:
        """Write down who was heard of, and count as lost whom a broker without memory does not know any more."""
        while True:
            await asyncio.sleep(SEEN_EVERY_S)
            await self.write_seen()
            await self._clear_forgotten()
            since = self._anew_since
            if since is not None and self._clock.unix() - since > RECONNECT_S:
                self._anew_since = None
                lost = await self.store.lose_unconfirmed(since)
                if lost:
                    logger.warning("%d devices did not come back to the broker and count as lost", lost)

    async def write_seen(self) -> None:
        """Write down who was heard of since the last time."""
        seen = {} if self._dispatcher is None else self._dispatcher.take_seen()
        if seen:
            await self.store.note_seen(seen)

    async def say_lost(self, device: str) -> None:
        """Say that a device is lost whose connection was ended: its Will, if it was to be delayed, is not said then.

        Raises:
            UnavailableError: There is no connection to the broker.
        """
        found = self.store.find(device)
        if found is not None and found.status == "online":
            state = DeviceState(found.epoch, "lost", found.began, found.agent, found.instance)
            await self._link.publish(Message(up(device, "state"), msgspec.json.encode(state), retain=True))

    async def _clear_forgotten(self) -> None:
        for device in self.store.forgotten() if self._link.connected else ():
            topics = (up(device, "state"), up(device, "rep"), down(device, "des"), down(device, "job"))
            try:
                for topic in topics:
                    await self._link.publish(Message(topic, b"", retain=True))
            except ApplianceError as error:
                logger.info("The broker still keeps messages of %s: %s", device, error)
                return
            await self.store.note_cleared(device)

    async def _note_state(self, device: str, state: DeviceState, message: Message) -> None:
        if len(state.instance) > 64 or not state.instance:
            self._complaints.refuse(device, "bad_document", "state: an instance has 1 to 64 characters")
            return
        verdict = await self.store.note_state(device, state, retained=message.retain)
        if verdict == "clone":
            logger.error("Two boxes use the identity %s; it is in quarantine until a person decides.", device)
        elif verdict == "moved":
            logger.warning("%s is a new installation.", device)
