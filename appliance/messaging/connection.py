"""The connection of one end of the fleet to the broker: it comes back by itself, for ever.

    run ─▶ open ─▶ subscribe ─▶ on_connected ─▶ messages go to the lanes ─▶ broken ─▶ wait ─▶ open ─▶ …

A lane takes one message at a time, and messages of one topic go to one lane, so their order is kept. The lanes outlive
a connection: what has been received is worked off, connected or not.
"""

from __future__ import annotations

import asyncio
import logging
import random
import zlib
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import NoReturn

from appliance.core.clock import Clock, SystemClock
from appliance.core.errors import ApplianceError, UnavailableError
from appliance.core.messaging import Message, Receive, Subscription
from appliance.messaging.options import ConnectionOptions, TlsFiles, Will
from appliance.messaging.reconnect import Reconnect
from appliance.messaging.session import Session

__all__ = ["Connection", "ConnectionFigures", "ConnectionOptions", "TlsFiles", "Will"]

LOGGER = logging.getLogger("appliance.messaging")

MOST_WAITING = 1024
MOST_WAITING_BYTES = 16 * 1024 * 1024


@dataclass(slots=True)
class ConnectionFigures:
    """Counts since the program started.

    Attributes:
        connects: Times that the broker accepted us.
        attempts: Times that it was tried.
        received: Messages.
        dropped: Messages of QoS 0 that came while too many others waited.
        failed: Messages whose handler raised an error; a mistake of ours.
    """

    connects: int = 0
    attempts: int = 0
    received: int = 0
    dropped: int = 0
    failed: int = 0


_Waiting = tuple[Session, Message, int]


