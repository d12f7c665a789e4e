from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, get_type_hints

import pytest
from hypothesis import given
from hypothesis import strategies as st

from appliance.core.errors import SettingsError
from appliance.core.setting_values import describe
from appliance.core.settings import Settings, load_settings, setting_fields


def write(folder: Path, text: str) -> Path:
    path = folder / "appliance.toml"
    path.write_text(text, encoding="utf-8")
    return path


def load(**flags: Any) -> Settings:
    return load_settings(flags=flags)[0]


def refusal(
    *, flags: Mapping[str, Any] | None = None, environment: Mapping[str, str] | None = None, file: Path | None = None
) -> SettingsError:
    with pytest.raises(SettingsError) as raised:
        load_settings(flags=flags, environment=environment, config_file=file)
    assert str(raised.value).isprintable()
    return raised.value


# Sources


@pytest.mark.parametrize("in_file", [True, False])
@pytest.mark.parametrize("in_environment", [True, False])
@pytest.mark.parametrize("as_flag", [True, False])
def test_flags_are_over_environment_over_file_over_default(
    tmp_path: Path, in_file: bool, in_environment: bool, as_flag: bool
) -> None:
    file = write(tmp_path, "port = 1001" if in_file else "")
    environment = {"APPLIANCE_PORT": "1002"} if in_environment else {}
    flags = {"port": 1003 if as_flag else None}
    settings, effective = load_settings(flags=flags, environment=environment, config_file=file)
    expected = (
        (1003, "flag --port")
        if as_flag
        else (1002, "environment APPLIANCE_PORT")
        if in_environment
        else (1001, f"file {file}")
        if in_file
        else (8080, "default")
    )
    (port,) = [each for each in effective if each.name == "port"]
    assert (settings.port, port.value, port.origin) == (expected[0], *expected)


def test_every_setting_is_listed_in_order_with_its_meaning() -> None:
    settings, effective = load_settings()
    assert [each.name for each in effective] == list(setting_fields())
    assert all(each.meaning and each.origin == "default" for each in effective)
    assert {each.name: each.value for each in effective} == {name: getattr(settings, name) for name in setting_fields()}


def test_the_defaults_pass_their_own_checks() -> None:
    given = {name: getattr(Settings(), name) for name in setting_fields()}
    assert load(**given) == load()


def test_variables_of_others_are_left_alone() -> None:
    settings, _ = load_settings(
        environment={"PORT": "1", "PATH": "/bin", "APPLIANCE_API_KEY": "ea-x", "appliance_port": "1"}
    )
    assert settings.port == 8080


@pytest.mark.parametrize("name", ["nonsense", "Port", "PORT ", "port-number", "", "__class__", "ports"])
def test_an_unknown_name_is_refused_by_every_source(tmp_path: Path, name: str) -> None:
    file = write(tmp_path, f'"{name}" = 1')
    for error in (
        refusal(flags={name: 1}),
        refusal(environment={f"APPLIANCE_{name}": "1"}),
        refusal(file=file),
    ):
        assert repr(name) in error.message
        assert error.param == name
        assert "appliance config" in error.advice


def test_a_bad_value_is_refused_even_where_a_stronger_source_overrides_it(tmp_path: Path) -> None:
    file = write(tmp_path, "port = 70000")
    error = refusal(flags={"port": 8081}, environment={"APPLIANCE_PORT": "8082"}, file=file)
    assert error.message == f"file {file} sets port to 70000; it takes a whole number from 0 to 65535."
    assert refusal(flags={"port": 8081}, environment={"APPLIANCE_PORT": "x"}).param == "port"


