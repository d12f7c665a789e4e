from __future__ import annotations

import hashlib
import logging
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from appliance.core.errors import ConflictError, InvalidRequestError, NotFoundError, StorageError
from appliance.core.types import Priority
from appliance.security.keys import SCOPES, ApiKey, KeyStore
from appliance.store.database import Connection, Database
from tests.security.conftest import HandClock


@pytest.fixture
def keys(database: Database, clock: HandClock) -> KeyStore:
    return KeyStore(database, clock)


def audit(connection: Connection) -> list[tuple[str, str, str, str, float]]:
    select = "SELECT actor, action, subject, detail, at FROM audit ORDER BY id"
    return [tuple(row) for row in connection.execute(select)]


def finish_writes(database: Database) -> None:
    database.write_blocking(lambda _: None)


def test_a_new_key_is_known_by_its_secret(keys: KeyStore, clock: HandClock) -> None:
    key, secret = keys.create("line 3 camera", ["inference", "metrics"])
    assert secret.startswith("ea-")
    assert len(secret) == 46
    assert key.scopes == {"inference", "metrics"}
    assert (key.created, key.last_used, key.revoked) == (clock.now, None, None)
    assert keys.authenticate(secret) == key
    assert keys.has_keys()


def test_the_secret_is_nowhere_in_the_files(keys: KeyStore, database: Database) -> None:
    _, secret = keys.create("camera", ["inference"])
    keys.authenticate(secret)
    finish_writes(database)
    content = b"".join(each.read_bytes() for each in database.path.parent.iterdir())
    assert secret.encode() not in content
    assert secret.removeprefix("ea-").encode() not in content
    assert hashlib.sha256(secret.encode()).digest() in content


def test_secrets_and_ids_differ(keys: KeyStore) -> None:
    made = [keys.create(f"camera {n}", ["inference"]) for n in range(20)]
    assert len({secret for _, secret in made}) == len({key.id for key, _ in made}) == 20
    assert {key.id for key in keys.list()} == {key.id for key, _ in made}


@pytest.mark.parametrize(
    "token",
    ["", "ea-", "ea-" + "A" * 43, "ea-" + "é" * 43, "ea-" + "\ud800" * 43, "ea-" + "\0" * 43, "x" * 1_000_000],
)
def test_an_unknown_or_malformed_token_is_nobodys(keys: KeyStore, token: str) -> None:
    keys.create("camera", ["admin"])
    assert keys.authenticate(token) is None


def test_a_secret_that_differs_in_case_or_by_a_space_is_nobodys(keys: KeyStore) -> None:
    _, secret = keys.create("camera", ["inference"])
    for wrong in (secret.swapcase(), secret + " ", " " + secret, secret[:-1]):
        assert keys.authenticate(wrong) is None


def test_a_revoked_key_stops_at_once(keys: KeyStore, clock: HandClock) -> None:
    key, secret = keys.create("camera", ["inference"])
    clock.now += 5
    assert keys.revoke(key.id).revoked == clock.now
    assert keys.authenticate(secret) is None
    assert not keys.has_keys()
    assert [each.revoked for each in keys.list()] == [clock.now]


def test_a_key_that_another_process_revokes_stops_at_once(keys: KeyStore, database: Database, clock: HandClock) -> None:
    key, secret = keys.create("camera", ["inference"])
    assert keys.authenticate(secret) is not None
    with closing(Database(database.path)) as other:
        KeyStore(other, clock).revoke(key.id)
    assert keys.authenticate(secret) is None


def test_revoking_twice_keeps_the_first_time(keys: KeyStore, database: Database, clock: HandClock) -> None:
    key, _ = keys.create("camera", ["inference"])
    first = keys.revoke(key.id)
    clock.now += 100
    assert keys.revoke(key.id) == first
    assert [action for _, action, *_ in database.read(audit)] == ["key.create", "key.revoke"]


def test_an_unknown_id_cannot_be_revoked_and_the_valid_ones_are_named(keys: KeyStore, database: Database) -> None:
    with pytest.raises(NotFoundError, match="no valid API key at all"):
        keys.revoke("key_unknown")
    key, secret = keys.create("camera", ["inference"])
    before = database.read(audit)
    with pytest.raises(NotFoundError, match=key.id):
        keys.revoke("key_unknown")
    assert keys.authenticate(secret) == key
    assert database.read(audit) == before


def test_creating_and_revoking_are_audited(keys: KeyStore, database: Database, clock: HandClock) -> None:
    key, secret = keys.create("camera", ["metrics", "inference"], actor="key_admin")
    keys.revoke(key.id, actor="local:alice")
    made = '{"name":"camera","scopes":["inference","metrics"],"weight":1.0,"highest_tier":"default"}'
    assert database.read(audit) == [
        ("key_admin", "key.create", key.id, made, clock.now),
        ("local:alice", "key.revoke", key.id, '{"name":"camera"}', clock.now),
    ]
    assert secret not in str(database.read(audit))


