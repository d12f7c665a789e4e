"""The desired twins in `hub.db`: what operators wrote, and what that makes of each device.

A change of one document gives each device that it reaches a new version, in the same transaction; versions of a device
never go back, not even behind one that only the device remembers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import msgspec

from appliance.core.clock import Clock
from appliance.core.errors import ConflictError
from appliance.core.fleet import Desired
from appliance.hub.desired import DesiredDocument, check_document, check_result, put_together
from appliance.hub.device_names import check_groups
from appliance.hub.device_rows import get_device
from appliance.hub.key_watch_schema import STILL_SIGNS
from appliance.security.audit import record
from appliance.store.database import Connection, Database

Scope = Literal["device", "group"]

_DOCUMENTS = msgspec.json.Decoder(DesiredDocument)


@dataclass(frozen=True, slots=True)
class Twin:
    """What operators wrote of a device or a group.

    Attributes:
        version: Rises with each change; 0 says that nothing was written yet.
        changed: Unix seconds, 0 for never.
        actor: Who wrote it.
    """

    scope: Scope
    name: str
    version: int
    document: DesiredDocument
    changed: float
    actor: str


@dataclass(frozen=True, slots=True)
class Version:
    """The desired twin of a device.

    Attributes:
        version: As in `Desired`.
        document: The `Desired` as JSON.
        published: When the broker took it over, or None while it has to be sent.
    """

    device: str
    version: int
    document: bytes
    published: float | None


class SqliteTwins:
    """Keeps desired twins; every change is on the disk when a method returns."""

    def __init__(self, database: Database, clock: Clock) -> None:
        self._database = database
        self._clock = clock

    def get(self, scope: Scope, name: str) -> Twin:
        """Return what was written of a device or a group.

        Raises:
            NotFoundError: There is no such device; a group is there as soon as it is named.
        """

        def read(connection: Connection) -> Twin:
            if scope == "device":
                get_device(connection, name)
            return _twin(connection, scope, name)

        return self._database.read(read)

    async def set(
        self, scope: Scope, name: str, document: DesiredDocument, *, expected_version: int, actor: str
    ) -> Twin:
        """Write what a device or a group should be, unless somebody else has written it meanwhile.

        Args:
            scope: Whether it is of a device or a group.
            name: Its name.
            document: The whole of it.
            expected_version: That was read before, 0 for none.
            actor: For the audit.

        Raises:
            NotFoundError: There is no such device.
            ConflictError: It has another version by now.
            InvalidRequestError: A name or a value will not do.
            TooLargeError: It, or what it makes of a device, is too large.
        """
        check_document(document)
        if scope == "group":
            check_groups([name])
        now = self._clock.unix()

        def write(connection: Connection) -> Twin:
            if scope == "device":
                get_device(connection, name)
            before = _twin(connection, scope, name)
            if before.version != expected_version:
                raise ConflictError(
                    f"The desired twin of {scope} {name} has version {before.version}, not {expected_version}.",
                    advice="Somebody changed it meanwhile: read it again, then make your change.",
                    param="version",
                )
            if document == before.document:
                return before
            connection.execute(
                "INSERT INTO twins (scope, name, version, document, changed, actor) VALUES (?, ?, ?, ?, ?, ?) "
                "ON CONFLICT (scope, name) DO UPDATE SET version = excluded.version, document = excluded.document, "
                "changed = excluded.changed, actor = excluded.actor",
                (scope, name, before.version + 1, msgspec.json.encode(document), now, actor),
            )
            detail = {"version": before.version + 1, "document": msgspec.to_builtins(document)}
            record(connection, actor, f"twin.set_{scope}", name, detail, at=now)
            for device in _reached(connection, scope, name):
                refresh(connection, device)
            return _twin(connection, scope, name)

        return await self._database.write(write)

    def current(self, device: str) -> Version | None:
        """Return the desired twin of a device, or None if nothing was ever desired of it."""
        return self._database.read(lambda connection: _version(connection, device))

    def waiting(self, *, limit: int) -> Sequence[Version]:
        """Return desired twins that have to be sent; not those of devices in quarantine."""
        rows = self._database.read(
            lambda connection: connection.execute(
                "SELECT twin_versions.* FROM twin_versions JOIN devices ON devices.id = device "
                "WHERE published IS NULL AND quarantined IS NULL ORDER BY device LIMIT ?",
                (limit,),
            ).fetchall()
        )
        return [Version(row["device"], row["version"], row["document"], row["published"]) for row in rows]

    async def note_published(self, sent: Sequence[Version], key: str) -> None:
        """Note that the broker took versions over; one that has changed meanwhile still waits, or all if the key has.

        Args:
            sent: Which.
            key: Id of the key that has signed them.
        """
        now = self._clock.unix()
        rows = [(now, each.device, each.version, key) for each in sent]
        sql = f"UPDATE twin_versions SET published = ? WHERE device = ? AND version = ? AND {STILL_SIGNS}"  # noqa: S608
        await self._database.write(lambda connection: connection.executemany(sql, rows).rowcount)

    async def send_again(self, device: str) -> None:
        """Have a device's desired twin sent again."""
        sql = "UPDATE twin_versions SET published = NULL WHERE device = ?"
        await self._database.write(lambda connection: connection.execute(sql, (device,)).rowcount)

    async def overtake(self, device: str) -> None:
        """Give a device a version above the one that it says it has applied, which we do not know of."""
        await self._database.write(lambda connection: refresh(connection, device, anyhow=True))


