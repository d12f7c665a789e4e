"""Opens `fleet.db`, whatever a power cut left of it: a box whose record is damaged goes on speaking for itself.

    sound     it is opened
    damaged   it is moved aside, and what can be read of it goes into a new one, which takes its place when it is whole
    lost      a new one begins, above what was kept beside it

`fleet.mark` is a small copy of what must never fall, each synced before it counts: the epoch, or the hub would take
this box for its own clone; how far the reports are numbered, or the hub would take new ones for old; and the release
floors, or an older release could come back. A job whose journal is lost is sent again by the hub, and what was fetched
for it is found again by its hashes.
"""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path
from typing import Annotated

import msgspec
from msgspec import Meta, Struct

from appliance.core.errors import ApplianceError, StorageError, UnreadableDatabaseError
from appliance.fleet.schema import open_fleet_database
from appliance.store.database import Connection, Database
from appliance.store.private_files import read_file, remove_file, rename_file, write_file
from appliance.store.salvage import aside, carry_over, check_pages, is_damaged, move_aside

LOGGER = logging.getLogger("appliance.fleet")

MARGIN = 1_000_000
"""More reports than are ever made between two starts."""
_NEW_YEAR_2024 = 1_704_067_200
_LARGEST = 2**40
"""No box has had so many sessions: a flipped bit says so."""

Number = Annotated[int, Meta(ge=0, le=2**53)]


class Mark(Struct, frozen=True):
    """What must never fall.

    Attributes:
        epoch: Of the newest session.
        reports: Sequence of the newest report, when the file was opened last.
        floors: The counter of the newest release that was confirmed, by model.
    """

    epoch: Number = 0
    reports: Number = 0
    floors: dict[str, Number] = {}


class MarkFile:
    """The copy. It is never a reason to stop: one that cannot be written or read is said, and counts as none."""

    def __init__(self, path: Path) -> None:
        """Use this file, which is made when there is something to keep."""
        self._path = path
        self._mark = self._written = self._read()
        self._turn = asyncio.Lock()

    @property
    def mark(self) -> Mark:
        """Return what it says."""
        return self._mark

    def keep(self, mark: Mark) -> None:
        """Replace it, if that changes anything; what could not be written is written with the next change."""
        self._mark = mark
        if mark != self._written:
            try:
                write_file(self._path, msgspec.json.encode(mark))
                self._written = mark
            except ApplianceError as error:
                LOGGER.warning("the mark beside the fleet's record is not kept: %s", error)

    async def raise_epoch(self, epoch: int) -> None:
        """Keep the epoch of a new session."""
        async with self._turn:
            await asyncio.to_thread(self.keep, msgspec.structs.replace(self._mark, epoch=epoch))

    async def raise_floor(self, model: str, counter: int) -> None:
        """Keep that a release was confirmed."""
        async with self._turn:
            floors = {**self._mark.floors, model: max(counter, self._mark.floors.get(model, 0))}
            await asyncio.to_thread(self.keep, msgspec.structs.replace(self._mark, floors=floors))

    def _read(self) -> Mark:
        try:
            content = read_file(self._path)
            return Mark() if content is None else msgspec.json.decode(content, type=Mark)
        except (ApplianceError, msgspec.DecodeError, UnicodeDecodeError) as error:
            LOGGER.warning("the mark beside the fleet's record cannot be read: %s", error)
            return Mark()


def open_or_rescue(path: Path, now: float) -> tuple[Database, MarkFile, str]:
    """Open the record of this box, and mend it if need be.

    Args:
        path: Of `fleet.db`.
        now: Unix seconds, where nothing else tells how many sessions there may have been.

    Returns:
        The database, the mark beside it, and what was wrong, "" for nothing.

    Raises:
        UnreadableDatabaseError: A newer program wrote it.
        StorageError: The disk is full or failed; what is there is tried again.
    """
    file = MarkFile(path.with_suffix(".mark"))
    database, trouble = _opened(path)
    try:
        mark = database.write_blocking(lambda connection: _reconcile(connection, file.mark, trouble != "", now))
    except BaseException:
        database.close()
        raise
    file.keep(mark)
    return database, file, trouble


def _opened(path: Path) -> tuple[Database, str]:
    trouble = ""
    if not path.exists() or path.stat().st_size == 0:
        if not aside(path).exists():
            return open_fleet_database(path), ""
        trouble = f"{path} is gone or empty, and a damaged one is kept beside it."  # a kill came between the two
    else:
        try:
            return _sound(path), ""
        except UnreadableDatabaseError as error:
            if not is_damaged(error):
                raise
            trouble = str(error)
            move_aside(path)
    LOGGER.error("the fleet's record is moved aside, and what can be read is carried over: %s", trouble)
    _rescue(path)
    return open_fleet_database(path), trouble


def _sound(path: Path) -> Database:
    database = open_fleet_database(path)
    try:
        check_pages(database)
    except BaseException:
        database.close()
        raise
    return database


def _rescue(path: Path) -> None:
    """Make a new file out of the one that was moved aside; it takes its place once it is whole."""
    new = path.with_suffix(".new")
    for suffix in ("-wal", "-shm", ""):
        remove_file(new.with_name(new.name + suffix))
        remove_file(path.with_name(path.name + suffix))
    database = open_fleet_database(new)
    try:
        LOGGER.warning("rows that were carried over: %s", carry_over(aside(path), database))
    finally:
        database.close()
    log = new.with_name(f"{new.name}-wal")
    if log.exists() and log.stat().st_size:
        raise StorageError(f"The new {path.name} could not be finished; the damaged one is kept beside it.")
    rename_file(new, path)


def _reconcile(connection: Connection, mark: Mark, was_damaged: bool, now: float) -> Mark:
    """Bring record and mark to the higher of both."""
    epoch = int(connection.execute("SELECT epoch FROM device").fetchone()[0])
    is_possible = 0 <= epoch <= _LARGEST
    row = connection.execute("SELECT seq FROM sqlite_sequence WHERE name = 'update_reports'").fetchone()
    reports = 0 if row is None else int(row[0])
    if was_damaged or not is_possible or epoch < mark.epoch:
        began = 0 if mark.epoch else max(0, int((now - _NEW_YEAR_2024) // 60))  # more than there were sessions
        epoch = max(epoch if is_possible else 0, mark.epoch, began)
        reports = max(reports, mark.reports, began) + MARGIN
        connection.execute("UPDATE device SET epoch = ?", (epoch,))
        connection.execute("DELETE FROM sqlite_sequence WHERE name = 'update_reports'")
        connection.execute("INSERT INTO sqlite_sequence (name, seq) VALUES ('update_reports', ?)", (reports,))
    connection.executemany(
        """
        INSERT INTO update_floors VALUES (?, ?)
        ON CONFLICT (model) DO UPDATE SET counter = max(counter, excluded.counter)
        """,
        list(mark.floors.items()),
    )
    floors = {row["model"]: row["counter"] for row in connection.execute("SELECT model, counter FROM update_floors")}
    return Mark(epoch, reports, floors)
