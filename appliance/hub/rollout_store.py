"""Rollouts in `hub.db`.

A decision, whom it concerns and the step in the timeline are one transaction, made only if the rollout is still as it
was decided on; so two hubs, or a hub and a command line, never both act. A job is a row with the device's next version
before anything is sent: a hub that is killed between the two finds it there, and sends it as it is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import msgspec

from appliance.core.errors import ConflictError, NotFoundError
from appliance.core.fleet import FINAL_STATES, Job, JobReport
from appliance.hub.key_watch_schema import STILL_SIGNS
from appliance.hub.rollout_policy import ALLOWED, IN_FLIGHT, Decision, PersonStep, Progress, Tally, after_report, said
from appliance.hub.rollout_records import DeviceJob, JobOf, Member, Rollout, Step
from appliance.hub.rollout_rows import OPEN_TO_NEWCOMERS, device_job_of, member_of, rollout_of, tally_of, text_of
from appliance.security.audit import record
from appliance.store.database import Connection, Database, Row
from appliance.store.grouped import GroupedWrites

HUB = "hub"
"""The actor of what the hub decides by itself."""

REPORTS_KEPT = 500
"""Of a device's job."""

_FURTHEST_VERSION = 2**52


class SqliteRollouts:
    """A `RolloutStore`, and what people do to rollouts."""

    def __init__(self, database: Database, writes: GroupedWrites | None, job_of: JobOf) -> None:
        """Keep rollouts in a database.

        Args:
            database: `hub.db`.
            writes: Puts reports together that come at the same time; None where none come.
            job_of: Makes the document of a device's job.
        """
        self._database = database
        self._writes = writes
        self._job_of = job_of

    def find(self, rollout: str) -> Rollout:
        """Return a rollout. Raises NotFoundError."""
        return self._database.read(lambda connection: _find(connection, rollout))

    def list(self) -> Sequence[Rollout]:
        """Return all rollouts, oldest first."""
        sql = "SELECT * FROM rollouts ORDER BY created, id"
        return self._database.read(lambda connection: [rollout_of(row) for row in connection.execute(sql)])

    def unfinished(self) -> Sequence[Rollout]:
        """Return the rollouts that are neither completed nor aborted, oldest first."""
        sql = "SELECT * FROM rollouts WHERE state IN ('running', 'paused', 'failed') ORDER BY created, id"
        return self._database.read(lambda connection: [rollout_of(row) for row in connection.execute(sql)])

    def open_to_newcomers(self) -> Sequence[Rollout]:
        """Return the newest completed rollout of each model, unless another is under way or the release withdrawn."""
        return self._database.read(
            lambda connection: [rollout_of(row) for row in connection.execute(OPEN_TO_NEWCOMERS)]
        )

    def tallies(self, rollout: Rollout) -> tuple[Tally, Tally]:
        """Return how the wave under way stands, and how all of them do."""
        return self._database.read(lambda connection: _tallies(connection, rollout))

    def members(self, rollout: str) -> Sequence[Member]:
        """Return the devices of a rollout, by wave."""
        sql = "SELECT * FROM members WHERE rollout = ? ORDER BY wave, device"
        return self._database.read(lambda connection: [member_of(row) for row in connection.execute(sql, (rollout,))])

    def timeline(self, rollout: str) -> Sequence[Step]:
        """Return the steps of a rollout, oldest first."""
        sql = "SELECT * FROM timeline WHERE rollout = ? ORDER BY id"
        return self._database.read(
            lambda connection: [
                Step(row["at"], row["actor"], row["step"], row["reason"]) for row in connection.execute(sql, (rollout,))
            ]
        )

    def begin(self, rollout: Rollout) -> None:
        """Keep a new rollout; the running hub takes it up.

        Raises:
            ConflictError: Another one of the model is not finished.
        """

        def insert(connection: Connection) -> None:
            other = connection.execute(
                "SELECT id, state FROM rollouts WHERE model = ? AND state IN ('running', 'paused', 'failed')",
                (rollout.model,),
            ).fetchone()
            if other is not None:
                raise ConflictError(
                    f"The rollout {other['id']} of {rollout.model} is {other['state']}.",
                    advice=f"Let it finish, or end it with: appliance hub rollouts abort {other['id']}",
                )
            connection.execute(
                """
                INSERT INTO rollouts (id, model, release, target, length, digest, counter, audience, options, plan,
                    progress, state, attempt, created, actor)
                VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)
                """,
                (
                    rollout.id,
                    rollout.model,
                    rollout.release,
                    rollout.target,
                    rollout.length,
                    rollout.digest,
                    rollout.counter,
                    text_of(rollout.audience),
                    text_of(rollout.options),
                    text_of(rollout.plan),
                    text_of(rollout.progress),
                    rollout.progress.state,
                    rollout.attempt,
                    rollout.created,
                    rollout.actor,
                ),
            )
            said = f"{rollout.release} is brought out."
            _note(connection, rollout.id, Step(rollout.created, rollout.actor, "begin", said))
            record(connection, rollout.actor, "rollout.start", rollout.id, {"release": rollout.release})

        self._database.write_blocking(insert)

    def change(
        self,
        rollout: str,
        step: PersonStep,
        *,
        actor: str,
        now: float,
        reason: str = "",
    ) -> Rollout:
        """Do what a person says, in one transaction.

        Raises:
            NotFoundError: There is no such rollout.
            ConflictError: It is in a state where that makes no sense.
        """

        def update(connection: Connection) -> Rollout:
            found = _find(connection, rollout)
            allowed = ALLOWED[step]
            if found.progress.state not in allowed:
                raise ConflictError(
                    f"The rollout {rollout} is {found.progress.state}; {step} needs it to be {' or '.join(allowed)}."
                )
            progress = said(step, found.progress, *_tallies(connection, found), now)
            _store(connection, rollout, progress)
            if step == "retry":
                _queue_again(connection, found)
            if step in ("abort", "recall"):
                _cancel(connection, found, self._job_of)
            if step == "recall":
                _recall(connection, found, self._job_of)
            _note(connection, rollout, Step(now, actor, step, reason or f"{actor} said so."))
            record(connection, actor, f"rollout.{step}", rollout, {"reason": reason}, at=now)
            return _find(connection, rollout)

        return self._database.write_blocking(update)

    async def settle(
        self, before: Rollout, progress: Progress, decision: Decision, joining: Sequence[str], now: float
    ) -> bool:
        """Make a decision count, unless the rollout has changed since it was read; return whether it did."""

        def write(connection: Connection) -> bool:
            if _find(connection, before.id).progress != before.progress:
                return False
            _store(connection, before.id, progress)
            connection.executemany(
                "INSERT OR IGNORE INTO members (rollout, device, wave, state) VALUES (?, ?, ?, 'queued')",
                [(before.id, device, progress.wave) for device in joining],
            )
            if decision.action == "fail":
                _cancel(connection, before, self._job_of)
            step = decision.action if not joining else f"wave {progress.wave}: {len(joining)} devices"
            _note(connection, before.id, Step(now, HUB, step, decision.reason))
            return True

        return await self._database.write(write)

    async def give_jobs(self, rollout: Rollout, *, most: int) -> int:
        """Give queued devices their job, unless they are busy with another's; return to how many."""

        def write(connection: Connection) -> int:
            now = _find(connection, rollout.id)
            if now.progress.state not in ("running", "completed"):
                return 0
            rows = connection.execute(
                """
                SELECT device FROM members AS m WHERE rollout = ? AND state = 'queued' AND NOT EXISTS (
                    SELECT 1 FROM device_jobs AS j
                    WHERE j.device = m.device AND over = 0 AND action <> 'cancel' AND j.rollout <> m.rollout
                ) ORDER BY device LIMIT ?
                """,
                (rollout.id, most),
            ).fetchall()
            job = f"{now.id}.{now.attempt}"
            for row in rows:
                _give(connection, now, row["device"], job, action="install", job_of=self._job_of)
            connection.executemany(
                "UPDATE members SET state = 'sent', job = ? WHERE rollout = ? AND device = ?",
                [(job, now.id, row["device"]) for row in rows],
            )
            return len(rows)

        return await self._database.write(write)

    async def report(self, device: str, report: JobReport, now: float) -> None:
        """Keep what a device reports, once, and let it count."""
        write = self._database.write if self._writes is None else self._writes.write
        await write(lambda connection: _report(connection, device, report, now))

    def current(self, device: str) -> DeviceJob | None:
        """Return the current job of a device, or None if it never had one."""
        sql = "SELECT * FROM device_jobs WHERE device = ?"
        return self._database.read(lambda each: next(map(device_job_of, each.execute(sql, (device,))), None))

    def to_send(self, most: int) -> Sequence[DeviceJob]:
        """Return jobs that are to be sent."""
        sql = "SELECT * FROM device_jobs WHERE published IS NULL ORDER BY device LIMIT ?"
        return self._database.read(lambda connection: [device_job_of(row) for row in connection.execute(sql, (most,))])

    async def sent(self, versions: Mapping[str, int], now: float, key: str) -> None:
        """Note what the broker has: versions by device; one that has changed since, or the key, is still to be sent."""
        rows = [(now, device, version, key) for device, version in versions.items()]
        sql = f"UPDATE device_jobs SET published = ? WHERE device = ? AND version = ? AND {STILL_SIGNS}"  # noqa: S608
        await self._database.write(lambda connection: connection.executemany(sql, rows) and None)

    async def send_again(self, devices: Sequence[str] | None, *, before: float) -> None:
        """Have open jobs sent again that were sent before a time: of some devices, or all; the broker may forget."""
        named = None if devices is None else msgspec.json.encode(list(devices)).decode()
        sql = """
            UPDATE device_jobs SET published = NULL WHERE over = 0 AND published < ?
            AND (? IS NULL OR device IN (SELECT value FROM json_each(?)))
        """
        await self._database.write(lambda connection: connection.execute(sql, (before, named, named)) and None)


