"""Responses in `sessions.db`, with the journal of their loop and the events of their stream."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from appliance.core.clock import Clock
from appliance.core.errors import ConflictError, InvalidRequestError
from appliance.core.sessions import Item, ResponseStatus, Step, StoredResponse
from appliance.sessions.append import append as append_items
from appliance.sessions.erasure import Erasure
from appliance.sessions.history import conversation_row
from appliance.sessions.removal import erase_response, first_response
from appliance.sessions.rows import decoded_items, decoded_object, encoded, to_response
from appliance.store.database import Connection, Database, Row
from appliance.store.rows import one

UNFINISHED = ("queued", "in_progress")


class StoredResponses:
    """The responses. See `core.sessions.Responses`."""

    def __init__(self, database: Database, clock: Clock, erasure: Erasure) -> None:
        """Keep responses in `sessions.db`."""
        self._database = database
        self._clock = clock
        self._erasure = erasure

    async def begin(self, response: StoredResponse) -> None:
        """Keep a new response, before any work is done for it."""

        def write(connection: Connection) -> None:
            before = 0
            if response.previous:
                before = _row(connection, response.previous, response.tenant)["key"]
            if response.conversation:
                conversation_row(connection, response.conversation, response.tenant)
            _insert(connection, response, before)

        await self._database.write(write)

    async def add_step(self, response: str, step: Step) -> None:
        """Keep a step before it acts. Raises ConflictError if its number is there already."""

        def write(connection: Connection) -> None:
            key = _row(connection, response)["key"]
            sql = "SELECT count(*) FROM steps WHERE response = ?"
            count = connection.execute(sql, (key,)).fetchone()[0]
            if step.number != count:
                raise ConflictError(
                    f"The journal of {response} has {count} steps; number {step.number} cannot be added to it."
                )
            sql = "INSERT INTO steps (response, number, kind, data) VALUES (?, ?, ?, ?)"
            connection.execute(sql, (key, step.number, step.kind, encoded(step.data)))

        await self._database.write(write)

    def steps(self, response: str) -> Sequence[Step]:
        """Return the journal, oldest first."""
        sql = "SELECT number, kind, data FROM steps WHERE response = ? ORDER BY number"

        def read(connection: Connection) -> Sequence[Step]:
            rows = connection.execute(sql, (_row(connection, response)["key"],))
            return [Step(each["number"], each["kind"], decoded_object(each["data"])) for each in rows]

        return self._database.read(read)

    async def add_events(self, response: str, events: Sequence[Mapping[str, Any]]) -> None:
        """Keep events of its stream; each has a `sequence_number`."""
        await self._database.write(lambda each: _add_events(each, _row(each, response)["key"], events))

    def events(self, response: str, *, tenant: str, after: int = -1) -> Sequence[Mapping[str, Any]]:
        """Return the events behind a sequence number."""
        sql = "SELECT event FROM events WHERE response = ? AND number > ? ORDER BY number"

        def read(connection: Connection) -> Sequence[Mapping[str, Any]]:
            rows = connection.execute(sql, (_row(connection, response, tenant)["key"], after))
            return [decoded_object(event) for (event,) in rows]

        return self._database.read(read)

    async def end(
        self,
        response: str,
        status: ResponseStatus,
        body: Mapping[str, Any],
        *,
        append: Sequence[Item] = (),
        after: str | None = None,
        fork: bool = False,
        events: Sequence[Mapping[str, Any]] = (),
    ) -> Mapping[str, Any]:
        """Keep how it ended; see `core.sessions.Responses.end`."""
        if status in UNFINISHED:
            raise InvalidRequestError(f"A response does not end by being {status}.")
        now = int(self._clock.unix())

        def write(connection: Connection) -> Mapping[str, Any]:
            row = _row(connection, response)
            if row["status"] not in UNFINISHED:
                raise ConflictError(f"The response {response} has ended before: it is {row['status']}.")
            name, kept = row["conversation"], body
            if append and name:
                conversation = conversation_row(connection, name, row["tenant"])
                longer, _ = append_items(
                    connection, conversation, append, now=now, after=after, fork_instead=fork, response=response
                )
                if longer["id"] != name:
                    name, kept = longer["id"], {**body, "conversation": {"id": longer["id"]}}
            _add_events(connection, row["key"], events)
            sql = "UPDATE responses SET status = ?, body = ?, conversation = ? WHERE key = ?"
            connection.execute(sql, (status, encoded(kept), name, row["key"]))
            return kept

        return await self._database.write(write)

    def get(self, response: str, *, tenant: str) -> StoredResponse:
        """Return one response."""
        return self._database.read(lambda each: to_response(_row(each, response, tenant)))

    def past(self, response: str, *, tenant: str) -> Sequence[Item]:
        """Return input and output items of a response and of all before it, oldest first."""
        sql = """
            WITH RECURSIVE chain (key, before, body, input, depth) AS (
                SELECT key, before, body, input, 0 FROM responses WHERE key = ?
                UNION ALL
                SELECT responses.key, responses.before, responses.body, responses.input, depth + 1
                FROM chain JOIN responses ON responses.key = chain.before
            )
            SELECT body, input FROM chain ORDER BY depth DESC
        """

        def read(connection: Connection) -> Sequence[Item]:
            found: list[Item] = []
            for body, given in connection.execute(sql, (_row(connection, response, tenant)["key"],)):
                found += [*decoded_items(given), *(decoded_object(body).get("output") or ())]
            return found

        return self._database.read(read)

    def first(self, response: str, *, tenant: str) -> str:
        """Return the id of the first of the responses that a response follows, or its own."""
        return self._database.read(lambda each: first_response(each, _row(each, response, tenant)["key"]))

    def unfinished(self) -> Sequence[StoredResponse]:
        """Return what was queued or in progress when the process ended, of all tenants, oldest first."""
        sql = "SELECT * FROM responses WHERE status IN ('queued', 'in_progress') AND NOT waste ORDER BY key"
        return self._database.read(lambda each: [to_response(row) for row in each.execute(sql)])

    async def delete(self, response: str, *, tenant: str) -> None:
        """Erase a response; those that followed it keep their own items."""
        await self._erasure.erase(lambda each: erase_response(each, _row(each, response, tenant)))


def _row(connection: Connection, response: str, tenant: str | None = None) -> Row:
    """Return a row of `responses`, of any tenant if that is None. Raises NotFoundError."""
    sql, values = "SELECT * FROM responses WHERE id = ? AND NOT waste", [response]
    if tenant is not None:
        sql, values = f"{sql} AND tenant = ?", [response, tenant]
    return one(connection, sql, values, f"response {response[:100]!r}")


def _insert(connection: Connection, response: StoredResponse, before: int) -> None:
    connection.execute(
        """
        INSERT INTO responses
            (id, tenant, created, status, request, body, input, previous, before, conversation, background)
        VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)
        """,
        (
            response.id,
            response.tenant,
            response.created,
            response.status,
            encoded(response.request),
            encoded(response.body),
            encoded(response.input),
            response.previous,
            before,
            response.conversation,
            response.background,
        ),
    )


def _add_events(connection: Connection, response: int, events: Sequence[Mapping[str, Any]]) -> None:
    connection.executemany(
        "INSERT INTO events (response, number, event) VALUES (?, ?, ?)",
        [(response, each["sequence_number"], encoded(each)) for each in events],
    )
