"""The journal of updates in `fleet.db`: where each job stands, what was verified for it, and the reports of it.

A state is committed here, with its report, before its side effect begins; a result is only taken if the job still
stands where the side effect was begun, so that a cancel that came meanwhile is not lost. Reports leave once the hub
has acknowledged them.

What a person at the box imports is a job too, whose document has version 0. It is numbered below 0, so that it takes
no number from the hub's jobs, and the hub, which knows nothing of it, gets no reports of it.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

import msgspec

from appliance.core.clock import Clock
from appliance.core.errors import ConflictError
from appliance.core.fleet import Job, JobReport
from appliance.core.releases import Release
from appliance.fleet.pieces import PieceList
from appliance.fleet.update_machine import Canceled, Event, Update, after, canceling, expire, supersedes
from appliance.store.database import Connection, Database

LOGGER = logging.getLogger(__name__)

MOST_REPORTS = 1000
"""Reports that nobody takes; the oldest go first."""

KEPT_JOBS = 50
PERCENT_STEP = 5
FIRST_LOCAL = -(2**53)
"""Jobs of the box itself count up from here, so that among themselves too the newest is the highest."""

CopyFloor = Callable[[str, int], Awaitable[None]]
"""Keeps the counter of a model's newest confirmed release elsewhere too; durable when it returns."""

_FETCHED = frozenset({"fetched", "staged", "testing", "trial", "confirmed", "rolled_back"})


@dataclass(frozen=True, slots=True)
class Entry:
    """A job of the journal.

    Attributes:
        update: Where it stands.
        job: The document.
        release: Verified, or None before that.
        was_present: The release was registered here before this job.
    """

    update: Update
    job: Job
    release: Release | None
    was_present: bool

    @property
    def is_local(self) -> bool:
        """Tell whether a person at the box wants it, and not the hub."""
        return self.update.version < 0


