from __future__ import annotations

import json
import re
import tomllib
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from appliance.cli.config import command, settings_file
from appliance.core.settings import Settings, load_settings, setting_fields

VISIBLE = st.text(st.characters(codec="utf-8"), max_size=20).filter(str.isprintable)
GIVEN = st.fixed_dictionaries(
    {},
    optional={
        "model": VISIBLE,
        "port": st.integers(0, 65535),
        "insecure": st.booleans(),
        "header_timeout_s": st.floats(1e-300, 86400),
        "data_dir": VISIBLE.map(lambda text: f"/{text}"),
        "log_level": st.sampled_from(["debug", "error"]),
    },
)


def run(*arguments: str, environment: dict[str, str] | None = None) -> str:
    result = CliRunner().invoke(command, arguments, env=environment)
    assert result.exit_code == 0, result.stderr
    return result.stdout


def test_the_table_shows_value_origin_and_meaning_of_every_setting(tmp_path: Path) -> None:
    file = tmp_path / "a.toml"
    file.write_text('model = ""\ninsecure = true')
    out = run("--config", str(file), "--data", "/data", environment={"APPLIANCE_PORT": "9000"})
    assert re.search(r"^data_dir +/data +flag --data +Folder", out, re.MULTILINE)
    assert re.search(r"^port +9000 +environment APPLIANCE_PORT +TCP port", out, re.MULTILINE)
    assert re.search(r"^tls_key +– +default +PEM file", out, re.MULTILINE)
    assert re.search(r"^target_inter_token_latency_s +0\.17 +default", out, re.MULTILINE)
    assert re.search(r"^insecure +true +file", out, re.MULTILINE)
    assert all(re.search(rf"^{name} ", out, re.MULTILINE) for name in setting_fields())


def test_json_has_every_setting() -> None:
    document = json.loads(run("--json", "--data", "/data"))
    assert [each["name"] for each in document] == list(setting_fields())
    assert document[0] == {
        "name": "data_dir",
        "value": "/data",
        "origin": "flag --data",
        "meaning": "Folder of databases and models",
    }
    assert {each["value"] for each in document if each["name"] == "tls_key"} == {None}


def test_toml_gives_what_was_set_and_the_defaults_as_comments(tmp_path: Path) -> None:
    out = run("--toml", "--data", "/data", environment={"APPLIANCE_PORT": "9000"})
    assert tomllib.loads(out) == {"data_dir": "/data", "port": 9000}
    assert "\n# TCP port to listen on; 0 picks a free one.\nport = 9000\n" in out
    assert '\n# host = "127.0.0.1"\n' in out


def uncommented(text: str) -> str:
    return re.sub(r"^# ([a-z0-9_]+ = )", r"\1", text, flags=re.MULTILINE)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(GIVEN)
def test_the_toml_file_reads_back_as_the_same_settings(tmp_path: Path, flags: dict[str, Any]) -> None:
    wanted, effective = load_settings(flags=flags)
    text = settings_file(effective)
    for form in (text, uncommented(text)):
        file = tmp_path / "a.toml"
        file.write_text(form, encoding="utf-8")
        assert load_settings(config_file=file)[0] == wanted
    assert tomllib.loads(uncommented(text)).keys() == {each.name for each in fields(Settings)}


def test_two_forms_at_once_are_refused() -> None:
    result = CliRunner().invoke(command, ["--toml", "--json"])
    assert result.exit_code == 2
    assert "choose one" in result.stderr


@pytest.mark.parametrize("arguments", [["--config", "/nowhere/a.toml"], ["--data", ""]])
def test_settings_that_do_not_load_are_refused(arguments: list[str]) -> None:
    result = CliRunner().invoke(command, arguments)
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr.startswith("Error: ")
