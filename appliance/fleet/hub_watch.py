"""What the hub says of itself on `all/hub`: whether it is there, what its clock says, and to hold off for a while.

Nothing of it is trusted further than the hub's own commands and jobs: its time judges only their expiry. What a kept
(retained) message says of the time is as old as the message, so only a fresh one or an answer counts.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import random

import msgspec

from appliance.core.clock import Clock
from appliance.core.fleet import HubState
from appliance.core.messaging import Message

LOGGER = logging.getLogger("appliance.fleet")
MOST_HOLD_OFF_S = 3600.0
HEAR_S = 1.0
"""After connecting, the time in which the broker says what it kept of the hub."""
LATEST_UNIX_S = 2.0**33


class HubWatch:
    """Knows whether this box may burden the hub now, and what time the hub has."""

    def __init__(self, clock: Clock) -> None:
        """Know nothing yet."""
        self._clock = clock
        self._down = False
        self._not_before = 0.0
        self._pause_over = 0.0
        self._offset: float | None = None
        self._news = asyncio.Event()

    def connected(self) -> None:
        """Wait a moment for what the broker kept of the hub's last words."""
        self._not_before = self._clock.monotonic() + HEAR_S
        self._tell()

    def hear(self, message: Message) -> None:
        """Take a message on `all/hub`; what is none is left alone."""
        try:
            state = msgspec.json.decode(message.payload, type=HubState)
        except (msgspec.DecodeError, RecursionError) as error:
            LOGGER.warning("the hub's state is none: %s", error)
            return
        if not message.retain:
            self.learn_time(state.at)
        self._down = state.status == "down"
        self._not_before = 0.0
        if state.hold_off_s > 0 and not message.retain:
            share = random.random()  # noqa: S311  (it spreads load and keeps no secret)
            self._pause_over = self._clock.monotonic() + share * min(state.hold_off_s, MOST_HOLD_OFF_S)
        self._tell()

    def learn_time(self, unix: float) -> None:
        """Take over the hub's time, as far as it is one."""
        if 0 < unix < LATEST_UNIX_S:
            self._offset = unix - self._clock.monotonic()

    def heard_unix(self) -> float | None:
        """Return the time by the hub's clock, or None while it was not heard."""
        return None if self._offset is None else self._offset + self._clock.monotonic()

    def unix(self) -> float:
        """Return the time by the hub's clock as far as it was heard, else by our own."""
        heard = self.heard_unix()
        return self._clock.unix() if heard is None else heard

    def lost(self) -> None:
        """Forget whether the hub is up: the connection is gone, and the broker tells anew on the next."""
        self._down = False
        self._tell()

    async def welcome(self) -> None:
        """Wait until the hub is not down, and until this box's share of the time to hold off is over."""
        while (wait_s := self._wait_s()) > 0:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(wait_s if wait_s < math.inf else None):
                    await self._news.wait()

    def _wait_s(self) -> float:
        return math.inf if self._down else max(self._not_before, self._pause_over) - self._clock.monotonic()

    def _tell(self) -> None:
        """Wake those who wait; whoever comes later waits for the next news."""
        self._news.set()
        self._news = asyncio.Event()


class HubClock:
    """The time by which jobs open and expire: the hub, which wrote it there, says what time it is."""

    def __init__(self, clock: Clock, hub: HubWatch) -> None:
        """Go by our own clock until the hub's time was heard."""
        self._clock = clock
        self._hub = hub

    def monotonic(self) -> float:
        """Return seconds from an arbitrary start; never goes back."""
        return self._clock.monotonic()

    def unix(self) -> float:
        """Return seconds since 1970 by the hub's clock as far as it was heard, else by our own."""
        return self._hub.unix()
