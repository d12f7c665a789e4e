"""Who may reach the server."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from appliance.core.errors import SettingsError
from appliance.web.exposure import check_exposure, is_loopback, keys_required
from tests.api.boxes import settings_with

TLS = {"tls_certificate": Path("server.pem"), "tls_key": Path("server.key")}
ADDRESSES = ["0.0.0.0", "192.168.1.5", "::", "2001:db8::1"]


def settings(**changes: Any) -> Any:
    return settings_with(Path("/data"), **changes)


@pytest.mark.parametrize("host", ["127.0.0.1", "127.9.9.9", "::1", "localhost", "LOCALHOST", "localhost."])
def test_loopback_is_known_by_address_and_name(host: str) -> None:
    assert is_loopback(host)


@pytest.mark.parametrize("host", [*ADDRESSES, "", "box", "localhost.example.com", "127.0.0.1.nip.io", "10.0.0.1"])
def test_anything_else_counts_as_reachable_from_outside(host: str) -> None:
    assert not is_loopback(host)


@pytest.mark.parametrize("has_keys", [True, False])
def test_loopback_starts_without_keys_and_tls(has_keys: bool) -> None:
    check_exposure(settings(), has_keys)
    assert not keys_required(settings(), has_keys=has_keys)


@pytest.mark.parametrize("host", ADDRESSES)
def test_another_address_needs_a_key_and_tls(host: str) -> None:
    check_exposure(settings(host=host, **TLS), has_keys=True)
    for changes, has_keys, missing in (
        ({}, False, "an API key and TLS"),
        ({}, True, "without TLS"),
        (TLS, False, "without an API key"),
    ):
        with pytest.raises(SettingsError, match=missing) as refusal:
            check_exposure(settings(host=host, **changes), has_keys)
        assert refusal.value.param == "host"
        assert "insecure" in refusal.value.advice


def test_insecure_starts_anywhere_but_keys_that_exist_are_asked_for() -> None:
    box = settings(host="0.0.0.0", insecure=True)
    check_exposure(box, has_keys=False)
    assert not keys_required(box, has_keys=False)
    assert keys_required(box, has_keys=True)


@pytest.mark.parametrize(("given_file", "missing"), [("tls_certificate", "tls_key"), ("tls_key", "tls_certificate")])
@pytest.mark.parametrize("host", ["127.0.0.1", "0.0.0.0"])
def test_half_of_tls_is_refused(host: str, given_file: str, missing: str) -> None:
    with pytest.raises(SettingsError, match=missing) as refusal:
        check_exposure(settings(host=host, insecure=True, **{given_file: Path("file.pem")}), has_keys=True)
    assert refusal.value.param == missing


@given(
    host=st.sampled_from(["127.0.0.1", "localhost", "box.lan", *ADDRESSES]),
    has_keys=st.booleans(),
    insecure=st.booleans(),
    require=st.booleans(),
    tls=st.booleans(),
)
def test_nobody_outside_gets_in_without_a_key_unless_the_owner_said_so(
    host: str, has_keys: bool, insecure: bool, require: bool, tls: bool
) -> None:
    box = settings(host=host, insecure=insecure, require_api_key=require, **(TLS if tls else {}))
    try:
        check_exposure(box, has_keys)
    except SettingsError:
        assert not is_loopback(host)
        assert not insecure
        return
    needed = keys_required(box, has_keys=has_keys)
    assert needed or is_loopback(host) or (insecure and not has_keys)
    assert needed or not require
    assert tls or is_loopback(host) or insecure
