"""Connects the simulated devices: one task each, no thread, one socket.

off ─▶ connecting (so many at a time) ─▶ greets ─▶ speaks and listens ─▶ broken ─▶ waits with jitter ─▶ connecting
╰▶ lost on purpose: stays away
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import resource
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import replace

import msgspec

from appliance.core.clock import Clock
from appliance.core.errors import ApplianceError, SettingsError
from appliance.core.fleet import HUB_TOPIC, ROOT, WILL_DELAY_S, TelemetryBatch
from appliance.core.messaging import Message, Subscription
from appliance.hub.simulation.device import Said, SimulatedDevice, batch_message
from appliance.hub.simulation.figures import Latencies, SimulationFigures
from appliance.hub.simulation.traits import Scenario
from appliance.messaging.compression import compress
from appliance.messaging.options import ConnectionOptions, Will
from appliance.messaging.reconnect import Reconnect
from appliance.messaging.session import Session

MOST_CONNECTING = 64
SPARE_DESCRIPTORS = 256
_IDLE_S = 15.0

Options = Callable[[str], ConnectionOptions]
"""How a device of this id connects."""


class SimulatedFleet:
    """Devices that live as long as `run`."""

    def __init__(
        self,
        names: Iterable[str],
        scenario: Scenario,
        options: Options,
        clock: Clock,
        *,
        life: int = 1,
        spread_s: float = 0.0,
        randomness: random.Random | None = None,
    ) -> None:
        """Make devices that are switched off.

        Args:
            names: Their ids.
            scenario: How they behave.
            options: How each connects.
            clock: Tells the time; a device's clock is right.
            life: Rises with each simulation of the same devices: the epochs of this one are above those of the last.
            spread_s: Seconds over which they are switched on.
            randomness: For the jitter.
        """
        self._scenario = scenario
        self._options = options
        self._clock = clock
        self._spread_s = spread_s
        self._random = randomness or random.Random(scenario.seed)  # noqa: S311 - nothing here is a secret
        now = clock.unix()
        self._boxes = [_Box(SimulatedDevice(name, scenario, now, epoch=life << 16, boot=life)) for name in names]
        self._connecting = asyncio.Semaphore(MOST_CONNECTING)
        self._latencies = Latencies()
        self._counts = SimulationFigures(devices=len(self._boxes))

    async def run(self) -> None:
        """Switch the devices on and let them live, until cancelled or until every one was lost on purpose.

        Raises:
            SettingsError: This process may not open so many sockets.
        """
        allow_descriptors(len(self._boxes) + SPARE_DESCRIPTORS)
        async with asyncio.TaskGroup() as group:
            for box in self._boxes:
                group.create_task(self._live(box), name=box.device.id)

    def figures(self) -> SimulationFigures:
        """Return what has been seen so far."""
        counts, devices = replace(self._counts, jobs={}), [box.device for box in self._boxes]
        counts.lost = sum(each.gone for each in devices)
        counts.batches = sum(each.told for each in devices)
        counts.committed = sum(each.kept for each in devices)
        counts.overflowed = sum(each.overflowed for each in devices)
        counts.repeated = sum(each.repeated for each in devices)
        counts.asked = sum(each.asked for each in devices)
        for each in devices:
            for state, number in each.finished.items():
                counts.jobs[state] = counts.jobs.get(state, 0) + number
        counts.p50_s, counts.p99_s = self._latencies.percentiles(0.5, 0.99)
        return counts

    @property
    def connected(self) -> int:
        """Return how many devices are connected; costs nothing, so that it can be asked often."""
        return self._counts.connected

    @property
    def connects(self) -> int:
        """Return how many times the broker accepted one; costs nothing either."""
        return self._counts.connects

    def said(self) -> dict[str, tuple[int, int]]:
        """Return by device the epoch of its newest birth and the version of its newest reported twin."""
        return {box.device.id: box.device.said for box in self._boxes}

    def forget_latencies(self) -> None:
        """Let the percentiles speak of what comes from now on."""
        self._latencies.seconds.clear()

    def stop_telling(self) -> None:
        """Let no device make another batch, so that what is left can be counted."""
        for box in self._boxes:
            box.device.stop_telling()

    async def _live(self, box: _Box) -> None:
        await asyncio.sleep(self._random.random() * self._spread_s)
        state = Reconnect()
        while not box.device.gone:
            state = state.after(await self._session(box))
            if not box.device.gone:
                await asyncio.sleep(state.delay_s(self._random.random(), box.device.hold_off_s))
            state = state.again()

    async def _session(self, box: _Box) -> float | None:
        """Connect and stay until it breaks; returns how long it stood, None if it never did."""
        device = box.device
        try:
            async with self._connecting:
                will = Will(device.begin(self._clock.unix()), delay_s=WILL_DELAY_S)
                session = await Session.open(self._options(device.id), will, box.arrive)
        except ApplianceError as error:
            self._counts.refusals += 1
            self._counts.problem = str(error)
            return None
        since = self._clock.monotonic()
        box.inbox.clear()
        try:
            await session.subscribe([Subscription(f"{ROOT}/dn/{device.id}/#"), Subscription(HUB_TOPIC)])
            self._counts.connects += 1
            self._counts.connected += 1
            box.session = session
            session.on_end = box.wake
            await self._send(session, box, device.greet(self._clock.unix()))
            await self._converse(session, box)
        except ApplianceError as error:
            self._counts.unsent += 1
            self._counts.problem = str(error)
        finally:
            if box.session is not None:
                self._counts.connected -= 1
            box.session = None
            session.abort()
        return self._clock.monotonic() - since

    async def _converse(self, session: Session, box: _Box) -> None:
        device = box.device
        while not session.ended.is_set() and not device.gone:
            while box.inbox:
                await self._hear(session, box, *box.inbox.popleft())
            await self._send(session, box, device.due(self._clock.unix()))
            session.tick()
            if not box.inbox and not session.ended.is_set() and not device.gone:
                await box.news(min(_IDLE_S, max(0.0, device.due_at - self._clock.unix())))

    async def _hear(self, session: Session, box: _Box, message: Message, packet: int) -> None:
        self._counts.received += 1
        await self._send(session, box, box.device.receive(message, self._clock.unix()))
        self._latencies.seconds.extend(box.device.take_round_trips())
        if packet:
            session.acknowledge(packet)

    async def _send(self, session: Session, box: _Box, said: Iterable[Said]) -> None:
        for each in list(said):
            if isinstance(each, TelemetryBatch):
                packed = compress(msgspec.json.encode(each))
                await session.publish(batch_message(box.device.id, each, packed))
            else:
                await session.publish(each)
            self._counts.sent += 1


def allow_descriptors(needed: int) -> None:
    """Let this process open so many files and sockets, as far as the machine lets it.

    Raises:
        SettingsError: It does not.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < needed:
        raise SettingsError(
            f"{needed:,} open sockets are needed, and this user may have {hard:,}.",
            advice="Raise the limit (ulimit -Hn, or nofile in limits.conf), or simulate fewer devices.",
        )
    if soft != resource.RLIM_INFINITY and soft < needed:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


class _Box:
    """A device and its connection."""

    __slots__ = ("_event", "device", "inbox", "session")

    def __init__(self, device: SimulatedDevice) -> None:
        self.device = device
        self.session: Session | None = None
        self.inbox: deque[tuple[Message, int]] = deque()
        self._event = asyncio.Event()

    def arrive(self, _session: Session, message: Message, packet: int) -> None:
        self.inbox.append((message, packet))
        self._event.set()

    def wake(self) -> None:
        self._event.set()

    async def news(self, timeout_s: float) -> None:
        """Wait for a message, the end of the session, or so long."""
        self._event.clear()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                await self._event.wait()
