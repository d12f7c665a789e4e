"""Telemetry: brings what the outbox holds to the hub, and deletes it once the hub has said that it is committed.

The broker's word counts for nothing here: it may forget what it took. After each connecting everything that waits is
sent anew, the newest health first; the hub keeps each row only once.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import msgspec

from appliance.core.clock import Clock
from appliance.core.errors import ApplianceError
from appliance.core.fleet import (
    BATCH_EXPIRY_S,
    LARGEST_BATCH_BYTES,
    STREAMS,
    DownKind,
    Stream,
    TelemetryAck,
    TelemetryBatch,
    TelemetryRow,
    up,
)
from appliance.core.messaging import Link, Message
from appliance.fleet.pace import HISTORY_ORDER, LIVE_ORDER, USUAL, Flight, Pace, PaceLimits
from appliance.messaging.compression import LARGEST_PLAIN_BYTES, compress
from appliance.store.outbox import Outbox
from appliance.store.outbox_rows import GAP, Row, content
from appliance.store.outbox_schema import Position

LOGGER = logging.getLogger("appliance.fleet")

MOST_ROWS = 500
"""In a batch: at the hub they take a few hundredths of a second, for which live rows of others wait."""

_START: Position = (0, 0)
_AWAY_S = 0.5


@dataclass(frozen=True, slots=True)
class _Batch:
    flight: Flight
    payload: bytes


class Telemetry:
    """The part of the agent that sends telemetry and reads `ack`.

    Attributes:
        published: Batches that went, repeated ones included.
        refused: Batches that the hub refused.
    """

    def __init__(
        self,
        outbox: Outbox,
        link: Link,
        device: str,
        clock: Clock,
        *,
        welcome: Callable[[], Awaitable[None]],
        limits: PaceLimits = USUAL,
        job_acknowledged: Callable[[int], None] | None = None,
    ) -> None:
        """Send nothing before `connected`.

        Args:
            outbox: What waits.
            link: The connection.
            device: This device's id.
            clock: For the pace.
            welcome: Returns once the hub is up and wants to be spoken to.
            limits: How much may be under way.
            job_acknowledged: Told up to which sequence of the device's journal the hub has the job reports.
        """
        self._outbox = outbox
        self._link = link
        self._device = device
        self._clock = clock
        self._welcome = welcome
        self._pace = Pace(limits)
        self._job_acknowledged = job_acknowledged
        self._ready = False
        self._news = outbox.changed
        self._marks: dict[Stream, Position] = dict.fromkeys(STREAMS, _START)
        self._live: dict[Stream, Position] = dict.fromkeys(STREAMS, _START)
        self._history: dict[Stream, Position] = dict.fromkeys(STREAMS, _START)
        self.published = 0
        self.refused = 0

    @property
    def kinds(self) -> frozenset[DownKind]:
        """Return the topic it reads."""
        return frozenset({"ack"})

    async def connected(self) -> None:
        """Begin anew: the newest health first, then what comes, and all that waits in between."""
        self._pace.connected()
        for stream in STREAMS:
            newest = self._outbox.newest(stream)
            self._marks[stream] = newest if stream in HISTORY_ORDER else _START
            self._live[stream] = self._marks[stream]
            self._history[stream] = _START
        boot, sequence = self._marks["health"]
        if sequence:
            self._live["health"] = self._marks["health"] = (boot, sequence - 1)
        self._ready = True
        self._news.set()

    async def handle(self, kind: DownKind, message: Message) -> None:  # noqa: ARG002
        """Take an acknowledgement."""
        ack = read_ack(message)
        if ack is None:
            return
        if (up_to := acknowledged_reports(ack)) is not None:
            if self._job_acknowledged is not None:
                self._job_acknowledged(up_to)
        elif not 0 < ack.first <= ack.up_to:
            LOGGER.warning("an acknowledgement of telemetry is from %d to %d", ack.first, ack.up_to)
        else:
            await self._settle(ack)

    async def run(self) -> None:
        """Send what there is, until cancelled."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._outbox.run(), name="outbox")
            while True:
                self._news.clear()
                await asyncio.sleep(0)  # acknowledgements are heard even if there is always something to send
                if not await self._send_one():
                    await self._wait()

    async def _settle(self, ack: TelemetryAck) -> None:
        if ack.refused:
            self.refused += 1
            LOGGER.error(
                "the hub refuses rows %d to %d of %s (boot %d) for good: %s",
                *(ack.first, ack.up_to, ack.stream, ack.boot, ack.refused),
            )
            await self._outbox.refuse(ack.stream, ack.boot, ack.first, ack.up_to)
        else:
            await self._outbox.acknowledge(ack.stream, ack.boot, ack.first, ack.up_to)
        self._pace.acknowledged(ack.stream, ack.boot, ack.up_to, self._clock.monotonic())
        if ack.refused:  # the gap in their place is behind what is read: it goes as a repetition
            self._pace.sent(Flight(ack.stream, ack.boot, ack.first, ack.up_to, 0, live=True, sent_at=float("-inf")))
        self._news.set()

    async def _wait(self) -> None:
        history = self._ready and any(self._find_history(each, 1) for each in HISTORY_ORDER)
        wait_s = self._pace.wait_s(self._clock.monotonic(), history=history) if self._ready else None
        try:
            async with asyncio.timeout(wait_s):
                await self._news.wait()
        except TimeoutError:
            return

    async def _send_one(self) -> bool:
        """Send the batch whose turn it is. Returns False if none may go now."""
        if not self._ready:
            return False
        asked_at = self._clock.monotonic()
        await self._welcome()
        if self._clock.monotonic() - asked_at > _AWAY_S:  # the hub was away: what was under way may be lost with it
            await self.connected()
        try:
            return await self._repeat() or await self._send_live() or await self._send_history()
        except ApplianceError as error:
            LOGGER.info("telemetry waits for the connection: %s", error)
            self._ready = self._link.connected  # else until `connected`
            return False

    async def _repeat(self) -> bool:
        late = self._pace.due(self._clock.monotonic())
        if late is None:
            return False
        rows = self._read(late.stream, (late.boot, late.first - 1), (late.boot, late.last), MOST_ROWS)
        self._pace.dropped(late)
        if rows:
            batch = self._pack(rows, live=late.live, tries=late.tries + 1)
            if batch.flight.last < late.last:
                self._pace.sent(replace(late, first=batch.flight.last + 1))
            await self._publish(batch)
        return True

    async def _send_live(self) -> bool:
        if not self._pace.may_send(self._clock.monotonic(), live=True):
            return False
        for stream in LIVE_ORDER:
            newest = self._outbox.newest(stream)
            if self._live[stream] < newest:
                rows = self._read(stream, self._live[stream], newest, MOST_ROWS)
                if rows:
                    batch = self._pack(rows, live=True)
                    self._live[stream] = batch.flight.boot, batch.flight.last
                    await self._publish(batch)
                    return True
                self._live[stream] = newest
        return False

    async def _send_history(self) -> bool:
        if not self._pace.may_send(self._clock.monotonic(), live=False):
            return False
        for stream in HISTORY_ORDER:
            if rows := self._find_history(stream, MOST_ROWS):
                batch = self._pack(rows, live=False)
                self._history[stream] = batch.flight.boot, batch.flight.last
                await self._publish(batch)
                return True
        return False

    def _find_history(self, stream: Stream, most: int) -> list[Row]:
        if self._history[stream] >= self._marks[stream]:
            return []
        rows = self._read(stream, self._history[stream], self._marks[stream], most)
        if not rows:
            self._history[stream] = self._marks[stream]
        return rows

    def _read(self, stream: Stream, after: Position, until: Position, most: int) -> list[Row]:
        return self._outbox.rows_after(stream, after, until, most=most, most_bytes=LARGEST_PLAIN_BYTES * 3 // 4)

    def _pack(self, rows: Sequence[Row], *, live: bool, tries: int = 1) -> _Batch:
        """Return as many of the rows as fit into a batch, one at least."""
        rows, payload = _pack(rows)
        stream, boot, first, last = rows[0].stream, rows[0].boot, rows[0].first, rows[-1].last
        now = self._clock.monotonic()
        return _Batch(Flight(stream, boot, first, last, len(payload), live, now, tries), payload)

    async def _publish(self, batch: _Batch) -> None:
        """Send a batch; it is under way from now on, whatever becomes of it.

        Raises:
            UnavailableError: The connection broke.
        """
        flight = batch.flight
        self._pace.sent(flight)
        self.published += 1
        name = f"{flight.boot}.{flight.first}.{flight.last}".encode()
        topic = up(self._device, "tm", flight.stream)
        await self._link.publish(Message(topic, batch.payload, expiry_s=BATCH_EXPIRY_S, correlation=name))


def _pack(rows: Sequence[Row]) -> tuple[Sequence[Row], bytes]:
    """Return as many rows as fit into a batch, one at least, and the batch as it is sent."""
    while True:
        batch = TelemetryBatch(rows[0].stream, rows[0].boot, rows[0].first, rows[-1].last, [_told(row) for row in rows])
        plain = msgspec.json.encode(batch)
        payload = compress(plain)
        if len(rows) == 1 or (len(payload) <= LARGEST_BATCH_BYTES and len(plain) <= LARGEST_PLAIN_BYTES):
            return rows, payload
        rows = rows[: len(rows) // 2]


def _told(row: Row) -> TelemetryRow:
    # What is JSON already goes as it is; a gap's body is made here.
    body = content(row) if row.kind == GAP else msgspec.Raw(row.body)
    return TelemetryRow(row.last, row.until, row.kind, cast("dict[str, Any]", body))


def read_ack(message: Message) -> TelemetryAck | None:
    """Return an acknowledgement, or None and a log line if it makes no sense."""
    try:
        return msgspec.json.decode(message.payload, type=TelemetryAck)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        LOGGER.warning("an acknowledgement of telemetry makes no sense: %s", error)
        return None


def acknowledged_reports(ack: TelemetryAck) -> int | None:
    """Return up to which sequence job reports are acknowledged, or None if it is of telemetry."""
    return ack.up_to if ack.stream == "job" and ack.boot == 0 else None
