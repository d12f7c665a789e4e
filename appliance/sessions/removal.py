"""Taking conversations, items and responses out, each in one transaction; `erasure` sees to what is left in the files.

What two conversations share goes with the last of them that has it.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from appliance.sessions.history import conversation_row, history_of, message, messages
from appliance.sessions.words import forget
from appliance.store.database import Connection, Row

SLICE = 500
"""Rows that one transaction deletes; other writers take turns with it."""


def remove_conversation(connection: Connection, row: Row) -> None:
    """Take a conversation out with its responses; its line is waste."""
    line = row["line"]
    shared = _removed_elsewhere(connection, row)
    connection.execute("DELETE FROM conversations WHERE key = ?", (row["key"],))
    connection.execute("DELETE FROM removals WHERE line = ?", (line,))
    connection.execute("DELETE FROM summaries WHERE line = ?", (line,))
    connection.execute("UPDATE lines SET waste = 1 WHERE key = ?", (line,))
    for each in shared:
        if not _is_held(connection, each):
            _blank(connection, each)
    for (response,) in connection.execute("SELECT key FROM responses WHERE conversation = ?", (row["id"],)).fetchall():
        remove_response(connection, response)
    _record(connection, row["id"])


def _removed_elsewhere(connection: Connection, row: Row) -> Sequence[Row]:
    """Return messages that a conversation shares with another one which has removed them.

    Those on its own line count as well: the line stays up to its last fork, and with it what every fork has removed.
    """
    sql = """
        SELECT DISTINCT messages.key, messages.line, position FROM messages JOIN removals ON message = messages.key
        WHERE messages.line = :line AND position <= :high
        AND position <= (SELECT max(start) FROM lines WHERE parent = :line)
    """
    path = history_of(connection, row).segments
    return [found for each in path for found in connection.execute(sql, {"line": each.line, "high": each.high})]


def remove_item(connection: Connection, conversation: str, item: str, tenant: str) -> None:
    """Take an item out of a conversation, out of the response that said it, and the summaries that cover it.

    Raises:
        NotFoundError: The tenant has no such conversation, or that has no such item.
    """
    row = conversation_row(connection, conversation, tenant)
    history = history_of(connection, row)
    found = message(connection, history, item)
    connection.execute("INSERT INTO removals (line, message) VALUES (?, ?)", (history.line, found["key"]))
    if not _is_held(connection, found):
        _blank(connection, found)
    if row["last"] == item:
        newest = next(messages(connection, history, limit=1, newest_first=True), None)
        last = "" if newest is None else newest["id"]
        connection.execute("UPDATE conversations SET last = ? WHERE key = ?", (last, row["key"]))
    sql = "DELETE FROM summaries WHERE line = ? AND position >= ?"
    connection.execute(sql, (history.line, found["position"]))
    _redact(connection, found["response"], conversation, item)
    _record(connection, conversation)


def _is_held(connection: Connection, found: Row) -> bool:
    """Return whether any conversation has the message."""
    sql = """
        WITH RECURSIVE reach (line) AS (
            SELECT :line
            UNION ALL
            SELECT lines.key FROM reach JOIN lines ON lines.parent = reach.line AND lines.start >= :position
        )
        SELECT 1 FROM reach JOIN conversations ON conversations.line = reach.line
        WHERE NOT EXISTS (SELECT 1 FROM removals WHERE removals.line = reach.line AND message = :key) LIMIT 1
    """
    values = {"line": found["line"], "position": found["position"], "key": found["key"]}
    return connection.execute(sql, values).fetchone() is not None


def _blank(connection: Connection, found: Row) -> None:
    forget(connection, [found["key"]])
    connection.execute("DELETE FROM removals WHERE message = ?", (found["key"],))
    connection.execute("UPDATE messages SET id = NULL, item = NULL WHERE key = ?", (found["key"],))


def _redact(connection: Connection, response: str, conversation: str, item: str) -> None:
    """Take an item out of the response of this conversation that appended it; its journal and events go whole."""
    sql = "SELECT key, body, input FROM responses WHERE id = ? AND conversation = ?"
    row = connection.execute(sql, (response, conversation)).fetchone()
    if row is None:
        return
    body, given = msgspec.json.decode(row["body"]), msgspec.json.decode(row["input"])
    if isinstance(body.get("output"), list):
        body["output"] = [each for each in body["output"] if each.get("id") != item]
    given = [each for each in given if each.get("id") != item]
    texts = (msgspec.json.encode(body).decode(), msgspec.json.encode(given).decode(), row["key"])
    connection.execute("UPDATE responses SET request = '{}', body = ?, input = ? WHERE key = ?", texts)
    connection.execute("DELETE FROM events WHERE response = ?", (row["key"],))
    connection.execute("DELETE FROM steps WHERE response = ?", (row["key"],))


def erase_response(connection: Connection, row: Row) -> None:
    """Take a response out that is deleted by itself."""
    _record(connection, row["conversation"] or first_response(connection, row["key"]))
    remove_response(connection, row["key"])


def first_response(connection: Connection, key: int) -> str:
    """Return the id of the first of the responses that a response follows, or its own."""
    sql = """
        WITH RECURSIVE chain (key, before, id, depth) AS (
            SELECT key, before, id, 0 FROM responses WHERE key = ?
            UNION ALL
            SELECT responses.key, responses.before, responses.id, depth + 1
            FROM chain JOIN responses ON responses.key = chain.before
        )
        SELECT id FROM chain ORDER BY depth DESC LIMIT 1
    """
    return str(connection.execute(sql, (key,)).fetchone()[0])


def _record(connection: Connection, session: str) -> None:
    connection.execute("INSERT INTO erasures (session) VALUES (?)", (session,))


def remove_response(connection: Connection, key: int) -> None:
    """Take a response out; what followed it follows what was before it."""
    sql = "UPDATE responses SET before = (SELECT before FROM responses WHERE key = ?1) WHERE before = ?1"
    connection.execute(sql, (key,))
    connection.execute("UPDATE responses SET waste = 1, before = 0 WHERE key = ?", (key,))


def delete_waste(connection: Connection) -> bool:
    """Delete some of what nobody has, and return whether more may be left."""
    line = connection.execute("SELECT * FROM lines WHERE waste LIMIT 1").fetchone()
    if line is not None:
        _delete_from_line(connection, line)
        return True
    response = connection.execute("SELECT key FROM responses WHERE waste LIMIT 1").fetchone()
    if response is not None:
        _delete_from_response(connection, response[0])
    return response is not None


def _delete_from_line(connection: Connection, line: Row) -> None:
    """Delete messages behind the last that a fork has; then the line if there is none, and look at its parent."""
    held = connection.execute("SELECT max(start) FROM lines WHERE parent = ?", (line["key"],)).fetchone()[0]
    sql = "SELECT key FROM messages WHERE line = ? AND position > ? LIMIT ?"
    found = [int(key) for (key,) in connection.execute(sql, (line["key"], held or 0, SLICE))]
    forget(connection, found)
    for table, column in (("removals", "message"), ("messages", "key")):
        connection.executemany(f"DELETE FROM {table} WHERE {column} = ?", [(key,) for key in found])  # noqa: S608
    if len(found) == SLICE:
        return
    if held is not None:
        connection.execute("UPDATE lines SET waste = 0 WHERE key = ?", (line["key"],))
        return
    connection.execute("DELETE FROM lines WHERE key = ?", (line["key"],))
    sql = "UPDATE lines SET waste = 1 WHERE key = ? AND NOT EXISTS (SELECT 1 FROM conversations WHERE line = lines.key)"
    connection.execute(sql, (line["parent"],))


def _delete_from_response(connection: Connection, key: int) -> None:
    sql = "DELETE FROM events WHERE rowid IN (SELECT rowid FROM events WHERE response = ? LIMIT ?)"
    if connection.execute(sql, (key, SLICE)).rowcount < SLICE:
        connection.execute("DELETE FROM responses WHERE key = ?", (key,))
