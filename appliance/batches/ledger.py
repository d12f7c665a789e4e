"""Batches and the answers to their lines in `batches.db`: what this returned from survives a power cut."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict

from appliance.batches.states import Event, State, after
from appliance.core.batches import Batch, BatchError, LineCounts, NewBatch
from appliance.core.clock import Clock
from appliance.core.errors import OverloadedError
from appliance.store.database import Connection, Database, Row
from appliance.store.rows import new_id, one, page

_UNFINISHED = "status IN ('validating', 'in_progress', 'finalizing', 'cancelling')"

_RETRY_S = 60.0


class Ledger:
    """Owns the tables."""

    def __init__(self, database: Database, clock: Clock) -> None:
        """Keep batches in `batches.db`."""
        self._database = database
        self._clock = clock

    async def create(self, new: NewBatch, *, tenant: str, most_unfinished: int) -> Batch:
        """Keep a new batch. Raises OverloadedError if the tenant has too many."""
        now = int(self._clock.unix())
        values = {
            "id": new_id("batch_"),
            "tenant": tenant,
            "endpoint": new.endpoint,
            "input_file": new.input_file,
            "created": now,
            "expires": now + new.window_s,
            "metadata": json.dumps(None if new.metadata is None else dict(new.metadata)),
            "output_expires_after": new.output_expires_after_s,
            "reached": json.dumps({"validating": now}),
        }

        def write(connection: Connection) -> Batch:
            sql = f"SELECT count(*) FROM batches WHERE {_UNFINISHED} AND tenant = ?"  # noqa: S608
            running = connection.execute(sql, (tenant,)).fetchone()[0]
            if running >= most_unfinished:
                raise OverloadedError(
                    f"{running} batches of this API key have not ended; {most_unfinished} are allowed.",
                    advice="Wait until one has ended, cancel one, or raise `max_batches`.",
                    retry_after_s=_RETRY_S,
                )
            connection.execute(
                """
                INSERT INTO batches (id, tenant, endpoint, input_file, status, created, expires, metadata,
                                     output_expires_after, reached)
                VALUES (:id, :tenant, :endpoint, :input_file, 'validating', :created, :expires, :metadata,
                        :output_expires_after, :reached)
                """,
                values,
            )
            return _to_batch(_row(connection, str(values["id"])))

        return await self._database.write(write)

    def get(self, batch: str, *, tenant: str | None = None) -> Batch:
        """Return one batch. Raises NotFoundError."""
        return self._database.read(lambda connection: _to_batch(_row(connection, batch, tenant)))

    def outcome(self, batch: str) -> State:
        """Return where a batch is, and what it will be."""
        return self._database.read(lambda connection: _state(_row(connection, batch)))

    def list(self, *, tenant: str, limit: int, after: str) -> tuple[Sequence[Batch], bool]:
        """Return batches, newest first, and whether there are more. Raises NotFoundError."""

        def read(connection: Connection) -> tuple[Sequence[Batch], bool]:
            key = _row(connection, after, tenant)["key"] if after else None
            sql = "SELECT * FROM batches WHERE tenant = :tenant"
            values = {"tenant": tenant, "after": key}
            rows, more = page(connection, sql, values, limit=limit, newest_first=True, key="key")
            return [_to_batch(each) for each in rows], more

        return self._database.read(read)

    def unfinished(self) -> Sequence[str]:
        """Return the ids of those that have not ended, oldest first."""
        sql = f"SELECT id FROM batches WHERE {_UNFINISHED} ORDER BY key"  # noqa: S608
        return self._database.read(lambda connection: [name for (name,) in connection.execute(sql)])

    async def apply(
        self, batch: str, event: Event, *, total: int | None = None, errors: Sequence[BatchError] = ()
    ) -> Batch:
        """Let something happen to a batch, and return it as it then is; what comes too late changes nothing."""

        def write(connection: Connection) -> Batch:
            row = _row(connection, batch)
            if (state := after(_state(row), event)) is not None:
                if total is not None:
                    connection.execute("UPDATE batches SET total = ? WHERE key = ?", (total, row["key"]))
                if errors:
                    told = json.dumps([asdict(each) for each in errors])
                    connection.execute("UPDATE batches SET errors = ? WHERE key = ?", (told, row["key"]))
                self._enter(connection, row, state)
            return _to_batch(_row(connection, batch))

        return await self._database.write(write)

    async def finish(self, batch: str, output_file: str | None, error_file: str | None) -> Batch:
        """Name the files that all answers are in, forget the answers, and end the batch."""

        def write(connection: Connection) -> Batch:
            row = _row(connection, batch)
            if (state := after(_state(row), Event.WRITTEN)) is not None:
                sql = "UPDATE batches SET output_file = ?, error_file = ? WHERE key = ?"
                connection.execute(sql, (output_file, error_file, row["key"]))
                self._enter(connection, row, state)
            return _to_batch(_row(connection, batch))

        return await self._database.write(write)

    def _enter(self, connection: Connection, row: Row, state: State) -> None:
        reached = {state.status: int(self._clock.unix()), **json.loads(row["reached"])}
        connection.execute(
            "UPDATE batches SET status = ?, outcome = ?, reached = ? WHERE key = ?",
            (state.status, state.outcome or "", json.dumps(reached), row["key"]),
        )
        if state.status in ("completed", "failed", "expired", "cancelled"):
            connection.execute("DELETE FROM lines WHERE batch = ?", (row["key"],))

    async def erase(self) -> None:
        """Leave nothing in the log of answers that were forgotten. Raises StorageError if it is in use."""
        await self._database.erase_log()

    def answered(self, batch: str) -> set[int]:
        """Return the numbers of the lines that have their answer."""
        sql = "SELECT number FROM lines WHERE batch = ? AND answer IS NOT NULL"
        return self._database.read(
            lambda each: {number for (number,) in each.execute(sql, (_row(each, batch)["key"],))}
        )

    async def begin_line(self, batch: str, number: int) -> int:
        """Note that a line is about to be answered, and return how often that was noted."""
        sql = """
            INSERT INTO lines (batch, number, tries) VALUES (?, ?, 1)
            ON CONFLICT (batch, number) DO UPDATE SET tries = tries + 1 RETURNING tries
        """
        return await self._database.write(
            lambda each: int(each.execute(sql, (_row(each, batch)["key"], number)).fetchone()[0])
        )

    async def end_line(self, batch: str, number: int, answer: bytes, *, completed: bool) -> bool:
        """Keep the answer to a line and count it, once; return False where it had one, or the batch is written."""
        sql = "UPDATE lines SET answer = ?, completed = ? WHERE batch = ? AND number = ? AND answer IS NULL"
        count = f"UPDATE batches SET {'completed = completed' if completed else 'failed = failed'} + 1 WHERE key = ?"  # noqa: S608

        def write(connection: Connection) -> bool:
            key = _row(connection, batch)["key"]
            kept = connection.execute(sql, (answer, int(completed), key, number)).rowcount > 0
            if kept:
                connection.execute(count, (key,))
            return kept

        return await self._database.write(write)

    def answers(self, batch: str, *, completed: bool, behind: int, limit: int) -> Sequence[tuple[int, bytes]]:
        """Return answers, successes or errors, in the order of their lines, from behind a number on."""
        sql = """
            SELECT number, answer FROM lines
            WHERE batch = ? AND completed = ? AND number > ? ORDER BY number LIMIT ?
        """

        def read(connection: Connection) -> Sequence[tuple[int, bytes]]:
            values = (_row(connection, batch)["key"], int(completed), behind, limit)
            return [(each["number"], each["answer"]) for each in connection.execute(sql, values)]

        return self._database.read(read)


def _row(connection: Connection, batch: str, tenant: str | None = None) -> Row:
    sql = "SELECT * FROM batches WHERE id = :id AND (:tenant IS NULL OR tenant = :tenant)"
    return one(connection, sql, {"id": batch, "tenant": tenant}, f"batch {batch!r}")


def _state(row: Row) -> State:
    return State(row["status"], row["outcome"] or None)


def _to_batch(row: Row) -> Batch:
    return Batch(
        id=row["id"],
        tenant=row["tenant"],
        endpoint=row["endpoint"],
        input_file=row["input_file"],
        status=row["status"],
        created=row["created"],
        expires=row["expires"],
        counts=LineCounts(row["total"], row["completed"], row["failed"]),
        metadata=json.loads(row["metadata"]),
        output_expires_after_s=row["output_expires_after"],
        output_file=row["output_file"],
        error_file=row["error_file"],
        errors=[BatchError(**each) for each in json.loads(row["errors"])],
        reached=json.loads(row["reached"]),
    )