# Values


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("port", -1),
        ("port", 65536),
        ("port", "8080.5"),
        ("port", " 8080"),
        ("port", "8_080"),
        ("port", "٣"),
        ("port", ""),
        ("port", "\udc80"),
        ("port", True),
        ("port", 8080.5),
        ("port", [8080]),
        ("port", 10**400),
        ("header_timeout_s", 0),
        ("header_timeout_s", -1.5),
        ("header_timeout_s", float("nan")),
        ("header_timeout_s", float("inf")),
        ("header_timeout_s", "nan"),
        ("header_timeout_s", "-inf"),
        ("header_timeout_s", 10**400),
        ("header_timeout_s", True),
        ("insecure", "yes"),
        ("insecure", ""),
        ("insecure", 1),
        ("log_level", "DEBUG"),
        ("log_level", "trace"),
        ("model", 3),
        ("model", "a\nb"),
        ("model", "\udc80"),
        ("max_body_bytes", 2**40 + 1),
        ("context_cells", 0),
        ("data_dir", ""),
        ("data_dir", "a\0b"),
        ("data_dir", 3),
        ("data_dir", "~nobody-has-this-name/x"),
        ("tls_key", False),
    ],
)
def test_a_wrong_value_is_refused_by_name(name: str, value: Any) -> None:
    error = refusal(flags={name: value})
    assert error.param == name
    assert f"sets {name} to " in error.message
    assert "it takes" in error.message or "write the whole path" in error.message


def test_a_long_wrong_value_is_shown_cut() -> None:
    assert len(refusal(flags={"port": "9" * 10_000_000}).message) < 300


@pytest.mark.parametrize(
    "text", ['port = "8080"', "port = 8080.0", "port = true", "port = 1979-05-27", "[port]\nnumber = 1"]
)
def test_a_toml_value_of_the_wrong_type_is_refused(tmp_path: Path, text: str) -> None:
    assert refusal(file=write(tmp_path, text)).param == "port"


def test_text_sources_may_spell_numbers_and_truths() -> None:
    settings, _ = load_settings(
        environment={
            "APPLIANCE_PORT": "0",
            "APPLIANCE_INSECURE": "true",
            "APPLIANCE_REQUIRE_API_KEY": "0",
            "APPLIANCE_KEEP_ALIVE_TIMEOUT_S": "1e2",
            "APPLIANCE_MODEL": "",
        }
    )
    assert (settings.port, settings.insecure, settings.require_api_key) == (0, True, False)
    assert (settings.keep_alive_timeout_s, settings.model) == (100.0, "")


@given(st.text(st.characters()))
def test_any_text_is_accepted_whole_or_refused_in_words(text: str) -> None:
    for name in ("port", "header_timeout_s", "model", "insecure", "log_level", "host", "data_dir", "tls_certificate"):
        environment = {f"APPLIANCE_{name.upper()}": text}
        try:
            settings, _ = load_settings(environment=environment)
        except SettingsError:
            assert refusal(environment=environment).param in {name, "tls_key"}
        else:
            assert name != "model" or settings.model == text


def test_every_bound_is_described_in_words() -> None:
    for name, annotation in get_type_hints(Settings, include_extras=True).items():
        assert re.fullmatch(r"[A-Za-z0-9_ ,.-]+", describe(annotation)), name
    assert describe(Literal["a", "b"]) == "one of a, b"
    assert describe(get_type_hints(Settings, include_extras=True)["port"]) == "a whole number from 0 to 65535"
    assert describe(get_type_hints(Settings, include_extras=True)["header_timeout_s"]) == (
        "a number above 0, at most 31622400"
    )


# Host and TLS


@pytest.mark.parametrize("host", ["127.0.0.1", "::1", "localhost", "0.0.0.0", "::", "192.168.1.5", "fe80::1%eth0"])
def test_an_address_or_localhost_is_accepted(host: str) -> None:
    assert load(host=host).host == host


@pytest.mark.parametrize(
    "host", ["", "example.org", "[::1]", "127.0.0.1:80", "0", "127.1", "localhost.evil.org", " ::1"]
)
def test_a_host_that_is_not_an_address_is_refused(host: str) -> None:
    error = refusal(flags={"host": host})
    assert "IP address" in error.message
    assert error.param == "host"


@pytest.mark.parametrize(("given", "missing"), [("tls_certificate", "tls_key"), ("tls_key", "tls_certificate")])
def test_half_a_tls_pair_is_refused(given: str, missing: str) -> None:
    error = refusal(environment={f"APPLIANCE_{given.upper()}": "/etc/file.pem"})
    assert error.message == f"{given} is set but {missing} is not; TLS needs both or neither."
    assert error.param == missing


