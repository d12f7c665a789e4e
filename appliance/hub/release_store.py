"""Releases in `hub.db`."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from appliance.core.clock import Clock
from appliance.core.releases import Release
from appliance.hub.release_records import SignedRelease
from appliance.security.audit import record
from appliance.store.database import Connection, Database, Row


class SqliteReleases:
    """A `ReleaseStore`."""

    def __init__(self, database: Database, clock: Clock) -> None:
        """Keep them in the hub's database."""
        self._database = database
        self._clock = clock

    def list(self) -> Sequence[SignedRelease]:
        """Return all, withdrawn ones too, by model and counter."""
        return self._database.read(
            lambda each: [_signed(row) for row in each.execute("SELECT * FROM releases ORDER BY model, counter")]
        )

    def add(self, signed: SignedRelease, actor: str) -> None:
        """Note a release; one that is known already stays as it is."""
        release = signed.release

        def write(connection: Connection) -> None:
            inserted = connection.execute(
                "INSERT INTO releases (model, counter, version, target, length, digest, document) "
                "VALUES (?, ?, ?, ?, ?, ?, ?) ON CONFLICT DO NOTHING",
                (
                    release.model,
                    release.counter,
                    release.version,
                    signed.target,
                    signed.length,
                    signed.digest,
                    msgspec.json.encode(release),
                ),
            ).rowcount
            if inserted:
                detail = {"counter": release.counter, "digest": signed.digest, "bytes": signed.size}
                record(connection, actor, "release.add", signed.name, detail, at=self._clock.unix())

        self._database.write_blocking(write)

    def withdraw(self, target: str, reason: str, actor: str) -> None:
        """Note that a release can no longer be installed; one that was withdrawn before stays as it is."""
        now = self._clock.unix()

        def write(connection: Connection) -> None:
            changed = connection.execute(
                "UPDATE releases SET withdrawn = ?, reason = ? WHERE target = ? AND withdrawn IS NULL",
                (now, reason, target),
            ).rowcount
            if changed:
                record(connection, actor, "release.withdraw", target, {"reason": reason}, at=now)

        self._database.write_blocking(write)


def _signed(row: Row) -> SignedRelease:
    release = msgspec.json.decode(row["document"], type=Release)
    return SignedRelease(release, row["target"], row["length"], row["digest"], row["withdrawn"], row["reason"])