def refresh(connection: Connection, device: str, *, anyhow: bool = False) -> None:
    """Make a new version of a device's desired twin, if its documents or groups make another one; in a transaction.

    Args:
        connection: Of the caller's transaction.
        device: Which is there.
        anyhow: Make a new version of the same, too.

    Raises:
        TooLargeError: It would be too large.
    """
    groups = connection.execute("SELECT name FROM device_groups WHERE device = ? ORDER BY name", (device,)).fetchall()
    twins = [*(_twin(connection, "group", row["name"]) for row in groups), _twin(connection, "device", device)]
    before = _version(connection, device)
    if before is None and not any(each.version for each in twins):
        return
    applied = connection.execute("SELECT desired_version FROM devices WHERE id = ?", (device,)).fetchone()[0]
    number = max(before.version if before else 0, applied) + 1
    desired = put_together(device, number, (each.document for each in twins))
    check_result(desired)
    if before is not None and not anyhow:
        there = msgspec.json.decode(before.document, type=Desired)
        if msgspec.structs.replace(desired, version=there.version) == there:
            return
    connection.execute(
        "INSERT INTO twin_versions (device, version, document) VALUES (?, ?, ?) ON CONFLICT (device) "
        "DO UPDATE SET version = excluded.version, document = excluded.document, published = NULL",
        (device, number, msgspec.json.encode(desired)),
    )


def _reached(connection: Connection, scope: Scope, name: str) -> list[str]:
    if scope == "device":
        return [name]
    rows = connection.execute("SELECT device FROM device_groups WHERE name = ? ORDER BY device", (name,))
    return [row["device"] for row in rows.fetchall()]


def _twin(connection: Connection, scope: Scope, name: str) -> Twin:
    row = connection.execute("SELECT * FROM twins WHERE scope = ? AND name = ?", (scope, name)).fetchone()
    if row is None:
        return Twin(scope, name, 0, DesiredDocument(), 0.0, "")
    return Twin(scope, name, row["version"], _DOCUMENTS.decode(row["document"]), row["changed"], row["actor"])


def _version(connection: Connection, device: str) -> Version | None:
    row = connection.execute("SELECT * FROM twin_versions WHERE device = ?", (device,)).fetchone()
    return None if row is None else Version(row["device"], row["version"], row["document"], row["published"])
