"""Commands and their replies in `fleet.db`: what was done is done once, whatever ends the process.

accepted ──begin──> begun ──finish──> done
    │                 └─ the process ended here: it may or may not have acted, and never does again
    └─ the process ended here: nothing was done yet, so it is taken up again
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import msgspec

from appliance.core.fleet import Command, CommandResult
from appliance.store.database import Connection, Database, Row

KEPT_S = 3600.0
"""Replies are remembered for longer than any command is valid."""
MOST_OPEN = 64
TOO_MANY = "too_many_commands"


@dataclass(frozen=True, slots=True)
class Accepted:
    """A command that waits to be carried out."""

    command: Command
    correlation: bytes


@dataclass(frozen=True, slots=True)
class Reply:
    """What became of a command, and for whom."""

    result: CommandResult
    correlation: bytes


class CommandLedger:
    """Owns the table `commands`."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def accept(self, accepted: Accepted, now: float) -> CommandResult | bool:
        """Keep a command; it is on the disk when this returns.

        Returns:
            The result of one that was carried out before; True for a new one; False for one that is being worked on,
            whose answer goes to whoever asked last.
        """
        command = accepted.command

        def write(connection: Connection) -> CommandResult | bool:
            known = connection.execute("SELECT * FROM commands WHERE id = ?", (command.id,)).fetchone()
            if known is not None:
                sql = "UPDATE commands SET correlation = ? WHERE id = ?"
                connection.execute(sql, (accepted.correlation, command.id))
                return False if known["result"] is None else _result(known)
            connection.execute("DELETE FROM commands WHERE state = 'done' AND received < ?", (now - KEPT_S,))
            waiting = connection.execute("SELECT count(*) FROM commands WHERE state <> 'done'").fetchone()[0]
            if waiting >= MOST_OPEN:
                detail = f"{waiting} commands wait already."
                return CommandResult(command.id, ok=False, code=TOO_MANY, detail=detail)
            connection.execute(
                "INSERT INTO commands (id, received, state, correlation, request) VALUES (?, ?, 'accepted', ?, ?)",
                (command.id, now, accepted.correlation, msgspec.json.encode(command)),
            )
            return True

        return await self._database.write(write)

    async def begin(self, command: str) -> bool:
        """Note that a command is about to act; False if that was noted before."""
        sql = "UPDATE commands SET state = 'begun' WHERE id = ? AND state = 'accepted'"
        return await self._database.write(lambda each: each.execute(sql, (command,)).rowcount > 0)

    async def finish(self, result: CommandResult) -> Reply:
        """Keep what became of a command, for good."""

        def write(connection: Connection) -> Reply:
            sql = "UPDATE commands SET state = 'done', result = ? WHERE id = ? RETURNING correlation"
            row = connection.execute(sql, (msgspec.json.encode(result), result.id)).fetchone()
            return Reply(result, row["correlation"])

        return await self._database.write(write)

    async def note_sent(self, command: str) -> None:
        """Note that the broker took the reply over."""

        def write(connection: Connection) -> None:
            connection.execute("UPDATE commands SET sent = 1 WHERE id = ?", (command,))

        await self._database.write(write)

    def begun(self) -> Sequence[str]:
        """Return the ids of the commands that were about to act, or did."""
        sql = "SELECT id FROM commands WHERE state = 'begun' ORDER BY number"
        return self._database.read(lambda each: [row["id"] for row in each.execute(sql)])

    def accepted(self) -> Sequence[Command]:
        """Return the commands with which nothing was done yet, oldest first."""
        sql = "SELECT * FROM commands WHERE state = 'accepted' ORDER BY number"
        return self._database.read(
            lambda each: [msgspec.json.decode(row["request"], type=Command) for row in each.execute(sql)]
        )

    def unsent(self, since: float) -> Sequence[Reply]:
        """Return the replies that no broker took over, of commands that came since then."""
        sql = "SELECT * FROM commands WHERE state = 'done' AND sent = 0 AND received >= ? ORDER BY number"
        return self._database.read(
            lambda each: [Reply(_result(row), row["correlation"]) for row in each.execute(sql, (since,))]
        )


def _result(row: Row) -> CommandResult:
    return msgspec.json.decode(row["result"], type=CommandResult)
