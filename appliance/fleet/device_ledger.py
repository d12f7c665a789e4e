"""How many sessions this box has had at its broker."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from appliance.store.database import Connection, Database


class DeviceLedger:
    """Owns the table `device` of `fleet.db`."""

    def __init__(self, database: Database, copy: Callable[[int], Awaitable[None]] | None = None) -> None:
        """Keep it in `fleet.db`, and each new epoch in a copy as well."""
        self._database = database
        self._copy = copy

    @property
    def epoch(self) -> int:
        """Return the epoch of the session that was opened last, 0 for none."""
        return int(self._database.read(lambda each: each.execute("SELECT epoch FROM device").fetchone()[0]))

    async def next_epoch(self) -> int:
        """Return the epoch of a new session; it is on the disk when this returns, so it is never given twice."""

        def write(connection: Connection) -> int:
            return int(connection.execute("UPDATE device SET epoch = epoch + 1 RETURNING epoch").fetchone()[0])

        epoch = await self._database.write(write)
        if self._copy is not None:
            await self._copy(epoch)
        return epoch
