"""The devices in `hub.db`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from appliance.core.clock import Clock
from appliance.core.errors import ConflictError
from appliance.core.fleet import DeviceState, Reported
from appliance.core.printable import printable
from appliance.hub.device_names import check_groups, check_labels
from appliance.hub.device_records import Device, DeviceEvent, Kinds, Which
from appliance.hub.device_rows import device_of, expect_device, find_device, get_device, is_forgotten
from appliance.hub.presence import KnownSession, Verdict, judge
from appliance.hub.rollout_members import begin_anew, leave
from appliance.hub.twin_store import refresh
from appliance.security.audit import record
from appliance.store.database import Connection, Database, Row
from appliance.store.grouped import GroupedWrites

EVENTS_KEPT = 100
"""Of each device."""

_INSTANCES_KEPT = 16
_LONGEST_AGENT = 64
_LONGEST_HARDWARE = 128


class SqliteDevices:
    """A `DeviceStore`."""

    def __init__(self, database: Database, writes: GroupedWrites, clock: Clock) -> None:
        """Keep devices in a database; messages of devices are written together with others that come at the time."""
        self._database = database
        self._writes = writes
        self._clock = clock

    def find(self, device: str) -> Device | None:
        """Return a device, or None."""
        return self._database.read(lambda connection: find_device(connection, device))

    def get(self, device: str) -> Device:
        """Return a device. Raises NotFoundError."""
        return self._database.read(lambda connection: get_device(connection, device))

    def list(self, which: Which, *, limit: int, after: str = "") -> Sequence[Device]:
        """Return devices in the order of their ids."""
        conditions, values = _conditions(which)

        def read(connection: Connection) -> list[Device]:
            rows = connection.execute(
                f"SELECT * FROM devices WHERE {' AND '.join(conditions)} ORDER BY id LIMIT :limit",  # noqa: S608
                {**values, "after": after, "limit": limit},
            )
            return [device_of(connection, row) for row in rows.fetchall()]

        return self._database.read(read)

    def counts(self) -> Mapping[str, int]:
        """Return how many devices there are by status."""
        rows = self._database.read(
            lambda connection: connection.execute(
                "SELECT CASE WHEN quarantined IS NULL THEN status ELSE 'quarantined' END AS status, count(*) AS n "
                "FROM devices GROUP BY 1"
            ).fetchall()
        )
        nobody = dict.fromkeys(("online", "lost", "stopping", "unreached", "quarantined"), 0)
        return nobody | {row["status"]: row["n"] for row in rows}

    def kinds(self, quiet_since: float) -> Kinds:
        """Return how many devices there are of each kind."""

        def read(connection: Connection) -> Kinds:
            quiet = connection.execute(
                "SELECT count(*) FROM devices WHERE seen IS NULL OR seen < ?", (quiet_since,)
            ).fetchone()[0]
            agents = connection.execute("SELECT agent, count(*) FROM devices GROUP BY 1 ORDER BY 2 DESC LIMIT 50")
            hardware = connection.execute("SELECT hardware, count(*) FROM devices GROUP BY 1 ORDER BY 2 DESC LIMIT 50")
            return Kinds(quiet, dict(map(tuple, agents.fetchall())), dict(map(tuple, hardware.fetchall())))

        return self._database.read(read)

    def reported(self, device: str) -> Reported | None:
        """Return the reported twin, or None. Raises NotFoundError."""

        def read(connection: Connection) -> bytes | None:
            get_device(connection, device)
            row = connection.execute("SELECT reported FROM devices WHERE id = ?", (device,)).fetchone()
            document: bytes | None = row["reported"]
            return document

        document = self._database.read(read)
        return None if document is None else msgspec.json.decode(document, type=Reported)

    def events(self, device: str, *, limit: int = EVENTS_KEPT) -> Sequence[DeviceEvent]:
        """Return what happened to a device, newest first."""
        rows = self._database.read(
            lambda connection: connection.execute(
                "SELECT * FROM device_events WHERE device = ? ORDER BY id DESC LIMIT ?", (device, limit)
            ).fetchall()
        )
        return [DeviceEvent(row["id"], row["device"], row["at"], row["kind"], row["detail"]) for row in rows]

    async def expect(self, device: str) -> None:
        """Note a device that was given a certificate."""
        now = self._clock.unix()
        await self._writes.write(lambda connection: expect_device(connection, device, now))

    async def note_state(self, device: str, state: DeviceState, *, retained: bool) -> Verdict:
        """Take in a state message and return what it was worth."""
        now = self._clock.unix()
        return await self._writes.write(lambda connection: _note_state(connection, device, state, retained, now))

    async def note_report(self, device: str, reported: Reported, document: bytes, *, retained: bool) -> bool:
        """Take in a reported twin; return False if a newer one is known."""
        now = self._clock.unix()
        hardware = printable(str(reported.facts.get("hardware", "")))[:_LONGEST_HARDWARE]

        def write(connection: Connection) -> bool:
            if retained and is_forgotten(connection, device):
                return False
            expect_device(connection, device, now)
            changed = connection.execute(
                "UPDATE devices SET reported = ?, reported_version = ?, desired_version = ?, hardware = ?, "
                "reported_at = ? WHERE id = ? AND reported_version <= ?",
                (
                    document,
                    reported.version,
                    reported.desired_version,
                    hardware,
                    now,
                    device,
                    reported.version,
                ),
            )
            return changed.rowcount > 0

        return await self._writes.write(write)

    async def note_seen(self, seen: Mapping[str, float]) -> None:
        """Note when devices last said anything."""
        rows = [(at, device) for device, at in seen.items()]

        def write(connection: Connection) -> None:
            connection.executemany("UPDATE devices SET seen = ? WHERE id = ?", rows)

        await self._writes.write(write)

    async def lose_unconfirmed(self, since: float) -> int:
        """Count those as lost that are said to be online and gave no sign since; return how many."""

        def write(connection: Connection) -> int:
            return connection.execute(
                "UPDATE devices SET status = 'lost' WHERE status = 'online' AND confirmed < ? "
                "AND (seen IS NULL OR seen < ?)",
                (since, since),
            ).rowcount

        return await self._writes.write(write)

    def forgotten(self) -> Sequence[str]:
        """Return devices whose messages the broker may still keep."""
        rows = self._database.read(
            lambda connection: connection.execute("SELECT id FROM forgotten_devices ORDER BY id LIMIT 100").fetchall()
        )
        return [row["id"] for row in rows]

    async def note_cleared(self, device: str) -> None:
        """Note that the broker keeps nothing of a forgotten device any more."""
        sql = "DELETE FROM forgotten_devices WHERE id = ?"
        await self._writes.write(lambda connection: connection.execute(sql, (device,)).rowcount)

    async def release(self, device: str, *, actor: str) -> Device:
        """End a quarantine. Raises NotFoundError, ConflictError."""
        now = self._clock.unix()

        def write(connection: Connection) -> Device:
            if get_device(connection, device).quarantined is None:
                raise ConflictError(f"{device} is not in quarantine.", advice="`appliance hub devices list` shows it.")
            # Nothing is left to compare with, so that whichever box is the right one is believed at its next word.
            connection.execute("DELETE FROM device_instances WHERE device = ?", (device,))
            connection.execute(
                "UPDATE devices SET quarantined = NULL, instance = '', epoch = 0, began = 0, reported_version = 0 "
                "WHERE id = ?",
                (device,),
            )
            _note_event(connection, device, now, "released", f"by {actor}")
            record(connection, actor, "device.release", device, at=now)
            return get_device(connection, device)

        return await self._database.write(write)

    async def describe(
        self, device: str, *, groups: Sequence[str] | None, labels: Mapping[str, str | None], actor: str
    ) -> Device:
        """Set groups and labels. Raises NotFoundError, InvalidRequestError."""
        check_groups(groups or ())
        check_labels(labels)
        now = self._clock.unix()

        def write(connection: Connection) -> Device:
            before = get_device(connection, device)
            if groups is not None:
                connection.execute("DELETE FROM device_groups WHERE device = ?", (device,))
                rows = [(device, name) for name in set(groups)]
                connection.executemany("INSERT INTO device_groups (device, name) VALUES (?, ?)", rows)
            for name, value in labels.items():
                connection.execute("DELETE FROM device_labels WHERE device = ? AND name = ?", (device, name))
                if value is not None:
                    connection.execute(
                        "INSERT INTO device_labels (device, name, value) VALUES (?, ?, ?)", (device, name, value)
                    )
            refresh(connection, device)
            after = get_device(connection, device)
            check_labels(after.labels)
            if (before.groups, before.labels) != (after.groups, after.labels):
                detail = {"groups": after.groups, "labels": dict(after.labels)}
                record(connection, actor, "device.describe", device, detail, at=now)
            return after

        return await self._database.write(write)

    async def forget(self, device: str, *, actor: str) -> None:
        """Remove everything about a device. Raises NotFoundError."""
        now = self._clock.unix()

        def write(connection: Connection) -> None:
            get_device(connection, device)
            connection.execute("DELETE FROM twins WHERE scope = 'device' AND name = ?", (device,))
            connection.execute("DELETE FROM devices WHERE id = ?", (device,))
            leave(connection, device, now)
            connection.execute("INSERT OR REPLACE INTO forgotten_devices (id, at) VALUES (?, ?)", (device, now))
            record(connection, actor, "device.forget", device, at=now)

        await self._database.write(write)


def _conditions(which: Which) -> tuple[list[str], dict[str, Any]]:
    conditions = ["id > :after"]
    if which.status == "quarantined":
        conditions.append("quarantined IS NOT NULL")
    elif which.status is not None:
        conditions.append("quarantined IS NULL AND status = :status")
    if which.group is not None:
        conditions.append("id IN (SELECT device FROM device_groups WHERE name = :group)")
    if which.hardware is not None:
        conditions.append("hardware = :hardware")
    if which.seen_before is not None:
        conditions.append("(seen IS NULL OR seen < :seen_before)")
    return conditions, {name: getattr(which, name) for name in ("status", "group", "hardware", "seen_before")}


def _note_state(connection: Connection, device: str, state: DeviceState, retained: bool, now: float) -> Verdict:
    if retained and is_forgotten(connection, device):
        return "old"
    expect_device(connection, device, now)
    row = connection.execute(
        "SELECT status, instance, epoch, began, quarantined FROM devices WHERE id = ?", (device,)
    ).fetchone()
    verdict = judge(_known(connection, device, row), state, retained=retained)
    if verdict in ("news", "moved"):
        _keep_state(connection, device, state, now)
    elif state.status == row["status"] and (state.instance, state.epoch) == (row["instance"], row["epoch"]):
        connection.execute("UPDATE devices SET confirmed = ? WHERE id = ?", (now, device))
    if verdict == "moved":
        connection.execute("UPDATE devices SET reported_version = 0, desired_version = 0 WHERE id = ?", (device,))
        begin_anew(connection, device)
        detail = f"A new installation, {_short(state.instance)} after {_short(row['instance'])}."
        _note_event(connection, device, now, "moved", detail)
    if verdict == "clone" and row["quarantined"] is None:
        connection.execute("UPDATE devices SET quarantined = ? WHERE id = ?", (now, device))
        detail = (
            f"Two boxes use this identity: session {state.epoch} of {_short(state.instance)} "
            f"beside session {row['epoch']} of {_short(row['instance'])}."
        )
        _note_event(connection, device, now, "clone", detail)
    return verdict


def _known(connection: Connection, device: str, row: Row) -> KnownSession | None:
    if not row["instance"]:
        return None
    rows = connection.execute("SELECT instance, epoch FROM device_instances WHERE device = ?", (device,)).fetchall()
    earlier = {each["instance"]: each["epoch"] for each in rows if each["instance"] != row["instance"]}
    return KnownSession(row["instance"], row["epoch"], row["began"], row["status"], earlier)


def _keep_state(connection: Connection, device: str, state: DeviceState, now: float) -> None:
    connection.execute(
        "UPDATE devices SET status = ?, instance = ?, epoch = ?, began = ?, confirmed = ?, agent = ? WHERE id = ?",
        (state.status, state.instance, state.epoch, state.at, now, printable(state.agent)[:_LONGEST_AGENT], device),
    )
    connection.execute(
        "INSERT INTO device_instances (device, instance, epoch, first_seen) VALUES (?, ?, ?, ?) "
        "ON CONFLICT (device, instance) DO UPDATE SET epoch = excluded.epoch",
        (device, state.instance, state.epoch, now),
    )
    connection.execute(
        "DELETE FROM device_instances WHERE device = :device AND instance NOT IN (SELECT instance "
        "FROM device_instances WHERE device = :device ORDER BY first_seen DESC LIMIT :kept)",
        {"device": device, "kept": _INSTANCES_KEPT},
    )


def _note_event(connection: Connection, device: str, now: float, kind: str, detail: str) -> None:
    connection.execute(
        "INSERT INTO device_events (device, at, kind, detail) VALUES (?, ?, ?, ?)", (device, now, kind, detail)
    )
    connection.execute(
        "DELETE FROM device_events WHERE device = :device AND id <= (SELECT id FROM device_events "
        "WHERE device = :device ORDER BY id DESC LIMIT 1 OFFSET :kept)",
        {"device": device, "kept": EVENTS_KEPT},
    )


def _short(instance: str) -> str:
    return printable(instance)[:8]
