"""The scripts as a person runs them: quickstart on this checkout, install and uninstall into an image's folder."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.system.programs import CHECKOUT, SCRIPTS, copy_checkout, need, run, system_python, unavailable

SCRIPT_NAMES = ("quickstart", "hub", "install", "uninstall", "build_environment")


def free_port() -> int:
    """Return a port that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@pytest.mark.parametrize("name", SCRIPT_NAMES)
def test_help_says_what_the_script_is_for_and_names_every_option(name: str) -> None:
    result = run([SCRIPTS / name, "--help"])
    assert result.returncode == 0
    assert "Usage: firmware_scripts/" in result.stdout
    cases = re.findall(r"^ +(--[a-z -|]+)\)", (SCRIPTS / name).read_text(), re.MULTILINE)
    options = {option for case in cases for option in case.split(" | ")}
    assert options
    assert {each for each in options if each not in result.stdout} == set()


@pytest.mark.parametrize("name", SCRIPT_NAMES)
def test_an_unknown_option_is_refused_with_a_hint(name: str) -> None:
    result = run([SCRIPTS / name, "--no-such-option"])
    assert result.returncode == 2
    assert "--no-such-option" in result.stderr
    assert "--help" in result.stderr


def test_a_folder_that_is_no_environment_is_left_alone(tmp_path: Path) -> None:
    precious = tmp_path / "precious.txt"
    precious.write_text("mine")
    result = run([SCRIPTS / "build_environment", tmp_path, "--python", system_python()])
    assert result.returncode == 1
    assert "left alone" in result.stderr
    assert [each.name for each in tmp_path.iterdir()] == ["precious.txt"]


def test_a_python_that_is_too_old_is_refused_with_advice(tmp_path: Path) -> None:
    old = tmp_path / "python3"
    old.write_text("#!/bin/sh\nexit 1\n")
    old.chmod(0o755)
    result = run([SCRIPTS / "build_environment", tmp_path / "venv", "--python", old])
    assert result.returncode == 1
    assert "no Python 3.11 or newer" in result.stderr
    assert not (tmp_path / "venv").exists()


def test_the_wheels_place_depends_on_how_it_is_compiled() -> None:
    python = system_python()
    command: list[str | Path] = [
        SCRIPTS / "build_environment",
        "--wheel-folder",
        "--accelerator",
        "cpu",
        "--python",
        python,
    ]
    plain = run(command).stdout
    assert plain
    assert run(command).stdout == plain
    assert run(command, environment={"CMAKE_ARGS": "-DGGML_AVX512=OFF"}).stdout != plain
    options = run([each if each != "--wheel-folder" else "--build-options" for each in command]).stdout.splitlines()
    assert "GGML_NATIVE=ON" in options


def test_install_needs_root_or_an_image(tmp_path: Path) -> None:
    result = run([SCRIPTS / "install", "--root", tmp_path / "missing"])
    assert result.returncode == 1
    assert "There is no folder" in result.stderr
    assert not (tmp_path / "missing").exists()


def install(checkout: Path, image: Path) -> subprocess.CompletedProcess[str]:
    """Install into an image, without its model."""
    script = checkout / "firmware_scripts" / "install"
    return run([script, "--root", image, "--no-model", "--force", "--python", system_python()], timeout=400)