class Connection:
    """A `core.messaging.Link`; somebody must `run` it."""

    def __init__(
        self,
        options: ConnectionOptions,
        receive: Receive,
        *,
        subscriptions: Sequence[Subscription] = (),
        will: Callable[[], Will | Awaitable[Will]] | None = None,
        on_connected: Callable[[], Awaitable[None]] | None = None,
        on_disconnected: Callable[[str], Awaitable[None]] | None = None,
        lanes: int = 1,
        at_once: bool = False,
        short_gap_s: float = 0.0,
        on_anew: Callable[[], None] | None = None,
        clock: Clock | None = None,
        uniform: Callable[[], float] = random.random,
    ) -> None:
        """Prepare a connection.

        Args:
            options: Where and how.
            receive: Takes each message; what it raises is logged, and the message counts as handled.
            subscriptions: Made at each connecting.
            will: Called before each connecting, so that it can carry what is new about the session; may write it down
                first.
            on_connected: Awaited after each connecting, before a message is handled: it may publish, but an answer
                would not reach it.
            on_disconnected: Awaited after each session's end with the reason, such as `Session taken over`.
            lanes: Messages handled at the same time; those of one topic one after the other.
            at_once: Messages are handled from the broker's acceptance on, before `on_connected`: for whoever may be
                sent so many that the broker's other answers come behind them.
            short_gap_s: After a gap no longer than this, a broker that kept our session is not asked again for all that
                it keeps (retained): what came meanwhile is in its queue.
            on_anew: Called before the broker says again all that it keeps; at once, or when it has lost our session.
            clock: Tells how long a connection stood.
            uniform: Returns a random number from 0 to 1.
        """
        self.figures = ConnectionFigures()
        self._options = options
        self._receive = receive
        self._subscriptions = tuple(subscriptions)
        self._will = will
        self._on_connected = on_connected
        self._on_disconnected = on_disconnected
        self._clock = clock or SystemClock()
        self._uniform = uniform
        self._session: Session | None = None
        self._up = asyncio.Event()
        self._lanes: list[asyncio.Queue[_Waiting]] = [asyncio.Queue() for _ in range(lanes)]
        self._at_once = at_once
        self._short_gap_s = short_gap_s
        self._on_anew = on_anew
        self._left_at: float | None = None
        self._early: list[_Waiting] | None = None
        self._paused: Session | None = None
        self._waiting = 0
        self._waiting_bytes = 0
        self._owed = 0
        self._held_off_until = 0.0
        self._leaving = False

    @property
    def connected(self) -> bool:
        """Return True while the broker has accepted us and the connection stands."""
        return self._session is not None and not self._session.ended.is_set()

    @property
    def greeted(self) -> bool:
        """Return True from when all subscriptions are made and `on_connected` is done, while the connection stands."""
        return self._up.is_set()

    async def until_connected(self) -> None:
        """Wait until there is a connection, `on_connected` included; whoever waits has a deadline of his own."""
        await self._up.wait()

    async def publish(self, message: Message) -> None:
        """Send a message.

        Returns:
            For QoS 1 once the broker has taken it over, for QoS 0 once it is in the socket's buffer.

        Raises:
            UnavailableError: There is no connection, or it broke before the broker confirmed: whether the message
                arrived is not known.
            TooLargeError: It is larger than the broker takes.
            PermissionDeniedError: The broker does not let us write there.
            InvalidRequestError: No broker could take it: the topic has a wildcard, for example.
        """
        session = self._session
        if session is None or session.ended.is_set():
            raise UnavailableError("There is no connection to the broker.")
        await session.publish(message)

    def hold_off(self, seconds: float) -> None:
        """Do not connect again before so many seconds from now; a connection that stands is not touched."""
        self._held_off_until = self._clock.monotonic() + max(0.0, seconds)

    def reconnect(self) -> None:
        """End the connection, if there is one, so that the next one is made with the files as they are then."""
        if self._session is not None:
            self._session.close(with_will=False)

    async def say_farewell(self, message: Message) -> None:
        """Publish the last message of a session: when `run` is cancelled after it, the broker keeps the Will to itself.

        Raises:
            UnavailableError: As for `publish`.
        """
        await self.publish(message)
        self._leaving = True

    async def run(self) -> NoReturn:
        """Connect, and again whenever the connection is lost, until cancelled."""
        async with asyncio.TaskGroup() as group:
            for number, lane in enumerate(self._lanes):
                group.create_task(self._work(lane), name=f"messages {number}")
            state = Reconnect()
            while True:
                state = state.after(await self._once())
                hold_off = self._held_off_until - self._clock.monotonic()
                await asyncio.sleep(state.delay_s(self._uniform(), hold_off))
                state = state.again()

    async def _once(self) -> float | None:
        """Connect and stay until it breaks; return how long it stood, None if it never did."""
        session: Session | None = None
        since: float | None = None
        self.figures.attempts += 1
        self._early = None if self._at_once else []
        anew = self._left_at is None or self._clock.monotonic() - self._left_at > self._short_gap_s
        try:
            will = await self._next_will()
            self._tell_anew(anew)
            session = await Session.open(self._options, will, self._arrived)
            self._tell_anew(not anew and not session.resumed)
            if self._at_once:
                self._session = session
            await session.subscribe(self._subscriptions, anew=anew)
            since = self._clock.monotonic()
            await self._stay(session)
        except ApplianceError as error:
            LOGGER.warning("%s", error)
        finally:
            self._session = self._paused = None
            self._up.clear()
            self._release_early()
            if session is not None:
                session.close(with_will=not self._leaving)
            if since is not None:
                self._left_at = self._clock.monotonic()
        if session is not None and self._on_disconnected is not None:
            await self._on_disconnected(session.reason)
        return None if since is None else self._clock.monotonic() - since

    def _tell_anew(self, anew: bool) -> None:
        if anew and self._on_anew is not None:
            self._on_anew()

    async def _next_will(self) -> Will | None:
        made = self._will() if self._will else None
        return made if made is None or isinstance(made, Will) else await made

    async def _stay(self, session: Session) -> None:
        async with asyncio.TaskGroup() as group:
            group.create_task(session.keep_alive(), name="keep alive")
            self._session = session
            self.figures.connects += 1
            LOGGER.info("Connected to the broker at %s:%d.", self._options.host, self._options.port)
            greeting = group.create_task(self._greet(session), name="after connecting")
            await session.ended.wait()
            greeting.cancel()
        LOGGER.warning("The connection to the broker ended: %s.", session.reason)

    async def _greet(self, session: Session) -> None:
        try:
            if self._on_connected is not None:
                await self._on_connected()
        except UnavailableError as error:
            LOGGER.warning("What has to be said after connecting could not be said: %s", error)
            session.close(with_will=True)
            return
        except Exception:
            LOGGER.exception("What has to be said after connecting failed on a mistake of ours; connecting again.")
            session.close(with_will=True)
            return
        self._release_early()
        self._up.set()

    def _arrived(self, session: Session, message: Message, packet: int) -> None:
        self.figures.received += 1
        if message.qos:
            enough = self._owed >= 2 * self._options.receive_maximum
            if enough and self._early is not None:
                session.give_up("messages come faster than they are handled")
                return
            if enough:  # of sessions before; and mosquitto 2.0 sends all it has once one is acknowledged
                session.pause()
                self._paused = session
            self._owed += 1
        elif self._waiting >= MOST_WAITING or self._waiting_bytes + len(message.payload) > MOST_WAITING_BYTES:
            self.figures.dropped += 1
            return
        self._waiting += 1
        self._waiting_bytes += len(message.payload)
        if self._early is not None:
            self._early.append((session, message, packet))
        else:
            self._assign((session, message, packet))

    def _release_early(self) -> None:
        early, self._early = self._early or [], None
        for each in early:
            self._assign(each)

    def _assign(self, waiting: _Waiting) -> None:
        lane = zlib.crc32(waiting[1].topic.encode()) % len(self._lanes)
        self._lanes[lane].put_nowait(waiting)

    async def _work(self, lane: asyncio.Queue[_Waiting]) -> NoReturn:
        while True:
            session, message, packet = await lane.get()
            try:
                await self._receive(message)
            except Exception:
                self.figures.failed += 1
                LOGGER.exception("The handler of a message on %s failed; the message is given up.", message.topic)
            finally:
                self._waiting -= 1
                self._waiting_bytes -= len(message.payload)
                self._owed -= message.qos
            if packet:
                session.acknowledge(packet)
            if self._paused is not None and self._owed <= self._options.receive_maximum:
                paused, self._paused = self._paused, None
                paused.resume()
