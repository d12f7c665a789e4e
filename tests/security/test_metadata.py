"""The client of a signed repository against whatever may come: it refuses with one of our errors, and keeps nothing."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from appliance.core.errors import NotFoundError, UntrustedError
from appliance.hub.authority import Authority
from appliance.hub.metadata import load_roles
from appliance.hub.releases import fetching
from appliance.security.metadata import Client, Kept, MemoryRecord
from appliance.security.signing import list_keys, load_key
from tests.fleet.trusting import DAY, START, HandClock

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=5,
)


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    made = Authority(tmp_path_factory.mktemp("hub"), HandClock())
    made.create()
    made.sign_again("root")
    return made


def places(document: Any) -> list[tuple[Any, Any]]:
    """Return every place of a JSON document: its container and its key."""
    found: list[tuple[Any, Any]] = []
    items = list(document.items()) if isinstance(document, dict) else list(enumerate(document))
    for key, value in items:
        found.append((document, key))
        if isinstance(value, dict | list):
            found += places(value)
    return found


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data(), name=st.sampled_from(["2.root.json", "timestamp.json", "1.snapshot.json", "1.targets.json"]))
def test_no_change_of_metadata_gets_through_and_none_raises_anything_but_our_error(
    authority: Authority, data: st.DataObject, name: str
) -> None:
    files = authority.repository.metadata()
    document = json.loads(files[name])
    container, key = data.draw(st.sampled_from(places(document)))
    container[key] = data.draw(VALUES)
    honest = fetching(authority.repository.folder)

    async def fetch(path: str, most: int) -> bytes | None:
        if path == f"metadata/{name}":
            return json.dumps(document).encode("utf-8", "surrogatepass")
        return await honest(path, most)

    record = MemoryRecord(files["1.root.json"])
    try:
        verified = asyncio.run(Client(record, built=START - DAY).refresh(fetch, lambda: START))
    except UntrustedError:
        return
    # What nobody signs may be garbled, and a field may be left out that is read as what it was; nothing more.
    truth = asyncio.run(Client(MemoryRecord(files["1.root.json"]), built=START - DAY).refresh(honest, lambda: START))
    assert (verified.versions(), verified.expires(), verified.targets()) == (
        truth.versions(),
        truth.expires(),
        truth.targets(),
    )


@pytest.mark.parametrize("version", [2**53 + 1, 10**300, 2**63])
def test_a_signed_version_that_no_database_holds_is_refused(authority: Authority, version: int) -> None:
    roles = load_roles(authority.repository.metadata())
    keys = {each.role: load_key(each.path) for each in list_keys([authority.online_folder])}
    roles.timestamp.signed.version = version - 1
    roles.sign_timestamp(START, [keys["timestamp"]])
    honest = fetching(authority.repository.folder)

    async def fetch(path: str, most: int) -> bytes | None:
        return roles.written["timestamp.json"] if path.endswith("timestamp.json") else await honest(path, most)

    record = MemoryRecord(authority.root())
    with pytest.raises(UntrustedError) as refusal:
        asyncio.run(Client(record, built=START - DAY).refresh(fetch, lambda: START))
    assert refusal.value.code == "bad_metadata"
    assert record.kept() == Kept(authority.root(), {}, {})


def test_a_client_that_has_seen_nothing_says_so(authority: Authority) -> None:
    with pytest.raises(NotFoundError) as refusal:
        Client(MemoryRecord(authority.root())).recorded()
    assert refusal.value.code == "never_verified"


def test_an_anchor_that_is_no_root_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UntrustedError):
        Client(MemoryRecord(b"{}")).recorded()


def test_the_time_of_a_signature_counts_only_if_it_makes_sense(authority: Authority) -> None:
    roles = load_roles(authority.repository.metadata())
    keys = {each.role: load_key(each.path) for each in list_keys([authority.online_folder])}
    honest = fetching(authority.repository.folder)
    for issued in ("soon", -5, 2**60, True, None):
        roles.timestamp.signed.unrecognized_fields["x-issued"] = issued
        roles.timestamp.signatures.clear()
        roles.timestamp.sign(keys["timestamp"].signer)
        data = roles.timestamp.to_bytes()

        async def fetch(path: str, most: int, data: bytes = data) -> bytes | None:
            return data if path.endswith("timestamp.json") else await honest(path, most)

        record = MemoryRecord(authority.root())
        asyncio.run(Client(record, built=START - DAY).refresh(fetch, lambda: START))
        assert record.kept().marks["timestamp"].issued in (0.0, 1.0)