def _report(connection: Connection, device: str, report: JobReport, now: float) -> None:
    job = connection.execute("SELECT * FROM device_jobs WHERE device = ?", (device,)).fetchone()
    if job is not None and job["version"] < report.version < _FURTHEST_VERSION:
        _overtake(connection, job, report.version)
    member = connection.execute("SELECT * FROM members WHERE device = ? AND job = ?", (device, report.job)).fetchone()
    if member is None and (job is None or job["job"] != report.job):
        return  # of a job that was never given to this device
    kept = connection.execute(
        "INSERT OR IGNORE INTO job_reports VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
        (
            device,
            report.sequence,
            report.job,
            report.version,
            report.attempt,
            report.state,
            report.code,
            report.detail,
            report.at,
            now,
        ),
    ).rowcount
    if not kept:
        return
    connection.execute(
        "DELETE FROM job_reports WHERE device = ? AND job = ? AND sequence <= ?",
        (device, report.job, report.sequence - REPORTS_KEPT),
    )
    if report.state in FINAL_STATES:
        connection.execute(
            "UPDATE device_jobs SET over = 1 WHERE device = ? AND job = ? AND version = ?",
            (device, report.job, report.version),
        )
    if member is not None:
        _move(connection, member, report, now)


def _overtake(connection: Connection, job: Row, version: int) -> None:
    """Give the current job a version that its device takes: it knows newer ones than a hub restored from a backup."""
    document = msgspec.structs.replace(msgspec.json.decode(job["document"], type=Job), version=version + 1)
    connection.execute(
        "UPDATE device_jobs SET version = ?, document = ?, published = iif(over, published, NULL) WHERE device = ?",
        (version + 1, msgspec.json.encode(document), job["device"]),
    )


