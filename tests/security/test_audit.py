from __future__ import annotations

import json
import os
import pwd
import time

import pytest

from appliance.core.errors import ConflictError
from appliance.security.audit import local_actor, record
from appliance.store.database import Connection, Database


def rows(connection: Connection) -> list[tuple[str, str, str, str]]:
    return [tuple(row) for row in connection.execute("SELECT actor, action, subject, detail FROM audit ORDER BY id")]


def test_a_row_holds_who_did_what_to_what_and_when(database: Database) -> None:
    before = time.time()
    database.write_blocking(
        lambda connection: record(connection, "key_1", "model.remove", "通义:1", {"reason": "换新", "bytes": 3})
    )
    ((actor, action, subject, detail),) = database.read(rows)
    assert (actor, action, subject, json.loads(detail)) == (
        "key_1",
        "model.remove",
        "通义:1",
        {"reason": "换新", "bytes": 3},
    )
    (at,) = database.read(lambda connection: connection.execute("SELECT at FROM audit").fetchone())
    assert before <= at <= time.time()


def test_a_change_that_fails_leaves_no_row(database: Database) -> None:
    def change(connection: Connection) -> None:
        record(connection, "key_1", "model.remove", "a")
        raise LookupError

    with pytest.raises(LookupError):
        database.write_blocking(change)
    assert database.read(rows) == []


@pytest.mark.parametrize("statement", ["UPDATE audit SET actor = 'someone else'", "DELETE FROM audit"])
def test_a_row_cannot_be_changed_or_deleted(database: Database, statement: str) -> None:
    database.write_blocking(lambda connection: record(connection, "key_1", "model.remove", "a"))
    before = database.read(rows)
    with pytest.raises(ConflictError, match="append-only"):
        database.write_blocking(lambda connection: connection.execute(statement).rowcount)
    assert database.read(rows) == before


def test_the_local_actor_is_the_user_of_the_process() -> None:
    assert local_actor() == f"local:{pwd.getpwuid(os.getuid()).pw_name}"


def test_a_user_without_a_name_is_recorded_by_his_number(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "getuid", lambda: 987_654_321)
    assert local_actor() == "local:987654321"
