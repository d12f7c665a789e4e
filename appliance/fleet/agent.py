"""The agent: this box's session at the broker, and the parts that it hands each message to.

    before connecting   the session's epoch is raised and on the disk; the Will says `lost` in this epoch
    connected           birth: `online`, kept by the broker; then each part says what it has to say anew
    a message           goes to the one part that reads its topic; a part that fails is logged, never more
    an orderly end      `stopping`, then a clean goodbye, so that the broker keeps the Will to itself

Nothing here reaches serving: a broker, hub or network that is away costs reconnecting with jitter, and a part that
raises is started anew after a while. A session that is ended again and again may mean that another box has our
identity: we slow down and raise an alarm.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Literal, Protocol, cast

import msgspec

from appliance import __version__
from appliance.core.clock import Clock
from appliance.core.errors import ApplianceError, UnreadableDatabaseError
from appliance.core.fleet import HUB_TOPIC, ROOT, DeviceState, DownKind, Question, up
from appliance.core.messaging import Link, Message, Subscription
from appliance.fleet.clones import HOLD_OFF_S, CloneWatch
from appliance.fleet.device_ledger import DeviceLedger
from appliance.fleet.hub_watch import HubWatch
from appliance.fleet.part import Asking, FleetPart
from appliance.observe.fleet_metrics import FleetMetrics

LOGGER = logging.getLogger("appliance.fleet")
LONGEST_RESTART_S = 300.0
GOODBYE_S = 2.0
ASK_TIME_AGAIN_S = 60.0
ALARM_AGAIN_S = 3600.0

Alarm = Callable[[str, dict[str, Any]], Awaitable[None]]
"""Raises an alarm of a kind, with figures; it reaches the hub when it can."""


def subscriptions(device: str) -> Sequence[Subscription]:
    """Return what a device reads: its own branch, and what is for all."""
    return [Subscription(HUB_TOPIC), Subscription(f"{ROOT}/dn/{device}/+")]


class Leaving(Link, Protocol):
    """A link that can be left so that nobody is told that it was lost."""

    async def say_farewell(self, message: Message) -> None:
        """Publish the last message of a session. Raises as `publish`."""
        ...


class FleetAgent:
    """Owns the session and the dispatch; `messaging` owns the connection and calls what is here."""

    def __init__(
        self,
        device: str,
        instance: str,
        link: Leaving,
        ledger: DeviceLedger,
        *,
        hub: HubWatch,
        asking: Asking,
        parts: Sequence[FleetPart],
        clock: Clock,
        metrics: FleetMetrics,
        alarm: Alarm,
    ) -> None:
        """Hand messages to parts, each of which reads topics of its own.

        Raises:
            ValueError: Two parts want the same topic.
        """
        self._device = device
        self._link = link
        self._ledger = ledger
        self._instance = instance
        self._hub = hub
        self._asking = asking
        self._parts = parts
        self._readers: dict[str, FleetPart] = {}
        for part in parts:
            if taken := part.kinds & self._readers.keys():
                raise ValueError(f"{sorted(taken)} have two readers")
            self._readers.update(dict.fromkeys(part.kinds, part))
        self._clock = clock
        self._metrics = metrics
        self._alarm = alarm
        self._clones = CloneWatch()
        self._since = clock.monotonic()
        self._alarm_again = self._since
        self._state = DeviceState(0, "lost", 0.0, __version__, instance)
        self._connected = asyncio.Event()
        self._damaged = asyncio.Event()
        self._damage: UnreadableDatabaseError | None = None

    # The session, as the connection tells of it

    async def opening(self) -> Message:
        """Begin a new session and return its Will.

        Raises:
            StorageError: The epoch cannot be written; a session without one of its own must not be.
        """
        try:
            epoch = await self._ledger.next_epoch()
        except UnreadableDatabaseError as error:
            self._note_damage(error)
            raise
        self._since = self._clock.monotonic()
        self._state = DeviceState(epoch, "lost", self._clock.unix(), __version__, self._instance)
        return self._message("lost")

    async def opened(self) -> None:
        """Say that this box is there, and let each part say what it has to say anew.

        Raises:
            UnavailableError: The connection is gone already.
        """
        self._hub.connected()
        await self._link.publish(self._message("online"))
        self._metrics.connected()
        LOGGER.info("connected to the fleet's broker, session %d", self._state.epoch)
        for part in self._parts:
            await self._guarded(part, part.connected())
        self._connected.set()

    async def closed(self, *, taken_over: bool) -> float:
        """Note that the session ended; return the seconds to stay away beyond the usual."""
        self._connected.clear()
        self._hub.lost()
        self._metrics.disconnected()
        now = self._clock.monotonic()
        if not self._clones.ended(now, now - self._since, taken_over=taken_over):
            return 0.0
        LOGGER.error(
            "another box uses the identity of %s, or its connection never stands: connecting again in %g s",
            self._device,
            HOLD_OFF_S,
        )
        if now >= self._alarm_again:
            self._alarm_again = now + ALARM_AGAIN_S
            await self._raise_alarm("cloned_identity", {"epoch": self._state.epoch, "instance": self._instance})
        return HOLD_OFF_S

    async def receive(self, message: Message) -> None:
        """Hand a message to the part that reads it, which has greeted the hub by then; return when it is done."""
        if message.topic == HUB_TOPIC:
            self._hub.hear(message)
            return
        branch, _, kind = message.topic.rpartition("/")
        part = self._readers.get(kind) if branch == f"{ROOT}/dn/{self._device}" else None
        if part is None:
            LOGGER.warning("a message on %r is not for this box", message.topic[:200])
            return
        await self._guarded(part, part.handle(cast("DownKind", kind), message))

    async def say_goodbye(self) -> None:
        """Tell the hub that this end is meant, if it can be told at once."""
        try:
            async with asyncio.timeout(GOODBYE_S):
                await self._link.say_farewell(self._message("stopping"))
        except (TimeoutError, ApplianceError) as error:
            LOGGER.info("the hub was not told that this end is meant, and will hear that this box is lost: %s", error)

    # Work in between

    async def run(self) -> None:
        """Let the parts work until cancelled, connected or not.

        Raises:
            UnreadableDatabaseError: What is stored has been damaged meanwhile: the next session mends it.
        """
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._end_when_damaged(), name="fleet record")
            tasks.create_task(self._learn_time(), name="fleet time")
            for part in self._parts:
                tasks.create_task(self._keep_running(part), name=f"fleet {type(part).__name__}")

    def _note_damage(self, error: UnreadableDatabaseError) -> None:
        self._damage = error
        self._damaged.set()

    async def _end_when_damaged(self) -> None:
        await self._damaged.wait()
        assert self._damage is not None, "it is set before the event"
        raise self._damage

    async def _keep_running(self, part: FleetPart) -> None:
        failures = 0
        while not await self._guarded(part, part.run()):
            failures += 1
            longest = min(LONGEST_RESTART_S, 2.0**failures)
            await asyncio.sleep(random.uniform(0, longest))  # noqa: S311  (it spreads load and keeps no secret)

    async def _guarded(self, part: FleetPart, work: Awaitable[None]) -> bool:
        """Return whether a part's work ended well; what it raises is logged and goes no further."""
        try:
            await work
        except UnreadableDatabaseError as error:
            self._note_damage(error)
        except ApplianceError as error:
            LOGGER.warning("%s of the fleet's agent failed: %s", type(part).__name__, error)
        except Exception:
            LOGGER.exception("%s of the fleet's agent failed", type(part).__name__)
        else:
            return True
        self._metrics.part_failed()
        return False

    async def _learn_time(self) -> None:
        """Ask for the hub's time in each session until it is told."""
        while True:
            await self._connected.wait()
            await self._hub.welcome()
            try:
                self._hub.learn_time((await self._asking.ask(Question("time"))).now)
                self._connected.clear()
            except ApplianceError as error:
                LOGGER.info("the hub's time is not known: %s", error)
                await asyncio.sleep(ASK_TIME_AGAIN_S)

    def _message(self, status: Literal["online", "lost", "stopping"]) -> Message:
        state = msgspec.structs.replace(self._state, status=status)
        return Message(up(self._device, "state"), msgspec.json.encode(state), retain=True)

    async def _raise_alarm(self, kind: str, body: dict[str, Any]) -> None:
        try:
            await self._alarm(kind, body)
        except ApplianceError as error:
            LOGGER.warning("the alarm %s was not kept: %s", kind, error)
