"""Beginning, forking and continuing a conversation, in the caller's transaction."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from appliance.core.errors import ConflictError
from appliance.core.sessions import Item
from appliance.sessions.history import History, branch, conversation_row, history_of, message, stored, write
from appliance.sessions.rows import encoded, with_id
from appliance.store.database import Connection, Row
from appliance.store.rows import new_id

_NOTHING = History(0, 0, ())


def make(
    connection: Connection, *, tenant: str, now: int, title: str = "", metadata: Mapping[str, str] | None = None
) -> Row:
    """Begin a conversation without a past, and return its row."""
    line = branch(connection, _NOTHING, 0, tenant).line
    return _insert(
        connection,
        (new_id("conv_"), tenant, line, 0, "", "", title, encoded(dict(metadata or {})), now, now),
    )


def fork(connection: Connection, row: Row, at: str | None, *, now: int) -> Row:
    """Begin a conversation with the past of another up to the item `at`, nothing of it if that is "", and all if None.

    Raises:
        NotFoundError: The conversation has no such item.
    """
    history = history_of(connection, row)
    last = row["last"] if at is None else at
    position = history.head if at is None else (message(connection, history, at)["position"] if at else 0)
    line = branch(connection, history, position, row["tenant"]).line
    said = (row["title"], row["metadata"], now, now)
    return _insert(connection, (new_id("conv_"), row["tenant"], line, position, last, row["id"], *said))


def _insert(connection: Connection, values: tuple[object, ...]) -> Row:
    connection.execute(
        """
        INSERT INTO conversations (id, tenant, line, head, last, forked_from, title, metadata, created, updated)
        VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)
        """,
        values,
    )
    return conversation_row(connection, str(values[0]), str(values[1]))


def append(
    connection: Connection,
    row: Row,
    items: Sequence[Item],
    *,
    now: int,
    after: str | None = None,
    fork_instead: bool = False,
    response: str = "",
) -> tuple[Row, Sequence[Item]]:
    """Append those of the items that the conversation does not have, and return its row, or its fork's, and the items.

    Raises:
        InvalidRequestError: An item has no type, or a bad id.
        ConflictError: Another item was appended behind `after`.
        NotFoundError: It was not, but is to be forked from, and there is no such item.
    """
    wanted = [with_id(each) for each in items]
    history = history_of(connection, row)
    there = stored(connection, history, [each["id"] for each in wanted])
    new = {each["id"]: each for each in reversed(wanted) if each["id"] not in there}
    if new and after is not None and after != row["last"]:
        if not fork_instead:
            raise _conflict(row, after)
        row = fork(connection, row, after, now=now)
        history = history_of(connection, row)
        there = stored(connection, history, [each["id"] for each in wanted])
        new = {each["id"]: each for each in reversed(wanted) if each["id"] not in there}
    if new:
        row = _continue(connection, row, history, list(reversed(new.values())), now=now, response=response)
    return row, [there.get(each["id"]) or new[each["id"]] for each in wanted]


def _continue(
    connection: Connection, row: Row, history: History, items: Sequence[Item], *, now: int, response: str
) -> Row:
    longer = write(connection, history, items, tenant=row["tenant"], response=response)
    sql = "UPDATE conversations SET head = ?, last = ?, updated = max(updated, ?) WHERE key = ?"
    connection.execute(sql, (longer.head, items[-1]["id"], now, row["key"]))
    return conversation_row(connection, row["id"], row["tenant"])


def _conflict(row: Row, after: str) -> ConflictError:
    return ConflictError(
        f"The newest item of {row['id']} is {row['last'] or 'none'!r}, not {after[:100] or 'none'!r}; "
        "nothing was appended.",
        advice="Read what was appended meanwhile and try again, or ask for a fork.",
        code="conversation_changed",
        param="after",
    )
