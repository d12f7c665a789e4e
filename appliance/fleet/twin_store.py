"""The twin in `fleet.db`: what the hub wants, for good, and how often this box has reported."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import msgspec

from appliance.core.errors import StorageError
from appliance.core.fleet import Desired
from appliance.fleet.schema import MIGRATIONS
from appliance.store.database import Connection, Database, Row


class TwinStore:
    """Owns the table `twin`."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def desired(self) -> Desired | None:
        """Return the document that was accepted last.

        Raises:
            StorageError: What is stored is none: the file was changed by somebody else.
        """
        stored = self._database.read(_row)["desired"]
        try:
            return None if stored is None else msgspec.json.decode(stored, type=Desired)
        except msgspec.DecodeError as error:
            raise StorageError(
                f"The desired twin in {self._database.path} is none: {error}.",
                advice="Enrol this box anew, or restore the file from a backup.",
            ) from error

    def begin(self, hub: str) -> None:
        """Forget what another hub wanted.

        Args:
            hub: Names the hub by what this box trusts it for.
        """

        def write(connection: Connection) -> None:
            if _row(connection)["hub"] != hub:
                connection.execute("UPDATE twin SET hub = ?, desired = NULL, models_done = '{}'", (hub,))

        self._database.write_blocking(write)

    async def accept(self, desired: Desired) -> None:
        """Keep a document; it is on the disk when this returns. Its model wishes are all to be done."""
        values = (msgspec.json.encode(desired),)
        await self._database.write(
            lambda each: _nothing(each.execute("UPDATE twin SET desired = ?, models_done = '{}'", values))
        )

    def models_done(self) -> dict[str, str]:
        """Return which of the document's model wishes were handed on."""
        return msgspec.json.decode(self._database.read(_row)["models_done"], type=dict[str, str])

    async def note_models(self, done: Mapping[str, str]) -> None:
        """Keep which of the document's model wishes were handed on."""
        values = (msgspec.json.encode(done).decode(),)
        await self._database.write(lambda each: _nothing(each.execute("UPDATE twin SET models_done = ?", values)))

    async def next_report(self) -> int:
        """Return the version of a new report; never the same twice."""
        sql = "UPDATE twin SET reported_version = reported_version + 1 RETURNING reported_version"
        return await self._database.write(lambda each: int(each.execute(sql).fetchone()[0]))


def stored_desired(path: Path) -> Desired | None:
    """Return the document that a data folder keeps, without changing anything there; None if there is none.

    Raises:
        StorageError: The file cannot be read.
    """
    if not path.exists():
        return None
    database = Database(path, read_only=True, migrations=MIGRATIONS)
    try:
        return TwinStore(database).desired()
    finally:
        database.close()


def _row(connection: Connection) -> Row:
    row: Row = connection.execute("SELECT * FROM twin").fetchone()
    return row


def _nothing(_: object) -> None:
    """Keep a cursor from leaving the transaction."""
