"""Commands and their results in `hub.db`."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import msgspec

from appliance.core.clock import Clock
from appliance.core.errors import ConflictError, InvalidRequestError, NotFoundError
from appliance.core.fleet import CommandResult
from appliance.core.printable import printable
from appliance.hub.device_rows import get_device
from appliance.security.audit import record
from appliance.store.database import Connection, Database, Row
from appliance.store.grouped import GroupedWrites
from appliance.store.rows import new_id

LONGEST_EXPIRY_S = 300.0
LARGEST_ARGUMENTS_BYTES = 32 * 1024
LARGEST_RESULT_BYTES = 64 * 1024
LATE_S = 30.0
"""A reply may be under way so long after a command expired."""

KEPT_S = 30 * 86_400.0
LOOK_EVERY_S = 0.1

_NAME = re.compile(r"[a-z][a-z0-9_]{0,63}")

State = Literal["waiting", "sent", "done", "failed", "expired"]
OPEN: frozenset[str] = frozenset({"waiting", "sent"})


@dataclass(frozen=True, slots=True)
class CommandRow:
    """A command.

    Attributes:
        id: Of the command.
        device: For whom.
        name: As in `Command`.
        arguments: As the command wants them.
        actor: Who gave it.
        created: Unix seconds, as are the others.
        expires: After which the device refuses it.
        state: `waiting` to be sent; `sent`; then `done`, `failed` or, without a reply, `expired`.
        finished: When its result came, or None.
        result: What the device said, {} before that.
        code: Why it failed, "" otherwise.
        detail: The same for a person.
    """

    id: str
    device: str
    name: str
    arguments: dict[str, Any]
    actor: str
    created: float
    expires: float
    state: State
    finished: float | None
    result: dict[str, Any]
    code: str
    detail: str


class SqliteCommands:
    """Keeps commands; what changes is on the disk when a method returns."""

    def __init__(self, database: Database, writes: GroupedWrites, clock: Clock) -> None:
        self._database = database
        self._writes = writes
        self._clock = clock

    async def give(
        self, device: str, name: str, arguments: dict[str, Any], *, expires_in_s: float, actor: str
    ) -> CommandRow:
        """Write a command down for the running hub to send.

        Raises:
            NotFoundError: There is no such device.
            ConflictError: It is in quarantine.
            InvalidRequestError: The name, the arguments or the time will not do.
        """
        _check(name, arguments, expires_in_s)
        now = self._clock.unix()
        identity = new_id("cmd-").lower()

        def write(connection: Connection) -> CommandRow:
            if get_device(connection, device).quarantined is not None:
                raise ConflictError(
                    f"{device} is in quarantine: two boxes use its identity.",
                    advice="Decide with: appliance hub devices approve DEVICE",
                    code="quarantined",
                )
            connection.execute(
                "INSERT INTO commands (id, device, name, arguments, actor, created, expires, state) "
                "VALUES (?, ?, ?, ?, ?, ?, ?, 'waiting')",
                (identity, device, name, msgspec.json.encode(arguments), actor, now, now + expires_in_s),
            )
            connection.execute("DELETE FROM commands WHERE device = ? AND created < ?", (device, now - KEPT_S))
            record(connection, actor, "device.command", device, {"id": identity, "name": name}, at=now)
            return _get(connection, identity)

        return await self._database.write(write)

    def get(self, identity: str) -> CommandRow:
        """Return a command.

        Raises:
            NotFoundError: There is none of that id.
        """
        return self._database.read(lambda connection: _get(connection, identity))

    def of_device(self, device: str, *, limit: int = 100) -> Sequence[CommandRow]:
        """Return the commands of a device, newest first."""
        rows = self._database.read(
            lambda connection: connection.execute(
                "SELECT * FROM commands WHERE device = ? ORDER BY created DESC LIMIT ?", (device, limit)
            ).fetchall()
        )
        return [_command(row) for row in rows]

    async def result(self, identity: str, *, timeout_s: float) -> CommandRow:
        """Return a command once it is finished, or as it stands after a while.

        Raises:
            NotFoundError: There is none of that id.
        """
        deadline = self._clock.monotonic() + timeout_s
        while True:  # another process may have given it, so there is nothing to wait for but the row
            row = self.get(identity)
            if row.state not in OPEN or self._clock.monotonic() >= deadline:
                return row
            await asyncio.sleep(LOOK_EVERY_S)

    def waiting(self, *, limit: int) -> Sequence[CommandRow]:
        """Return commands that have to be sent, oldest first."""
        now = self._clock.unix()
        rows = self._database.read(
            lambda connection: connection.execute(
                "SELECT * FROM commands WHERE state = 'waiting' AND expires > ? ORDER BY created LIMIT ?", (now, limit)
            ).fetchall()
        )
        return [_command(row) for row in rows]

    async def note_sent(self, identities: Sequence[str]) -> None:
        """Note that the broker took commands over."""
        rows = [(each,) for each in identities]
        sql = "UPDATE commands SET state = 'sent' WHERE id = ? AND state = 'waiting'"
        await self._database.write(lambda connection: connection.executemany(sql, rows).rowcount)

    async def finish(self, device: str, result: CommandResult) -> bool:
        """Take in a reply; return False if that device has no such command."""
        now = self._clock.unix()
        values = (
            "done" if result.ok else "failed",
            now,
            msgspec.json.encode(result.result),
            printable(result.code),
            printable(result.detail)[:2000],
            result.id,
            device,
        )

        def write(connection: Connection) -> bool:
            if connection.execute("SELECT 1 FROM commands WHERE id = ? AND device = ?", values[-2:]).fetchone() is None:
                return False
            connection.execute(
                "UPDATE commands SET state = ?, finished = ?, result = ?, code = ?, detail = ? "
                "WHERE id = ? AND device = ? AND state NOT IN ('done', 'failed')",
                values,
            )
            return True

        return await self._writes.write(write)

    async def expire(self) -> None:
        """Give up commands whose time is over; a reply that comes all the same is still taken in."""
        late = self._clock.unix() - LATE_S
        condition = "(state = 'waiting' AND expires < :now) OR (state = 'sent' AND expires < :late)"
        values = {"now": late + LATE_S, "late": late}
        found = self._database.read(
            lambda connection: connection.execute(
                f"SELECT 1 FROM commands WHERE {condition} LIMIT 1",  # noqa: S608
                values,
            ).fetchone()
        )
        if found is not None:
            sql = f"UPDATE commands SET state = 'expired', code = 'expired' WHERE {condition}"  # noqa: S608
            await self._database.write(lambda connection: connection.execute(sql, values).rowcount)


def _check(name: str, arguments: dict[str, Any], expires_in_s: float) -> None:
    if not _NAME.fullmatch(name):
        raise InvalidRequestError(
            f"{name[:64]!r} is no command.", advice="`ping` is one, and `diagnostics`.", param="name"
        )
    if len(msgspec.json.encode(arguments)) > LARGEST_ARGUMENTS_BYTES:
        raise InvalidRequestError(f"The arguments have more than {LARGEST_ARGUMENTS_BYTES} bytes.", param="arguments")
    if not 1.0 <= expires_in_s <= LONGEST_EXPIRY_S:
        raise InvalidRequestError(
            f"A command is worth something for 1 to {LONGEST_EXPIRY_S:g} s, not {expires_in_s:g}.", param="expires_in_s"
        )


def _get(connection: Connection, identity: str) -> CommandRow:
    row = connection.execute("SELECT * FROM commands WHERE id = ?", (identity,)).fetchone()
    if row is None:
        raise NotFoundError(f"There is no command {identity[:64]!r}.", param="id")
    return _command(row)


def _command(row: Row) -> CommandRow:
    return CommandRow(
        id=row["id"],
        device=row["device"],
        name=row["name"],
        arguments=msgspec.json.decode(row["arguments"]),
        actor=row["actor"],
        created=row["created"],
        expires=row["expires"],
        state=row["state"],
        finished=row["finished"],
        result={} if row["result"] is None else msgspec.json.decode(row["result"]),
        code=row["code"],
        detail=row["detail"],
    )