class Journal:
    """The tables of `updates_schema`."""

    def __init__(self, database: Database, clock: Clock, copy_floor: CopyFloor | None = None) -> None:
        """Keep them in `fleet.db`, and each new floor in a copy as well."""
        self._database = database
        self._clock = clock
        self._copy_floor = copy_floor

    def current(self) -> Entry | None:
        """Return the oldest job that is not over: what it began is undone before a newer one begins."""
        return self._database.read(_current)

    def local(self, job: str) -> Entry | None:
        """Return the job of this id that a person at the box wants, over or not."""

        def look(connection: Connection) -> Entry | None:
            row = connection.execute("SELECT version FROM updates WHERE job = ? AND version < 0", (job,)).fetchone()
            return None if row is None else _entry(connection, row["version"])

        return self._database.read(look)

    def leftover(self) -> Entry | None:
        """Return a job that went back from its trial, whose version is registered still; None if there is none."""
        sql = "SELECT version FROM updates WHERE leftover = 1 ORDER BY version"
        found = self._database.read(lambda each: [_entry(each, row["version"]) for row in each.execute(sql).fetchall()])
        return next((each for each in found if each is not None and each.release is not None), None)

    async def tidied(self, version: int) -> None:
        """Note that nothing is left of a job's version, or that it is somebody else's now."""
        sql = "UPDATE updates SET leftover = 0 WHERE version = ?"
        await self._database.write(lambda connection: connection.execute(sql, (version,)) and None)

    def newest(self) -> int:
        """Return the highest version of a job that was seen, 0 for none."""
        return self._database.read(_newest)

    async def take(self, job: Job) -> bool:
        """Take a job on, or refuse it as old; every older one that is not over is to end.

        Returns:
            False if this or a newer one was seen before; nothing was changed.
        """

        def write(connection: Connection) -> bool:
            if not supersedes(_newest(connection), job.version):
                return False
            self._begin(connection, job, job.version)
            return True

        return await self._database.write(write)

    async def take_local(self, job: Job) -> None:
        """Take on what a person at the box wants installed; every job that is not over is to end.

        Raises:
            ConflictError: One is on trial, which would be undone; nothing was changed.
        """

        def write(connection: Connection) -> None:
            entry = _current(connection)
            if entry is not None and entry.update.state == "trial":
                raise ConflictError(
                    f"The job {entry.update.job} is on trial, and another one now would undo it.",
                    advice="`appliance models wishes` shows the trial; import when it is over.",
                    code="update_on_trial",
                )
            last = connection.execute("SELECT max(version) FROM updates WHERE version < 0").fetchone()[0]
            self._begin(connection, job, FIRST_LOCAL if last is None else last + 1)

        await self._database.write(write)

    async def advance(self, begun: Update, event: Event) -> Update | None:
        """Write what has become of a side effect; None if the job stands elsewhere by now, so that it does not count.

        Args:
            begun: The update as it was when the side effect began.
            event: What has become of it.
        """

        def write(connection: Connection) -> Update | None:
            entry = _entry(connection, begun.version)
            if entry is None or entry.update != begun:
                return None
            new = after(begun, event)
            self._store(connection, begun, new)
            if entry.release is not None and not new.recall:
                self._conclude(connection, entry.release, new)
                if new.state == "confirmed":
                    confirmed.append(entry.release)
                elif new.over and begun.state == "trial" and not entry.was_present:
                    connection.execute("UPDATE updates SET leftover = 1 WHERE version = ?", (begun.version,))
            return new

        confirmed: list[Release] = []
        written = await self._database.write(write)
        if self._copy_floor is not None:
            for release in confirmed:
                await self._copy_floor(release.model, release.counter)
        return written

    async def expire(self, begun: Update) -> None:
        """End a job whose time is over."""

        def write(connection: Connection) -> None:
            entry = _entry(connection, begun.version)
            if entry is not None:
                self._store(connection, entry.update, expire(entry.update, self._clock.unix()))

        await self._database.write(write)

    async def verified(self, version: int, release: Release, lists: Sequence[PieceList], *, was_present: bool) -> None:
        """Keep what was verified, so that the hub need not be there for the rest."""

        def write(connection: Connection) -> None:
            connection.execute(
                "UPDATE updates SET release = ?, was_present = ? WHERE version = ?",
                (msgspec.json.encode(release), was_present, version),
            )
            connection.executemany(
                "INSERT OR REPLACE INTO update_pieces (version, digest, length, hashes) VALUES (?, ?, ?, ?)",
                [(version, each.digest, each.length, each.hashes) for each in lists],
            )

        await self._database.write(write)

    def piece_lists(self, version: int) -> list[PieceList]:
        """Return the piece lists of the files of a job that were not here."""
        rows = self._database.read(
            lambda connection: connection.execute(
                "SELECT digest, length, hashes FROM update_pieces WHERE version = ? ORDER BY rowid", (version,)
            ).fetchall()
        )
        return [PieceList(row["digest"], row["length"], row["hashes"]) for row in rows]

    def safe(self, digest: str) -> bytes:
        """Return the bitmap of a file's pieces that are on the disk."""
        row = self._database.read(
            lambda connection: connection.execute(
                "SELECT bitmap FROM update_safe WHERE digest = ?", (digest,)
            ).fetchone()
        )
        return bytes(row["bitmap"]) if row else b""

    async def commit(self, digest: str, bitmap: bytes) -> None:
        """Note which pieces of a file are on the disk; an empty bitmap forgets them."""

        def write(connection: Connection) -> None:
            if bitmap:
                connection.execute("INSERT OR REPLACE INTO update_safe VALUES (?, ?)", (digest, bitmap))
            else:
                connection.execute("DELETE FROM update_safe WHERE digest = ?", (digest,))

        await self._database.write(write)

    def release_of(self, target: str) -> Release | None:
        """Return the release that was verified last for jobs of this target, "" being any; None if none was."""
        rows = self._database.read(
            lambda connection: connection.execute(
                "SELECT document, release FROM updates WHERE release IS NOT NULL ORDER BY version DESC"
            ).fetchall()
        )
        for row in rows:
            job = msgspec.json.decode(row["document"], type=Job)
            if job.action == "install" and target in ("", job.target):
                return msgspec.json.decode(row["release"], type=Release)
        return None

    def rolled_back(self, digest: str) -> str | None:
        """Return why a model file was rolled back here, or None if it was not."""
        sql = "SELECT code, detail FROM update_rolled_back WHERE digest = ?"
        row = self._database.read(lambda connection: connection.execute(sql, (digest,)).fetchone())
        return f"{row['code']}: {row['detail']}" if row else None

    async def tell_percent(self, begun: Update, percent: int) -> None:
        """Report how far a fetch is; only the newest such report is kept."""

        def write(connection: Connection) -> None:
            entry = _entry(connection, begun.version)
            if entry is not None and entry.update == begun:
                connection.execute("DELETE FROM update_reports WHERE progress_of = ?", (begun.version,))
                self._report(connection, begun, percent, progress_of=begun.version)

        await self._database.write(write)

    def oldest_report(self) -> JobReport | None:
        """Return the report that is to be sent next."""
        row = self._database.read(
            lambda connection: connection.execute(
                "SELECT sequence, report FROM update_reports ORDER BY sequence LIMIT 1"
            ).fetchone()
        )
        if row is None:
            return None
        report = msgspec.json.decode(row["report"], type=JobReport)
        return msgspec.structs.replace(report, sequence=row["sequence"])

    async def acknowledge(self, up_to: int) -> None:
        """Forget the reports that the hub has."""
        await self._database.write(
            lambda connection: connection.execute("DELETE FROM update_reports WHERE sequence <= ?", (up_to,)) and None
        )

    def floor(self, model: str) -> int:
        """Return the counter of the newest release of a model that was confirmed here: no older one is installed."""
        row = self._database.read(
            lambda each: each.execute("SELECT counter FROM update_floors WHERE model = ?", (model,)).fetchone()
        )
        return row["counter"] if row else 0

    def _conclude(self, connection: Connection, release: Release, update: Update) -> None:
        """Let the end of an installation count for those to come, in the transaction that ends it."""
        if update.state == "rolled_back":
            connection.execute(
                "INSERT OR REPLACE INTO update_rolled_back VALUES (?, ?, ?, ?, ?)",
                (release.files[0].digest, update.job, update.code, update.detail, self._clock.unix()),
            )
        elif update.state == "confirmed":
            connection.execute(
                """
                INSERT INTO update_floors VALUES (?, ?)
                ON CONFLICT (model) DO UPDATE SET counter = max(counter, excluded.counter)
                """,
                (release.model, release.counter),
            )
            connection.execute("DELETE FROM update_rolled_back WHERE digest = ?", (release.files[0].digest,))

    def _begin(self, connection: Connection, job: Job, version: int) -> None:
        self._end_older(connection, job)
        attempts = _count_attempt(connection, job)
        update = Update(
            job.id,
            version,
            attempt=attempts,
            not_before=job.not_before,
            expires=job.expires,
            recall=job.action == "recall",
        )
        if job.action == "cancel":
            update = canceling(update)
        connection.execute(
            "INSERT INTO updates (version, job, document, progress, over) VALUES (?, ?, ?, ?, ?)",
            (version, job.id, msgspec.json.encode(job), msgspec.json.encode(update), update.over),
        )
        connection.execute("DELETE FROM updates WHERE over = 1 AND version <= ?", (version - KEPT_JOBS,))
        self._report(connection, update, 0)

    def _end_older(self, connection: Connection, job: Job) -> None:
        code = {"install": "superseded", "cancel": "canceled", "recall": "recalled"}[job.action]
        event = Canceled(code, f"The job {job.id}, version {job.version}, came after it.")
        for (version,) in connection.execute("SELECT version FROM updates WHERE over = 0").fetchall():
            entry = _entry(connection, version)
            if entry is not None:
                self._store(connection, entry.update, after(entry.update, event))
            else:
                connection.execute("UPDATE updates SET over = 1 WHERE version = ?", (version,))

    def _store(self, connection: Connection, old: Update, new: Update) -> None:
        if new == old:
            return
        connection.execute(
            "UPDATE updates SET progress = ?, over = ? WHERE version = ?",
            (msgspec.json.encode(new), new.over, new.version),
        )
        if new.over:
            connection.execute("DELETE FROM update_pieces WHERE version = ?", (new.version,))
        if (new.state, new.code) != (old.state, old.code) and (new.ending is None or old.ending is not None):
            self._report(connection, new, 100 if new.state in _FETCHED else 0)

    def _report(self, connection: Connection, update: Update, percent: int, progress_of: int | None = None) -> None:
        if update.version < 0:
            return
        report = JobReport(
            job=update.job,
            version=update.version,
            attempt=update.attempt,
            sequence=0,
            state=update.state,
            percent=percent,
            code=update.code[:100],
            detail=update.detail[:2000],
            at=self._clock.unix(),
        )
        connection.execute(
            "INSERT INTO update_reports (job, report, progress_of) VALUES (?, ?, ?)",
            (update.job, msgspec.json.encode(report), progress_of),
        )
        connection.execute(
            "DELETE FROM update_reports WHERE sequence <= (SELECT max(sequence) FROM update_reports) - ?",
            (MOST_REPORTS,),
        )


