"""The outbox: what the hub should know, kept until the hub has said that it has it.

`telemetry.db` is a file of its own: writing it never waits for, nor fails with, what the box is for. One that is
damaged is moved aside; while there is no room or no file, rows wait in memory, up to a bound. What is lost leaves a
gap row, so that the loss is told too.

    alarm, job       on the disk when `append` returns, whatever happens to the power
    health, metric   survive the end of the process when `append` returns; the last seconds may go with the power
    sample           written once a second: the last second may go with the process

The number of the boot is kept in a small file as well, synced before the first row: sequences begin anew with each
boot, so a number that came twice would make the hub take new rows for old ones. Where nothing is left of it, on a box
that was set up anew, it begins with the minutes since 2024: more than there were starts.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from appliance.core.clock import Clock
from appliance.core.errors import StorageError, TooLargeError, UnreadableDatabaseError
from appliance.core.fleet import STREAMS, Stream
from appliance.store import outbox_schema
from appliance.store.database import Connection, Database
from appliance.store.files import write_file
from appliance.store.outbox_rows import GAP, ROW_BYTES, Row, squeeze, without
from appliance.store.outbox_schema import MIGRATIONS, Held, Position

LOGGER = logging.getLogger("appliance.store")

T = TypeVar("T")

LARGEST_BODY_BYTES = 16 * 1024
"""Of one row as JSON: four of them fit into a batch, however badly they compress."""

SMALLEST_CAP_BYTES = 256 * 1024
FLUSH_S = 1.0
"""How often samples are written, and what could not be written is tried again."""

_DURABLE: frozenset[Stream] = frozenset({"alarm", "job"})
_WRITTEN: frozenset[Stream] = frozenset({"health", "metric"})
_MOST_PENDING = 200
_FULL, _NORMAL = 2, 1
_NEW_YEAR_2024 = 1_704_067_200


@dataclass(frozen=True, slots=True)
class Limits:
    """What the outbox may hold.

    Attributes:
        bytes: Of all rows, each with what it costs in the file; held to the row.
        age_s: Seconds of the program's running time after which a row is lost.
        memory_bytes: Of the rows that wait for a disk that takes none.
    """

    bytes: int = 64 * 1024 * 1024
    age_s: float = 90 * 86_400.0
    memory_bytes: int = 512 * 1024


class Outbox:
    """Owns `telemetry.db`. Used from one event loop; opening it blocks for milliseconds.

    Attributes:
        boot: The number of this start of the program, higher than those of before.
        lost: Facts that were lost since then.
        moved_aside: Why the file of before was moved aside at this start or since, or "".
        failing: Why rows wait in memory, or "".
        changed: Set when a row was appended; whoever waits for that clears it.
    """

    def __init__(self, path: Path, clock: Clock, limits: Limits = Limits()) -> None:
        """Open or create the file; whatever is wrong with it, this returns.

        Raises:
            ValueError: The cap is too small to hold anything.
        """
        if limits.bytes < SMALLEST_CAP_BYTES:
            raise ValueError(f"An outbox of {limits.bytes} bytes holds nothing.")
        self._path = path
        self._clock = clock
        self._limits = limits
        self._started = clock.monotonic()
        self._lived = 0.0
        self._next = dict.fromkeys(STREAMS, 1)
        self._pending: list[Row] = []
        self._turn = asyncio.Lock()
        self._synchronous = _NORMAL
        self._database: Database | None = None
        self._held: dict[Stream, Held] = {}
        self.lost = 0
        self.moved_aside = ""
        self.failing = ""
        self.changed = asyncio.Event()
        self.boot = self._begin_boot()

    async def append(self, stream: Stream, kind: str, body: Mapping[str, Any]) -> None:
        """Take a fact; when this returns it is as durable as its class, or, while `failing`, in memory.

        Raises:
            TooLargeError: The body is over `LARGEST_BODY_BYTES`; nothing was kept.
        """
        encoded = msgspec.json.encode(body)
        if len(encoded) > LARGEST_BODY_BYTES:
            raise TooLargeError(
                f"A row {kind!r} of telemetry has {len(encoded)} bytes; at most {LARGEST_BODY_BYTES} are kept."
            )
        self._pend(stream, kind, encoded)
        if stream in _DURABLE or stream in _WRITTEN or self.failing or len(self._pending) >= _MOST_PENDING:
            await self.flush(durable=stream in _DURABLE)

    async def flush(self, *, durable: bool = False) -> None:
        """Write what waits in memory; what the disk does not take goes on waiting there."""
        async with self._turn:
            rows = list(self._pending)
            if not rows:
                return
            lived = self.lived()

            def write(connection: Connection) -> int:
                self._set_synchronous(connection, _FULL if durable else _NORMAL)
                outbox_schema.add(connection, rows)
                lost = outbox_schema.expire(connection, lived - self._limits.age_s)
                return lost + outbox_schema.shrink(connection, self._limits.bytes)

            lost = await self._write(write)
            if lost is None:
                self._bound_memory()
            else:
                self.lost += lost
                written = {(each.stream, each.last) for each in rows}
                self._pending = [each for each in self._pending if (each.stream, each.last) not in written]

    async def acknowledge(self, stream: Stream, boot: int, first: int, last: int) -> None:
        """Delete what the hub has; should the disk not take that, the hub is told these rows again later."""
        async with self._turn:
            self._pending = [
                rest
                for each in self._pending
                for rest in (without(each, first, last) if (each.stream, each.boot) == (stream, boot) else [each])
            ]
            await self._write(lambda connection: outbox_schema.acknowledge(connection, stream, boot, first, last))

    async def refuse(self, stream: Stream, boot: int, first: int, last: int) -> None:
        """Put a gap in the place of what the hub will never take, so that it is not sent for ever."""
        await self.flush()
        async with self._turn:
            lost = await self._write(
                lambda connection: outbox_schema.refuse(connection, stream, boot, first, last), again=False
            )
            self.lost += lost or 0

    def rows_after(self, stream: Stream, after: Position, until: Position, *, most: int, most_bytes: int) -> list[Row]:
        """Return the rows of one boot behind a position, without holes, the oldest first.

        Args:
            stream: Which.
            after: Boot and sequence behind which they begin.
            until: Boot and sequence with which they end at the latest.
            most: Rows.
            most_bytes: Of kinds and bodies; one row is returned in any case.
        """
        found: list[Row] = []
        size = 0

        def take(row: Row) -> bool:
            nonlocal size
            size += len(row.kind) + len(row.body) + ROW_BYTES
            fits = not found or (row.boot == found[0].boot and row.first == found[-1].last + 1 and size <= most_bytes)
            if not fits or (row.boot, row.last) > until or len(found) >= most:
                return False
            found.append(row)
            return True

        def read(connection: Connection) -> bool:
            return all(take(row) for row in outbox_schema.rows_after(connection, stream, after))

        if self._read(read, default=True):
            held = (row for row in self._pending if row.stream == stream and (row.boot, row.last) > after)
            all(take(row) for row in held)
        return found

    def newest(self, stream: Stream) -> Position:
        """Return boot and sequence of the newest row that was ever appended in this boot, or that waits."""
        if self._next[stream] > 1:
            return self.boot, self._next[stream] - 1
        return self._read(lambda connection: outbox_schema.newest(connection, stream), default=None) or (0, 0)

    def held(self) -> dict[Stream, Held]:
        """Return what waits, by stream."""
        self._held = self._read(outbox_schema.held, default=self._held)
        totals = {each: self._held.get(each, Held(0, 0)) for each in STREAMS}
        for row in self._pending:
            before = totals[row.stream]
            totals[row.stream] = Held(before.rows + 1, before.bytes + row.size)
        return totals

    def lived(self) -> float:
        """Return the seconds that the program has run, over all boots; no clock that jumps is in it."""
        return self._lived + self._clock.monotonic() - self._started

    async def run(self) -> None:
        """Write samples, and what the disk did not take, once in a while, until cancelled."""
        while True:
            await asyncio.sleep(FLUSH_S)
            await self.flush()

    async def close(self) -> None:
        """Write what waits and close the file."""
        await self.flush(durable=True)
        if self._database is not None:
            await self._write(self._remember_life)
        if self._database is not None:
            self._database.close()
            self._database = None

    def _remember_life(self, connection: Connection) -> None:
        connection.execute("UPDATE life SET lived = ?", (self.lived(),))

    def _pend(self, stream: Stream, kind: str, body: bytes, *, lost: int = 0) -> None:
        number = self._next[stream]
        self._next[stream] += 1
        at = self._clock.unix()
        self._pending.append(Row(stream, self.boot, number, number, at, at, self.lived(), lost, kind, body))
        self.changed.set()

    def _bound_memory(self) -> None:
        """Let go of the oldest of the lowest class, as in the file."""
        excess = sum(each.size for each in self._pending) - self._limits.memory_bytes
        for stream in reversed(STREAMS):
            if excess <= 0:
                return
            victims, gap = squeeze(
                (each for each in self._pending if each.stream == stream),
                lambda freed, _, excess=excess: freed >= excess,  # type: ignore[misc]
            )
            kept = [each for each in self._pending if each not in victims]
            self._pending = [gap, *kept] if gap else kept
            self.lost += sum(each.kind != GAP for each in victims)
            excess -= sum(each.size for each in victims) - (gap.size if gap else 0)

    async def _write(self, function: Callable[[Connection], T], *, again: bool = True) -> T | None:
        """Return what `function` returned once it is written, or None if the disk does not take it."""
        try:
            if self._database is None:
                self._reopen()
            assert self._database is not None
            result = await self._database.write(function)
        except UnreadableDatabaseError as error:
            self._move_aside(error)
            return await self._write(function, again=False) if again else None
        except StorageError as error:
            self._fail(error)
            return None
        if self.failing:
            LOGGER.info("telemetry is written to %s again", self._path)
            self.failing = ""
        return result

    def _read(self, function: Callable[[Connection], T], *, default: T) -> T:
        if self._database is None:
            return default
        try:
            return self._database.read(function)
        except UnreadableDatabaseError as error:
            self._move_aside(error)
        except StorageError as error:
            self._fail(error)
        return default

    def _fail(self, error: StorageError) -> None:
        if not self.failing:
            LOGGER.warning("telemetry waits in memory: %s", error)
        self.failing = str(error)

    def _set_synchronous(self, connection: Connection, level: int) -> None:
        """Say how durable the transaction at hand is; SQLite takes that between two transactions only."""
        if level != self._synchronous:
            connection.execute("COMMIT")
            connection.execute(f"PRAGMA synchronous={level}")
            connection.execute("BEGIN IMMEDIATE")
            self._synchronous = level

    # Opening

    def _begin_boot(self) -> int:
        known = _read_boot(self._boot_path) or max(0, int((self._clock.unix() - _NEW_YEAR_2024) // 60))
        boot = self.boot = known + 1
        try:
            boot = self._open(known)
        except UnreadableDatabaseError as error:
            self._move_aside(error)
        except StorageError as error:
            self._fail(error)
        try:
            write_file(self._boot_path, f"{boot}\n".encode(), private=True)
        except (StorageError, OSError) as error:
            LOGGER.warning("the number of this start is not kept: %s", error)
        if self.moved_aside:
            self._reopen_quietly()
        return boot

    @property
    def _boot_path(self) -> Path:
        return self._path.with_suffix(".boot")

    def _open(self, known: int) -> int:
        database = Database(self._path, migrations=MIGRATIONS, durable=False)
        self._synchronous = _NORMAL
        try:
            self._held = database.read(outbox_schema.held)
            boot, self._lived = database.write_blocking(lambda connection: outbox_schema.begin_boot(connection, known))
        except BaseException:
            database.close()
            raise
        self._database = database
        return boot

    def _reopen(self) -> None:
        """Open the file, which was not there or not to be used at the start, for the boot that we are in."""
        lived = self.lived()
        self._open(self.boot - 1)
        self._lived = max(self._lived, lived)
        self._started = self._clock.monotonic()

    def _reopen_quietly(self) -> None:
        try:
            self._reopen()
        except StorageError as error:
            self._fail(error)

    def _move_aside(self, error: UnreadableDatabaseError) -> None:
        """Keep a damaged file beside a new one, for whoever wants to know, and tell what went with it."""
        LOGGER.error("the outbox is moved aside, and what it held is not sent: %s", error)
        self.moved_aside = str(error)
        if self._database is not None:
            with suppress(StorageError):
                self._database.close()
            self._database = None
        try:
            for suffix in ("-wal", "-shm", ""):
                path = self._path.with_name(self._path.name + suffix)
                if path.exists():
                    path.replace(path.with_name(f"{self._path.name}.damaged{suffix}"))
        except OSError as failure:
            self._fail(StorageError(f"The file {self._path} cannot be moved aside: {failure.strerror}."))
        for stream, held in self._held.items():
            if held.rows:
                self._pend(stream, GAP, b"", lost=held.rows)
                self.lost += held.rows
        self._held = {}


def _read_boot(path: Path) -> int:
    """Return the number in the file, or 0 if there is none or it is no number."""
    try:
        text = path.read_text(encoding="ascii").strip()
    except (OSError, ValueError):
        return 0
    return int(text) if text.isdecimal() and len(text) < 16 else 0
