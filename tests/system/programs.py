"""Programs of the system that these tests need, and what to do where they are missing."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).resolve().parents[2]
SCRIPTS = CHECKOUT / "firmware_scripts"
UNITS = CHECKOUT / "systemd"


PACKAGED = ("pyproject.toml", "README.md", "LICENSE", "appliance", "models", "firmware_scripts", "systemd")
"""What a checkout needs for its scripts to install it."""


def copy_checkout(target: Path) -> Path:
    """Copy what `install` needs of this checkout."""
    target.mkdir(parents=True)
    for name in PACKAGED:
        source = CHECKOUT / name
        if source.is_dir():
            shutil.copytree(source, target / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy2(source, target / name)
    return target


def need(program: str, package: str) -> None:
    """Skip the test with the reason if the program is missing; in CI, which installs it, fail instead."""
    if shutil.which(program) is not None:
        return
    unavailable(f"{program} is missing; on Debian or Ubuntu: apt-get install -y {package}")


def unavailable(reason: str) -> None:
    """Skip on a developer's machine, fail in CI: what CI leaves out, nothing proves."""
    if os.environ.get("CI"):
        pytest.fail(reason)
    pytest.skip(reason)


def run(
    command: Sequence[str | Path], *, timeout: float = 60, environment: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run a program to its end with no input; its output is text and belongs to the assertion that follows."""
    return subprocess.run(
        [str(each) for each in command],
        check=False,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=timeout,
        env={**os.environ, **(environment or {})},
    )


def system_python() -> Path:
    """Return the system's own Python, which a service can reach wherever the tests' own interpreter is."""
    for candidate in (Path("/usr/bin/python3"), Path("/usr/local/bin/python3")):
        check = "import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 11))"
        if candidate.exists() and run([candidate, "-c", check]).returncode == 0:
            return candidate
    unavailable("no system Python 3.11 or newer with venv; on Debian or Ubuntu: apt-get install -y python3-venv")
    return Path(sys.executable)