def test_a_name_is_taken_once_until_its_key_is_revoked(keys: KeyStore, database: Database) -> None:
    key, secret = keys.create("摄像头", ["inference"])
    before = (keys.list(), database.read(audit))
    with pytest.raises(ConflictError, match="摄像头"):
        keys.create("摄像头", ["admin"])
    assert (keys.list(), database.read(audit)) == before
    assert keys.authenticate(secret) == key
    keys.revoke(key.id)
    assert keys.create("摄像头", ["admin"])[0].name == "摄像头"


def test_names_that_look_the_same_are_the_same(keys: KeyStore) -> None:
    keys.create("Caf\u00e9", ["inference"])
    with pytest.raises(ConflictError):
        keys.create("Cafe\u0301", ["inference"])


@pytest.mark.parametrize("name", ["", " ", " a", "a ", "a\n", "a\x1b[31m", "\u202egnorw", "\ud800", "a" * 65, "a\0"])
def test_a_name_that_a_terminal_could_not_show_is_refused(keys: KeyStore, name: str) -> None:
    with pytest.raises(InvalidRequestError, match="visible characters") as refusal:
        keys.create(name, ["inference"])
    assert refusal.value.message.isprintable()
    assert keys.list() == ()


@pytest.mark.parametrize(("scopes", "fault"), [([], "without a scope"), (["admin", "root"], "'root'")])
def test_a_wrong_scope_is_refused(keys: KeyStore, scopes: list[str], fault: str) -> None:
    with pytest.raises(InvalidRequestError, match=fault) as refusal:
        keys.create("camera", scopes)
    assert "inference, metrics, admin" in refusal.value.advice
    assert not keys.has_keys()


def test_a_key_has_its_share_and_its_highest_tier(keys: KeyStore) -> None:
    ordinary, _ = keys.create("ordinary", ["inference"])
    urgent, secret = keys.create("urgent", ["inference"], weight=2.5, highest_tier=Priority.PRIORITY)
    assert (ordinary.weight, ordinary.highest_tier) == (1.0, Priority.DEFAULT)
    assert keys.authenticate(secret) == urgent
    assert (urgent.weight, urgent.highest_tier) == (2.5, Priority.PRIORITY)
    listed = {each.id: each for each in keys.list()}
    assert listed == {ordinary.id: ordinary, urgent.id: replace(urgent, last_used=listed[urgent.id].last_used)}


@pytest.mark.parametrize("weight", [0.0, -1.0, 0.0099, 100.1, float("inf"), float("nan")])
def test_a_weight_that_would_starve_someone_is_refused(keys: KeyStore, weight: float) -> None:
    with pytest.raises(InvalidRequestError, match="weight") as refusal:
        keys.create("camera", ["inference"], weight=weight)
    assert refusal.value.param == "weight"
    assert "0.01 to 100" in refusal.value.advice
    assert not keys.has_keys()


@given(st.sets(st.sampled_from(SCOPES), min_size=1), st.sampled_from(SCOPES))
def test_admin_implies_every_scope_and_the_others_only_themselves(scopes: set[str], wanted: str) -> None:
    key = ApiKey("key_1", "a", frozenset(scopes), 0.0, None, None)
    assert key.allows(wanted) == (wanted in scopes or "admin" in scopes)


def test_use_is_noted_about_once_a_minute(keys: KeyStore, database: Database, clock: HandClock) -> None:
    _, secret = keys.create("camera", ["inference"])
    start = clock.now
    seen = []
    for elapsed in (0.0, 59.0, 61.0, 62.0):
        clock.now = start + elapsed
        keys.authenticate(secret)
        finish_writes(database)
        seen.append(keys.list()[0].last_used)
    assert seen == [start, start, start + 61, start + 61]


def test_use_is_noted_again_after_the_wall_clock_was_set_back(
    keys: KeyStore, database: Database, clock: HandClock
) -> None:
    _, secret = keys.create("camera", ["inference"])
    keys.authenticate(secret)
    clock.now -= 1_000_000
    keys.authenticate(secret)
    finish_writes(database)
    assert keys.list()[0].last_used == clock.now


def test_a_disk_that_takes_no_writes_does_not_lock_a_client_out(
    keys: KeyStore, database: Database, caplog: pytest.LogCaptureFixture
) -> None:
    key, secret = keys.create("camera", ["inference"])
    database.write_blocking(lambda connection: connection.execute("PRAGMA query_only=ON").fetchall())
    with caplog.at_level(logging.WARNING):
        assert keys.authenticate(secret) == key
        assert isinstance(database.submit(lambda _: None).exception(30), StorageError)
    assert "could not be noted" in caplog.text
    assert keys.list()[0].last_used is None


def test_keys_outlive_the_process(tmp_path: Path, clock: HandClock) -> None:
    path = tmp_path / "again" / "appliance.db"
    with closing(Database(path)) as database:
        key, secret = KeyStore(database, clock).create("camera", ["inference"])
    with closing(Database(path)) as database:
        assert KeyStore(database, clock).authenticate(secret) == key