def test_a_tls_pair_may_come_from_two_sources(tmp_path: Path) -> None:
    file = write(tmp_path, 'tls_certificate = "chain.pem"')
    settings, _ = load_settings(environment={"APPLIANCE_TLS_KEY": "/key.pem"}, config_file=file)
    assert (settings.tls_certificate, settings.tls_key) == (tmp_path / "chain.pem", Path("/key.pem"))


def test_an_empty_optional_path_is_none(tmp_path: Path) -> None:
    file = write(tmp_path, 'tls_certificate = "chain.pem"\ntls_key = "key.pem"\ncatalog_dir = ""')
    environment = {"APPLIANCE_TLS_CERTIFICATE": "", "APPLIANCE_TLS_KEY": ""}
    settings, _ = load_settings(environment=environment, config_file=file)
    assert (settings.tls_certificate, settings.tls_key, settings.catalog_dir) == (None, None, None)


def test_more_sequences_than_cells_are_refused() -> None:
    error = refusal(flags={"context_cells": 64, "max_sequences": 9})
    assert "9 sequences cannot share 64 context cells" in error.message
    assert load(context_cells=64, max_sequences=8).context_cells == 64


def test_more_sequences_than_a_step_has_tokens_are_refused() -> None:
    error = refusal(flags={"batch_tokens": 32, "max_sequences": 33})
    assert "32 tokens cannot hold one of each of 33 sequences" in error.message
    assert load(batch_tokens=32, max_sequences=32).batch_tokens == 32


def test_quantised_cells_with_flash_attention_off_are_refused() -> None:
    error = refusal(flags={"kv_cache_type": "q8_0", "flash_attention": "off"})
    assert error.param == "kv_cache_type"
    assert "need flash attention" in error.message
    assert load(kv_cache_type="f16", flash_attention="off").flash_attention == "off"
    assert load(kv_cache_type="q4_0", flash_attention="on").kv_cache_type == "q4_0"


# Paths


def test_a_relative_path_is_relative_to_the_working_folder_or_to_its_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "etc").mkdir()
    monkeypatch.chdir(tmp_path)
    file = write(tmp_path / "etc", 'data_dir = "data"\ncatalog_dir = "../catalog"').relative_to(tmp_path)
    settings, _ = load_settings(config_file=file)
    assert (settings.data_dir, settings.catalog_dir) == (tmp_path / "etc/data", tmp_path / "etc/../catalog")
    assert load(data_dir="data").data_dir == tmp_path / "data"
    assert load(data_dir=Path("/data")).data_dir == Path("/data")


def test_the_home_folder_is_written_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/alice")
    assert load().data_dir == Path("/home/alice/.local/share/appliance")
    assert load(catalog_dir="~/models").catalog_dir == Path("/home/alice/models")
    assert load().database_path == Path("/home/alice/.local/share/appliance/appliance.db")
    assert load().blobs_dir == Path("/home/alice/.local/share/appliance/models/blobs")


def test_a_vanished_working_folder_matters_only_to_relative_paths(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    here.rmdir()
    assert load(data_dir="/data").data_dir == Path("/data")
    assert "working folder is gone" in refusal(flags={"data_dir": "data"}).message
    os.chdir(tmp_path)


# The file


@pytest.mark.parametrize(
    "content", [b"port = ", b"\xff\xfe", b"port = 1\nport = 2", b"x = " + b"[" * 5000, b"a\0b = 1"]
)
def test_a_file_that_is_not_toml_is_refused(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "appliance.toml"
    file.write_bytes(content)
    with pytest.raises(SettingsError, match="not valid TOML"):
        load_settings(config_file=file)


def test_a_file_with_a_byte_order_mark_is_read(tmp_path: Path) -> None:
    file = tmp_path / "appliance.toml"
    file.write_bytes(b"\xef\xbb\xbfport = 8081")
    assert load_settings(config_file=file)[0].port == 8081


def test_a_file_that_cannot_be_a_settings_file_is_refused(tmp_path: Path) -> None:
    assert "No such file" in refusal(file=tmp_path / "missing.toml").message
    assert "directory" in refusal(file=tmp_path).message
    assert "more than 1048576 bytes" in refusal(file=Path("/dev/zero")).message
