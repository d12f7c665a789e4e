"""The hub's end of telemetry: many batches of many devices in one transaction, and a word to each once it is committed.

    handle   checks a batch whole, queues it, and returns when it is committed: only then the broker forgets it
    run      commits what has queued up meanwhile, then acknowledges; a hub that is killed in between is told again

What will never be taken, the device is told by the name that it gave the batch, and puts a gap in its place: it does
not come again. What the disk did not take is not acknowledged and comes again.
"""

from __future__ import annotations

import asyncio
import logging
import re
from dataclasses import dataclass
from typing import get_args

import msgspec

from appliance.core.clock import Clock
from appliance.core.errors import ApplianceError, InvalidRequestError, StorageError, TooLargeError
from appliance.core.fleet import LARGEST_BATCH_BYTES, Stream, TelemetryAck, TelemetryBatch, UpKind, down
from appliance.core.messaging import Link, Message
from appliance.hub.batches import Batch, refusal, sound
from appliance.hub.telemetry_records import Received, TelemetryStore
from appliance.messaging.compression import decompress

LOGGER = logging.getLogger("appliance.hub")

MOST_AT_ONCE = 10_000
"""Rows of one transaction, but for the last batch."""

MOST_QUEUED_BYTES = 8 * 1024 * 1024
"""Of compressed batches and what is made of them; who comes later waits, and so does the broker."""

ACK_EXPIRY_S = 60
TRIM_EVERY_S = 600.0
LOG_EVERY_S = 60.0
_UNPACKED = 16
_NAME = re.compile(rb"(\d{1,15})\.(\d{1,15})\.(\d{1,15})")


@dataclass(frozen=True, slots=True)
class Retention:
    """How long telemetry is kept: seconds since it came, and rows of one stream of one device."""

    age_s: float = 90 * 86_400.0
    rows: int = 200_000


USUAL = Retention()


@dataclass(frozen=True, slots=True)
class _Waiting:
    received: Received
    done: asyncio.Future[None]


class TelemetryIngest:
    """The part of the hub that reads `tm`.

    Attributes:
        committed: Batches that were committed, repeated ones included.
        refused: Batches that were refused.
    """

    def __init__(self, store: TelemetryStore, link: Link, clock: Clock, *, retention: Retention = USUAL) -> None:
        """Commit nothing before `run`."""
        self._store = store
        self._link = link
        self._clock = clock
        self._retention = retention
        self._queue: list[_Waiting] = []
        self._news = asyncio.Event()
        self._room = asyncio.Condition()
        self._held_bytes = 0
        self._logged: dict[str, float] = {}
        self.committed = 0
        self.refused = 0

    @property
    def kinds(self) -> frozenset[UpKind]:
        """Return the topic it reads."""
        return frozenset({"tm"})

    async def handle(self, device: str, kind: UpKind, rest: str, message: Message) -> None:  # noqa: ARG002
        """Take a batch; returns when it is committed or refused."""
        held = min(len(message.payload), LARGEST_BATCH_BYTES) * _UNPACKED
        async with self._room:
            await self._room.wait_for(lambda: self._held_bytes == 0 or self._held_bytes + held <= MOST_QUEUED_BYTES)
            self._held_bytes += held
        try:
            batch = _read(device, rest, message.payload)
            done = asyncio.get_running_loop().create_future()
            self._queue.append(_Waiting(Received(batch, self._clock.unix()), done))
            self._news.set()
            await done
        except (InvalidRequestError, TooLargeError) as error:
            await self._refuse(device, rest, message, error)
        except ApplianceError as error:
            LOGGER.warning("telemetry of %s is not kept, and will come again: %s", device, error)
        finally:
            async with self._room:
                self._held_bytes -= held
                self._room.notify_all()

    async def run(self) -> None:
        """Commit and acknowledge, and delete what is too old or too much, until cancelled."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._trim(), name="telemetry retention")
            while True:
                await self._news.wait()
                self._news.clear()
                while group := self._next_group():
                    await self._commit(group)

    def _next_group(self) -> list[_Waiting]:
        rows = number = 0
        while number < len(self._queue) and rows < MOST_AT_ONCE:
            batch = self._queue[number].received.batch
            rows += len(batch.facts) + len(batch.gaps)
            number += 1
        group, self._queue = self._queue[:number], self._queue[number:]
        return group

    async def _commit(self, group: list[_Waiting]) -> None:
        try:
            await self._store.keep([each.received for each in group])
        except ApplianceError as error:
            if isinstance(error, StorageError) or len(group) == 1:
                _fail(group, error)
                return
            LOGGER.warning("batches of telemetry are kept one by one: %s", error)
            for each in group:
                await self._commit([each])
            return
        self.committed += len(group)
        for each in group:
            batch = each.received.batch
            ack = TelemetryAck(batch.stream, batch.boot, batch.last, batch.first)
            await self._tell(batch.device, ack)
            if not each.done.done():
                each.done.set_result(None)

    async def _refuse(self, device: str, rest: str, message: Message, error: ApplianceError) -> None:
        self.refused += 1
        now = self._clock.monotonic()
        if now - self._logged.get(device, float("-inf")) >= LOG_EVERY_S:
            self._logged[device] = now
            LOGGER.warning("telemetry of %s on %r is refused: %s", device, rest[:64], error)
        try:
            await self._store.note_refusal(device, error.code, self._clock.unix())
        except ApplianceError as failure:
            LOGGER.warning("the refusal of telemetry of %s is not counted: %s", device, failure)
        name = _NAME.fullmatch(message.correlation or b"")
        if name is not None and rest in get_args(Stream):
            boot, first, last = (int(each) for each in name.groups())
            await self._tell(device, TelemetryAck(msgspec.convert(rest, Stream), boot, last, first, error.code))

    async def _tell(self, device: str, ack: TelemetryAck) -> None:
        message = Message(down(device, "ack"), msgspec.json.encode(ack), qos=0, expiry_s=ACK_EXPIRY_S)
        try:
            await self._link.publish(message)
        except ApplianceError as error:
            LOGGER.info("%s is not told that its telemetry is committed, and sends it again: %s", device, error)

    async def _trim(self) -> None:
        while True:
            try:
                before = self._clock.unix() - self._retention.age_s
                gone = await self._store.trim(received_before=before, most_rows=self._retention.rows)
                if gone:
                    LOGGER.info("%d rows of telemetry were old or too many, and are deleted", gone)
            except ApplianceError as error:
                LOGGER.warning("old telemetry is not deleted: %s", error)
            await asyncio.sleep(TRIM_EVERY_S)


def _read(device: str, rest: str, payload: bytes) -> Batch:
    """Return a batch that is sound.

    Raises:
        TooLargeError: It is too large, packed or unpacked.
        InvalidRequestError: It is not sound.
    """
    if len(payload) > LARGEST_BATCH_BYTES:
        raise TooLargeError(f"A batch has {len(payload)} bytes; at most {LARGEST_BATCH_BYTES} are taken.")
    try:
        batch = msgspec.json.decode(decompress(payload), type=TelemetryBatch)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise refusal("malformed", f"it is none: {error}") from error
    return sound(device, rest, batch)


def _fail(group: list[_Waiting], error: ApplianceError) -> None:
    if not isinstance(error, StorageError):
        error = refusal("not_kept", f"the store will not keep it: {error}")
    for each in group:
        if not each.done.done():
            each.done.set_exception(error)
