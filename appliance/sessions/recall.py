"""Finding what was said: in all of one's own conversations, and in the past of one."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice

from appliance.core.sessions import Found, Item
from appliance.core.words import query_terms
from appliance.sessions.history import History, item_of, message
from appliance.sessions.texts import passage, text_of
from appliance.sessions.words import find_in_lines, find_in_tenant
from appliance.store.database import Connection, Row


def search(connection: Connection, query: str, *, tenant: str, limit: int) -> Sequence[Found]:
    """Return items of a tenant's conversations in which the query's words stand, best first."""
    terms = frozenset(query_terms(query))
    keys = find_in_tenant(connection, query, tenant)
    found = (_found(connection, key, terms) for key in keys)
    return list(islice((each for each in found if each is not None), limit))


def _found(connection: Connection, key: int, terms: frozenset[str]) -> Found | None:
    """Return a message with the conversation that it was said in, or with a fork that has it still."""
    sql = """
        WITH RECURSIVE reach (line, position, item) AS (
            SELECT line, position, item FROM messages WHERE key = :key
            UNION ALL
            SELECT lines.key, position, item FROM reach JOIN lines ON lines.parent = reach.line AND start >= position
        )
        SELECT id, item FROM reach JOIN conversations ON conversations.line = reach.line
        WHERE NOT EXISTS (SELECT 1 FROM removals WHERE removals.line = reach.line AND message = :key)
        ORDER BY conversations.key LIMIT 1
    """
    row = connection.execute(sql, {"key": key}).fetchone()
    if row is None:
        return None
    item = item_of(row)
    return Found(row["id"], item, passage(text_of(item), terms))


def memory(connection: Connection, history: History, query: str, *, before: str, limit: int) -> Sequence[Item]:
    """Return items of one conversation older than `before`, of all if it is "", best first.

    Raises:
        NotFoundError: The conversation has no item `before`.
    """
    end = message(connection, history, before)["position"] if before else history.head + 1
    keys = find_in_lines(connection, query, [each.line for each in history.segments])
    rows = (_message(connection, key, history, end) for key in keys)
    return [item_of(each) for each in islice((each for each in rows if each is not None), limit)]


def _message(connection: Connection, key: int, history: History, end: int) -> Row | None:
    sql = """
        SELECT line, position, item FROM messages WHERE key = ? AND position < ?
        AND NOT EXISTS (SELECT 1 FROM removals WHERE removals.line = ? AND message = messages.key)
    """
    row: Row | None = connection.execute(sql, (key, end, history.line)).fetchone()
    if row is None or not any(each.line == row["line"] and row["position"] <= each.high for each in history.segments):
        return None
    return row
