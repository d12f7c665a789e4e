"""The hub at the broker: one session that the broker keeps, so that what a killed hub had not committed comes again.

    up      said after each connecting, and again every minute, with the clock; sooner if devices have to hold off;
            what only tells the time at most once, since ten thousand boxes would each confirm it
    down    the Will; and the last word of an orderly stop

A message is acknowledged when its part has it on the disk. A full disk holds the messages up, here and then at the
broker; it loses none of them.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from typing import Literal

import msgspec

from appliance.core.clock import Clock
from appliance.core.errors import ApplianceError, StorageError, UnavailableError, UnreadableDatabaseError
from appliance.core.fleet import HUB_TOPIC, ROOT, HubState
from appliance.core.hub_settings import HubSettings
from appliance.core.messaging import Message, Receive, Subscription
from appliance.hub.backpressure import Backpressure
from appliance.messaging.connection import Connection, ConnectionOptions, TlsFiles, Will

logger = logging.getLogger("appliance.hub")

LANES = 256
"""Messages worked on at once; those that wait for the disk together share one commit."""

GATHER_S = 0.02
"""mosquitto reads one piece a turn, and has long turns while a fleet shakes hands; a confirmation may wait so long."""

SESSION_EXPIRY_S = 24 * 3600
TIMEOUT_S = 30.0
"""What the broker kept of all devices may come before its answer to us."""

SHORT_GAP_S = 60.0
"""So long the broker's queue for us holds all that a fleet says, also when all of it connects again: after it, births
and reported twins are not asked for again, in front of which nothing else would get through."""

STATE_EVERY_S = 60.0
LOOK_EVERY_S = 10.0
"""How often it is looked whether devices have to hold off."""
FAREWELL_S = 2.0
RETRY_S, LONGEST_RETRY_S = 0.5, 30.0


class HubLink:
    """A `core.messaging.Link` that is there before its connection, whose receivers are made with it."""

    def __init__(self, settings: HubSettings, clock: Clock) -> None:
        """Nothing is connected before `run`."""
        self._settings = settings
        self._clock = clock
        self._connection: Connection | None = None
        self._fatal: StorageError | None = None
        self._failed = asyncio.Event()
        self._pressure = Backpressure()

    @property
    def connected(self) -> bool:
        """Return True while the broker has accepted us and the connection stands."""
        return self._connection is not None and self._connection.connected

    @property
    def up(self) -> bool:
        """Return True while the hub hears all that is said to it from now on, and has said that it is up."""
        return self._connection is not None and self._connection.greeted

    async def publish(self, message: Message) -> None:
        """Send a message; see `core.messaging.Link`."""
        if self._connection is None:
            raise UnavailableError("The hub has no connection to the broker yet.")
        await self._connection.publish(message)

    async def run(self, receive: Receive, subscriptions: Sequence[Subscription], on_anew: Callable[[], None]) -> None:
        """Stay connected until cancelled; `on_anew` is called before the broker says anew who is there.

        Raises:
            StorageError: The database cannot be written to, and will not be.
        """
        self._connection = Connection(
            connection_options(self._settings),
            lambda message: self._keep_at_it(receive, message),
            subscriptions=subscriptions,
            will=lambda: Will(_state_message(HubState("down", self._clock.unix()))),
            on_connected=self._say_up,
            lanes=LANES,
            at_once=True,
            short_gap_s=SHORT_GAP_S,
            on_anew=on_anew,
            clock=self._clock,
        )
        async with asyncio.TaskGroup() as tasks:
            running = tasks.create_task(self._connection.run(), name="broker")
            telling = tasks.create_task(self._tell_time(), name="hub state")
            await self._failed.wait()
            running.cancel()
            telling.cancel()
        if self._fatal is not None:
            raise self._fatal

    async def say_farewell(self) -> None:
        """Tell the devices that the hub stops, if they can be told at once."""
        if self._connection is None or not self._connection.connected:
            return
        try:
            async with asyncio.timeout(FAREWELL_S):
                await self._connection.say_farewell(_state_message(HubState("down", self._clock.unix())))
        except (ApplianceError, TimeoutError) as error:
            logger.info("the broker did not take the farewell: %s", error or f"not within {FAREWELL_S:g} s")

    async def _say_up(self, hold_off_s: float = 0.0, qos: Literal[0, 1] = 1) -> None:
        await self.publish(_state_message(HubState("up", self._clock.unix(), hold_off_s), qos))

    async def _tell_time(self) -> None:
        """Tell the devices the time now and then, and at once that they have to hold off, or need not any more."""
        told_at, told = self._clock.monotonic(), 0.0
        while True:
            await asyncio.sleep(LOOK_EVERY_S)
            hold_off_s = self._pressure.take()
            due = self._clock.monotonic() - told_at >= STATE_EVERY_S
            if self.connected and (due or hold_off_s or told):
                try:
                    await self._say_up(hold_off_s, qos=0 if hold_off_s == told else 1)
                except ApplianceError as error:
                    logger.info("the hub's time could not be told: %s", error)
                    continue
                told_at, told = self._clock.monotonic(), hold_off_s
                if hold_off_s:
                    logger.warning("the hub falls behind: devices are to spread telemetry over %.0f s", hold_off_s)

    async def _keep_at_it(self, receive: Receive, message: Message) -> None:
        """Have a message received, again and again while the disk is full: what is given up here is lost."""
        device, _, stream = message.topic.removeprefix(f"{ROOT}/up/").partition("/tm/")
        if stream:
            self._pressure.note(device, message.expiry_s)
        wait_s = RETRY_S
        while True:
            try:
                await receive(message)
            except UnreadableDatabaseError as error:
                self._fatal = error
                self._failed.set()
                await asyncio.Event().wait()  # never acknowledged: the connection ends
            except StorageError as error:
                logger.warning("A message on %s waits for the disk: %s", message.topic[:100], error)
                await asyncio.sleep(wait_s)
                wait_s = min(2 * wait_s, LONGEST_RETRY_S)
            else:
                return


def connection_options(settings: HubSettings) -> ConnectionOptions:
    """Return how the hub connects to its broker."""
    return ConnectionOptions(
        host=settings.broker_host,
        port=settings.broker_port,
        client_id="hub",
        tls=TlsFiles(settings.authority_path, settings.hub_certificate_path, settings.hub_key_path),
        clean_start=False,
        session_expiry_s=SESSION_EXPIRY_S,
        receive_maximum=4 * LANES,
        most_in_flight=LANES,
        gather_s=GATHER_S,
        timeout_s=TIMEOUT_S,
    )


def _state_message(state: HubState, qos: Literal[0, 1] = 1) -> Message:
    return Message(HUB_TOPIC, msgspec.json.encode(state), qos, retain=True)
