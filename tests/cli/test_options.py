from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import click
import msgspec
import pytest
from click.testing import CliRunner

from appliance.cli import VERBS, appliance
from appliance.cli.options import EXIT_CODES, Context, exit_code, verb_options
from appliance.core.errors import (
    ApplianceError,
    AuthenticationError,
    ConflictError,
    InvalidRequestError,
    ModelFileError,
    NotFoundError,
    SettingsError,
    StorageError,
)


@click.command()
@click.option("--port", type=int)
@click.option("--fail", type=click.Choice(["conflict", "strange"]))
@verb_options
def probe(context: Context, fail: str | None) -> None:
    """A verb that shows what it was given, or fails."""
    if fail == "conflict":
        raise ConflictError("The model is in use.", advice="Stop it first.")
    if fail == "strange":
        raise ApplianceError("Line\nbreak \x1b[31m and 雪.", advice="None.")
    context.print_json({"port": context.settings.port, "data": context.settings.data_dir, "json": context.json})


def run(*arguments: str, environment: dict[str, str] | None = None) -> tuple[int, str, str]:
    result = CliRunner().invoke(probe, arguments, env=environment)
    return result.exit_code, result.stdout, result.stderr


def test_a_verb_gets_flags_over_environment_over_file(tmp_path: Path) -> None:
    file = tmp_path / "a.toml"
    file.write_text("port = 1\ndata_dir = 'here'")
    in_file = run("--config", str(file))
    in_environment = run("--config", str(file), environment={"APPLIANCE_PORT": "2"})
    as_flag = run("--config", str(file), "--port", "3", "--data", "/there", environment={"APPLIANCE_PORT": "2"})
    assert [json.loads(each[1])["port"] for each in (in_file, in_environment, as_flag)] == [1, 2, 3]
    assert json.loads(in_file[1])["data"] == str(tmp_path / "here")
    assert json.loads(as_flag[1])["data"] == "/there"


def test_the_file_may_be_named_by_the_environment(tmp_path: Path) -> None:
    file = tmp_path / "a.toml"
    file.write_text("port = 1")
    assert json.loads(run(environment={"APPLIANCE_CONFIG": str(file)})[1])["port"] == 1


def test_a_bad_setting_is_told_on_standard_error_with_exit_code_2() -> None:
    code, out, err = run("--port", "70000")
    assert (code, out) == (2, "")
    assert err == "Error: flag --port sets port to 70000; it takes a whole number from 0 to 65535.\n"


def test_an_error_is_a_message_with_advice_for_people_and_json_for_scripts() -> None:
    assert run("--fail", "conflict") == (4, "", "Error: The model is in use. Stop it first.\n")
    code, out, err = run("--fail", "conflict", "--json")
    assert (code, out) == (4, "")
    assert json.loads(err) == {
        "error": {"code": "conflict", "message": "The model is in use.", "advice": "Stop it first."}
    }


def test_an_error_cannot_drive_the_terminal() -> None:
    assert run("--fail", "strange")[2] == "Error: Line\\nbreak \\x1b[31m and 雪. None.\n"
    assert json.loads(run("--fail", "strange", "--json")[2])["error"]["message"] == "Line\nbreak \x1b[31m and 雪."


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (SettingsError("x"), 2),
        (NotFoundError("x"), 3),
        (ConflictError("x"), 4),
        (InvalidRequestError("x"), 5),
        (ModelFileError("x"), 5),
        (AuthenticationError("x"), 6),
        (StorageError("x"), 1),
    ],
)
def test_the_nearest_class_gives_the_exit_code(error: ApplianceError, code: int) -> None:
    assert exit_code(error) == code
    assert EXIT_CODES[ApplianceError] == 1


def test_json_writes_what_it_has_no_form_for_as_text(capsys: pytest.CaptureFixture[str]) -> None:
    result = CliRunner().invoke(probe, ["--data", "/a b"])
    assert msgspec.json.decode(result.stdout)["data"] == "/a b"


# The whole command line


def test_help_lists_every_verb_and_imports_nothing_heavy() -> None:
    program = (
        "import sys\n"
        "from click.testing import CliRunner\n"
        "from appliance.cli import appliance\n"
        "print(CliRunner().invoke(appliance, ['--help']).stdout)\n"
        "heavy = {'numpy', 'llama_cpp', 'starlette', 'rich', 'sqlite3', 'asyncio', 'jinja2', 'urllib3', 'psutil'}\n"
        "print('heavy:', sorted(heavy & sys.modules.keys()))\n"
    )
    # Without coverage's own start-up, which imports much of this.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("COV")}
    result = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=30, check=True, env=environment
    )
    assert all(f"  {verb} " in result.stdout for verb in VERBS)
    assert result.stdout.endswith("heavy: []\n")


def test_the_version_is_told() -> None:
    result = CliRunner().invoke(appliance, ["--version"])
    assert result.exit_code == 0
    assert result.stdout.startswith("appliance ")


def test_an_unknown_verb_is_refused() -> None:
    result = CliRunner().invoke(appliance, ["sing"])
    assert result.exit_code == 2
    assert "No such command 'sing'" in result.stderr


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_explains_itself(verb: str) -> None:
    result = CliRunner().invoke(appliance, [verb, "--help"])
    assert result.exit_code == 0, result.stderr
    assert result.stdout.startswith("Usage: appliance ")
