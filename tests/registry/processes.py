"""Real second processes: the command line, and one that has a model loaded."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]

_HOLDER = """
import sys
from pathlib import Path
from appliance.core.settings import Settings
from appliance.registry.versions import open_registry
from appliance.store.database import Database

settings = Settings(data_dir=Path(sys.argv[1]))
database = Database(settings.database_path)
registry = open_registry(settings, database)
with registry.hold(registry.resolve(sys.argv[2])):
    print("held", flush=True)
    sys.stdin.read()
database.close()
"""


def environment(**more: str) -> dict[str, str]:
    """Return this process's environment without what could lead to a network or another configuration."""
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("PIP_", "APPLIANCE_")) and not name.lower().endswith("_proxy")
    }
    return kept | {"PIP_CONFIG_FILE": os.devnull, "PIP_NO_INDEX": "1", "COLUMNS": "200"} | more


def start(*arguments: str, **more: str) -> subprocess.Popen[str]:
    """Start `appliance` with the arguments; `more` are environment variables."""
    return subprocess.Popen(
        [sys.executable, "-m", "appliance", *arguments],
        env=environment(**more),
        cwd=REPOSITORY,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def run(*arguments: str, **more: str) -> subprocess.CompletedProcess[str]:
    """Run `appliance` to its end."""
    with start(*arguments, **more) as process:
        try:
            output, errors = process.communicate(timeout=60)
        finally:
            process.kill()
    return subprocess.CompletedProcess(process.args, process.returncode, output, errors)


@contextmanager
def holding(data: Path, name: str) -> Iterator[subprocess.Popen[str]]:
    """Have a process that holds a model, as a server does."""
    with subprocess.Popen(
        [sys.executable, "-c", _HOLDER, str(data), name],
        env=environment(),
        cwd=REPOSITORY,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "held\n"
            yield process
        finally:
            process.kill()


def wait_until(condition: Callable[[], bool], deadline_s: float = 20) -> None:
    """Return as soon as the condition holds; fail after the deadline."""
    deadline = time.monotonic() + deadline_s
    while not condition():
        assert time.monotonic() < deadline, "the deadline passed"
        time.sleep(0.005)