def _move(connection: Connection, member: Row, report: JobReport, now: float) -> None:
    state = after_report(member["state"], report.state)
    if member["state"] == "recalling" and report.state in FINAL_STATES:
        state = "recalled" if report.state in ("rolled_back", "confirmed") else "failed"
    connection.execute(
        "UPDATE members SET state = ?, reported = ?, percent = ?, code = ?, detail = ?, heard = ? "
        "WHERE rollout = ? AND device = ?",
        (
            state,
            report.state,
            report.percent,
            report.code,
            report.detail,
            now,
            member["rollout"],
            member["device"],
        ),
    )


def _give(connection: Connection, rollout: Rollout, device: str, job: str, *, action: str, job_of: JobOf) -> None:
    """Make a job the current one of a device, in its next version."""
    row = connection.execute("SELECT version FROM device_jobs WHERE device = ?", (device,)).fetchone()
    version = 1 if row is None else row["version"] + 1
    connection.execute(
        "INSERT OR REPLACE INTO device_jobs (device, version, rollout, job, action, document) "
        "VALUES (?, ?, ?, ?, ?, ?)",
        (device, version, rollout.id, job, action, job_of(rollout, device, version, job, action)),
    )


def _cancel(connection: Connection, rollout: Rollout, job_of: JobOf) -> None:
    """Cancel those in flight; whoever was never sent a job hears nothing of it."""
    rows = connection.execute(
        "SELECT device, job FROM device_jobs WHERE rollout = ? AND action = 'install' AND over = 0 AND device IN "
        "(SELECT device FROM members WHERE rollout = ? AND state IN ('sent', 'running'))",
        (rollout.id, rollout.id),
    ).fetchall()
    for row in rows:
        _give(connection, rollout, row["device"], f"{row['job']}.cancel", action="cancel", job_of=job_of)
    connection.execute(
        "UPDATE members SET state = 'canceled' WHERE rollout = ? AND state IN (SELECT value FROM json_each(?))",
        (rollout.id, msgspec.json.encode(IN_FLIGHT).decode()),
    )