def _newest(connection: Connection) -> int:
    version: int = connection.execute("SELECT coalesce(max(version), 0) FROM updates WHERE version > 0").fetchone()[0]
    return version


def _current(connection: Connection) -> Entry | None:
    rows = connection.execute("SELECT version FROM updates WHERE over = 0 ORDER BY version").fetchall()
    entries = [each for row in rows if (each := _entry(connection, row["version"])) is not None]
    ending = (each for each in entries if each.update.ending is not None)  # the number alone does not tell the age
    return next(ending, entries[0] if entries else None)


def _entry(connection: Connection, version: int) -> Entry | None:
    row = connection.execute(
        "SELECT document, progress, release, was_present FROM updates WHERE version = ?", (version,)
    ).fetchone()
    if row is None:
        return None
    try:
        return Entry(
            msgspec.json.decode(row["progress"], type=Update),
            msgspec.json.decode(row["document"], type=Job),
            msgspec.json.decode(row["release"], type=Release) if row["release"] else None,
            bool(row["was_present"]),
        )
    except msgspec.DecodeError as error:
        LOGGER.warning("the journal's entry of the job version %d cannot be read and is left alone: %s", version, error)
        return None


def _count_attempt(connection: Connection, job: Job) -> int:
    if job.action != "install":
        return 1
    row = connection.execute(
        """
        INSERT INTO update_attempts VALUES (?, 1)
        ON CONFLICT (target) DO UPDATE SET attempts = attempts + 1 RETURNING attempts
        """,
        (job.target,),
    ).fetchone()
    return int(row["attempts"])
