"""What a request costs does not grow with the conversation: counted in instructions of SQLite, not in time."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from appliance.sessions import history as ledger
from appliance.sessions.append import append, fork, make
from appliance.sessions.schema import MIGRATIONS
from appliance.store.database import Connection, Database
from tests.sessions.boxes import START, said

LIMIT = 1.5
"""Growth that is allowed where the conversation grows 16 times; trees are some levels deeper."""


@contextmanager
def ledger_of(folder: Path, count: int) -> Iterator[Connection]:
    """Yield a connection to a ledger with one conversation, which is written but not committed."""
    Database(folder / f"{count}.db", migrations=MIGRATIONS, durable=False).close()
    connection = sqlite3.connect(folder / f"{count}.db", isolation_level=None)
    connection.row_factory = sqlite3.Row
    try:
        connection.execute("BEGIN")
        row = make(connection, tenant="a", now=START)
        append(connection, row, [said("", f"i{number}") for number in range(count)], now=START)
        yield connection
    finally:
        connection.close()


def steps(connection: Connection, action: Callable[[], object]) -> int:
    """Return how many instructions SQLite ran."""
    count = 0

    def tick() -> int:
        nonlocal count
        count += 1
        return 0

    connection.set_progress_handler(tick, 1)
    action()
    connection.set_progress_handler(None, 1)
    return count


def the_conversation(connection: Connection) -> sqlite3.Row:
    row: sqlite3.Row = connection.execute("SELECT * FROM conversations ORDER BY key LIMIT 1").fetchone()
    return row


def opening(connection: Connection) -> None:
    history = ledger.history_of(connection, the_conversation(connection))
    assert len(list(ledger.messages(connection, history, limit=100, newest_first=True))) == 100


def looking_up(connection: Connection) -> None:
    ledger.message(connection, ledger.history_of(connection, the_conversation(connection)), "i10")


def paging(connection: Connection) -> None:
    history = ledger.history_of(connection, the_conversation(connection))
    assert len(list(ledger.messages(connection, history, limit=10, low=history.head // 2))) == 10


def appending(connection: Connection) -> None:
    append(connection, the_conversation(connection), [said("", "new")], now=START, after=None)


def forking(connection: Connection) -> None:
    fork(connection, the_conversation(connection), None, now=START)


@pytest.mark.parametrize("action", [opening, looking_up, paging, appending, forking])
def test_the_work_does_not_grow_with_the_conversation(tmp_path: Path, action: Callable[[Connection], None]) -> None:
    counted = []
    for size in (250, 4000):
        with ledger_of(tmp_path, size) as connection:
            counted.append(steps(connection, lambda one=connection: action(one)))  # type: ignore[misc]
    assert 0 < counted[1] <= LIMIT * counted[0], counted
