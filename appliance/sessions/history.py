"""The path of a conversation through the lines of the ledger: reading it, writing at its end, leaving it.

Every function works in the caller's transaction. Positions count from 1; 0 is before the first message.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from hashlib import sha256
from typing import Any

import msgspec

from appliance.core.errors import NotFoundError
from appliance.core.sessions import Item
from appliance.sessions.words import index
from appliance.store.database import Connection, Row
from appliance.store.rows import one

_PATH = """
    WITH RECURSIVE path (line, parent, low, high) AS (
        SELECT key, parent, start, :head FROM lines WHERE key = :line
        UNION ALL
        SELECT lines.key, lines.parent, lines.start, path.low FROM path JOIN lines ON lines.key = path.parent
    )
"""

_THERE = """
    item IS NOT NULL
    AND NOT EXISTS (SELECT 1 FROM removals WHERE removals.line = :own AND removals.message = messages.key)
"""


@dataclass(frozen=True, slots=True)
class Segment:
    """The part of a path that is on one line: behind `low`, up to `high`."""

    line: int
    low: int
    high: int


@dataclass(frozen=True, slots=True)
class History:
    """A conversation's path, newest segment first.

    Attributes:
        line: The conversation's own line.
        head: Its last position, whether what stood there has been removed or not.
    """

    line: int
    head: int
    segments: tuple[Segment, ...]

    def at(self, position: int) -> Segment:
        """Return the segment that a position from 1 to the head is on."""
        return next(each for each in self.segments if each.low < position)


def conversation_row(connection: Connection, conversation: str, tenant: str) -> Row:
    """Return a row of `conversations`. Raises NotFoundError."""
    sql = "SELECT * FROM conversations WHERE id = ? AND tenant = ?"
    return one(connection, sql, (conversation, tenant), f"conversation {conversation[:100]!r}")


def history_of(connection: Connection, row: Row) -> History:
    """Return the path of a row of `conversations`."""
    found = connection.execute(f"{_PATH} SELECT line, low, high FROM path", {"line": row["line"], "head": row["head"]})  # noqa: S608
    segments = (Segment(*each) for each in found)
    return History(row["line"], row["head"], tuple(each for each in segments if each.low < each.high))


def messages(
    connection: Connection,
    history: History,
    *,
    limit: int | None = None,
    low: int = 0,
    high: int | None = None,
    newest_first: bool = False,
) -> Iterator[Row]:
    """Yield messages behind the position `low`, up to `high`, that the conversation still has."""
    high = history.head if high is None else high
    order = "DESC" if newest_first else "ASC"
    sql = f"""
        SELECT key, position, id, item, response FROM messages
        WHERE line = :line AND position > :low AND position <= :high AND {_THERE} ORDER BY position {order} LIMIT :limit
    """  # noqa: S608
    left = -1 if limit is None else limit
    for each in history.segments if newest_first else reversed(history.segments):
        values = {"line": each.line, "low": max(low, each.low), "high": min(high, each.high), "own": history.line}
        if left and values["low"] < values["high"]:
            rows = connection.execute(sql, {**values, "limit": left}).fetchall()
            yield from rows
            left = left if limit is None else left - len(rows)


def message(connection: Connection, history: History, item: str) -> Row:
    """Return the message of an item that the conversation has. Raises NotFoundError."""
    sql = f"""
        SELECT key, line, position, id, item, response FROM messages
        WHERE line = :line AND id = :id AND position <= :high AND {_THERE}
    """  # noqa: S608
    for each in history.segments:
        values = {"line": each.line, "id": item, "high": each.high, "own": history.line}
        row: Row | None = connection.execute(sql, values).fetchone()
        if row is not None:
            return row
    raise NotFoundError(f"The conversation has no item {item[:100]!r}.", advice="List its items.", param="item")


def stored(connection: Connection, history: History, ids: Sequence[str]) -> dict[str, Item]:
    """Return those items of the ids that the conversation has, by id."""
    found: dict[str, Item] = {}
    for each in ids:
        try:
            found[each] = item_of(message(connection, history, each))
        except NotFoundError:
            continue
    return found


def item_of(row: Row) -> Item:
    """Return the item of a message."""
    item: dict[str, Any] = msgspec.json.decode(row["item"])
    return item


def write(
    connection: Connection, history: History, items: Sequence[Item], *, tenant: str, response: str = ""
) -> History:
    """Append items that have ids which the conversation does not have, and return the longer history."""
    position, before = history.head, hash_at(connection, history, history.head)
    insert = "INSERT INTO messages (line, position, id, item, hash, response) VALUES (?, ?, ?, ?, ?, ?)"
    for item in items:
        position += 1
        content = msgspec.json.encode(item)
        before = message_hash(before, content)
        values = (history.line, position, item["id"], content.decode(), before, response)
        key = connection.execute(insert, values).lastrowid
        index(connection, int(key or 0), item, tenant=tenant, line=history.line)
    own = connection.execute("SELECT start FROM lines WHERE key = ?", (history.line,)).fetchone()[0]
    older = tuple(each for each in history.segments if each.line != history.line)
    return History(history.line, position, (Segment(history.line, own, position), *older))


def message_hash(before: bytes, content: bytes) -> bytes:
    """Return the hash of a message behind another, b"" if it is the first."""
    return sha256(before + content).digest()


def hash_at(connection: Connection, history: History, position: int) -> bytes:
    """Return the hash of the message at a position, b"" before the first."""
    if position == 0:
        return b""
    sql = "SELECT hash FROM messages WHERE line = ? AND position = ?"
    return bytes(connection.execute(sql, (history.at(position).line, position)).fetchone()[0])


def branch(connection: Connection, history: History, position: int, tenant: str) -> History:
    """Make a line that leaves a history behind a position; what that has removed is removed here too."""
    parent = history.at(position).line if position else None
    values = (tenant, parent, position)
    key = connection.execute("INSERT INTO lines (tenant, parent, start) VALUES (?, ?, ?)", values).lastrowid
    line = int(key or 0)
    connection.execute(
        """
        INSERT INTO removals SELECT ?, message FROM removals JOIN messages ON messages.key = message
        WHERE removals.line = ? AND position <= ?
        """,
        (line, history.line, position),
    )
    connection.execute(
        """
        INSERT INTO summaries SELECT ?, position, until, text, model FROM summaries
        WHERE line = ? AND position <= ? ORDER BY position DESC LIMIT 1
        """,
        (line, history.line, position),
    )
    past = tuple(
        Segment(each.line, each.low, min(each.high, position)) for each in history.segments if each.low < position
    )
    return History(line, position, past)


def wrong(connection: Connection, history: History) -> str:
    """Return what is wrong with a conversation's hashes and positions, "" if nothing is."""
    before = b""
    expected = 0
    for each in reversed(history.segments):
        sql = "SELECT position, item, hash FROM messages WHERE line = ? AND position > ? AND position <= ? ORDER BY 1"
        for position, item, found in connection.execute(sql, (each.line, each.low, each.high)):
            expected += 1
            if position != expected:
                return f"Position {expected} is missing."
            if item is not None and bytes(found) != message_hash(before, item.encode()):
                return f"The message at position {position} is not the one that was appended."
            before = bytes(found)
    return "" if expected == history.head else f"Position {expected + 1} is missing."