def files(folder: Path) -> dict[str, float]:
    """Return every file's time of change, but for what a running Python caches."""
    found = (each for each in folder.rglob("*") if each.is_file() and "__pycache__" not in each.parts)
    return {str(each): each.stat().st_mtime for each in found}


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_an_image_is_installed_again_and_uninstalled(tmp_path: Path) -> None:
    checkout, image = copy_checkout(tmp_path / "checkout"), tmp_path / "image"
    (image / "etc").mkdir(parents=True)
    first = install(checkout, image)
    assert first.returncode == 0, first.stderr
    opt, data = image / "opt" / "appliance", image / "var" / "lib" / "appliance"
    settings = image / "etc" / "appliance" / "appliance.toml"
    unit = image / "etc" / "systemd" / "system" / "appliance.service"
    enabled = unit.parent / "multi-user.target.wants" / "appliance.service"
    program = (opt / "venv" / "bin" / "appliance").read_text()
    assert " /opt/appliance/releases/" in program or program.startswith("#!/opt/appliance/releases/")
    assert str(image) not in program
    assert run([opt / "venv" / "bin" / "python", "-P", "-m", "appliance", "--version"]).returncode == 0
    assert unit.exists()
    assert enabled.is_symlink()

    settings.write_text('log_level = "debug"\n')
    (data / "precious").write_text("mine")
    before = files(opt)
    again = install(checkout, image)
    assert again.returncode == 0, again.stderr
    changed = {name for name, time in files(opt).items() if before.get(name) != time}
    assert {name for name in changed if "/site-packages/" in name or "/bin/" in name} == set()
    assert settings.read_text() == 'log_level = "debug"\n'

    for _ in range(2):
        assert run([SCRIPTS / "uninstall", "--root", image]).returncode == 0
        assert not opt.exists()
        assert not unit.exists()
        assert not enabled.is_symlink()
        assert (data / "precious").read_text() == "mine"
        assert settings.exists()
    assert run([SCRIPTS / "uninstall", "--root", image, "--purge"]).returncode == 0
    assert not data.exists()
    assert not settings.parent.exists()


def need_own_environment() -> None:
    if Path(sys.prefix) != CHECKOUT / ".venv":
        unavailable("quickstart would change .venv, in which these tests do not run")


def test_quickstart_says_which_setting_is_wrong_and_nothing_else(tmp_path: Path) -> None:
    need_own_environment()
    result = run([SCRIPTS / "quickstart", "status", "--data", tmp_path, "--port", "abc"])
    assert result.returncode == 1
    first, second = result.stderr.splitlines()
    assert "APPLIANCE_PORT sets port to 'abc'" in first
    assert "settings are not in order" in second


@pytest.fixture
def quickstart_data(tmp_path: Path) -> Iterator[Path]:
    """Return a data folder with the real model; a server that was started on it is stopped."""
    need_own_environment()
    model_data = os.environ.get("APPLIANCE_TEST_MODEL_DATA")
    if model_data is None:
        unavailable("APPLIANCE_TEST_MODEL_DATA is not set: tests/check pulls the model and sets it")
    assert model_data is not None
    data = tmp_path / "data"
    shutil.copytree(model_data, data)
    yield data
    run([SCRIPTS / "quickstart", "stop", "--data", data])


@pytest.mark.slow
@pytest.mark.journey
@pytest.mark.timeout(300)
def test_quickstart_prints_a_curl_line_that_answers(quickstart_data: Path) -> None:
    need("curl", "curl")
    options: list[str | Path] = ["--data", quickstart_data, "--port", str(free_port())]
    quickstart = SCRIPTS / "quickstart"
    first = run([quickstart, *options], timeout=180)
    assert first.returncode == 0, first.stderr
    assert "It is ready." in first.stderr
    line = re.search(r"^ +curl .*?\}'$", first.stdout, re.MULTILINE | re.DOTALL)
    assert line is not None
    answer = run(["bash", "-c", f"{line[0]} --silent --max-time 120"], timeout=130)
    assert "Paris" in json.loads(answer.stdout)["choices"][0]["message"]["content"]

    second = run([quickstart, *options])
    assert second.returncode == 0
    assert "runs already" in second.stderr
    assert run([quickstart, "status", *options]).returncode == 0
    assert run([quickstart, "stop", *options], timeout=90).returncode == 0
    assert run([quickstart, "status", *options]).returncode == 3


@pytest.mark.slow
@pytest.mark.journey
@pytest.mark.timeout(300)
def test_quickstart_says_so_when_the_port_is_taken(quickstart_data: Path) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = str(other.getsockname()[1])
        result = run([SCRIPTS / "quickstart", "--data", quickstart_data, "--port", port], timeout=180)
    assert result.returncode == 1
    assert f"Port {port} on 127.0.0.1 is taken" in result.stderr
    assert "--port" in result.stderr
    assert not (quickstart_data / "quickstart.process").exists()