def _recall(connection: Connection, rollout: Rollout, job_of: JobOf) -> None:
    """Send those back that have the release, but those that are busy with another rollout's job."""
    rows = connection.execute(
        """
        SELECT m.device FROM members AS m JOIN device_jobs AS j ON j.device = m.device
        WHERE m.rollout = ? AND m.state = 'succeeded' AND (j.rollout = m.rollout OR j.over = 1)
        """,
        (rollout.id,),
    ).fetchall()
    for row in rows:
        job = f"{rollout.id}.{rollout.attempt}.recall"
        _give(connection, rollout, row["device"], job, action="recall", job_of=job_of)
        connection.execute(
            "UPDATE members SET state = 'recalling', job = ? WHERE rollout = ? AND device = ?",
            (job, rollout.id, row["device"]),
        )


def _queue_again(connection: Connection, rollout: Rollout) -> None:
    connection.execute("UPDATE rollouts SET attempt = attempt + 1 WHERE id = ?", (rollout.id,))
    connection.execute(
        "UPDATE members SET state = 'queued', job = '', reported = '', percent = 0, code = '', detail = '', "
        "heard = NULL WHERE rollout = ? AND state IN ('failed', 'canceled')",
        (rollout.id,),
    )


def _store(connection: Connection, rollout: str, progress: Progress) -> None:
    connection.execute(
        "UPDATE rollouts SET progress = ?, state = ? WHERE id = ?", (text_of(progress), progress.state, rollout)
    )


def _note(connection: Connection, rollout: str, step: Step) -> None:
    connection.execute(
        "INSERT INTO timeline (rollout, at, actor, step, reason) VALUES (?, ?, ?, ?, ?)",
        (rollout, step.at, step.actor, step.step, step.reason),
    )


def _tallies(connection: Connection, rollout: Rollout) -> tuple[Tally, Tally]:
    rows = connection.execute(
        "SELECT wave, state, count(*) AS n, coalesce(max(heard), 0) AS heard FROM members WHERE rollout = ? "
        "GROUP BY wave, state",
        (rollout.id,),
    ).fetchall()
    return tally_of([row for row in rows if row["wave"] == rollout.progress.wave]), tally_of(rows)


def _find(connection: Connection, rollout: str) -> Rollout:
    row = connection.execute("SELECT * FROM rollouts WHERE id = ?", (rollout,)).fetchone()
    if row is None:
        raise NotFoundError(f"There is no rollout {rollout!r}.", advice="appliance hub rollouts list shows them.")
    return rollout_of(row)
