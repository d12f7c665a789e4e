"""A release on its way: hub, broker and box as an operator runs them, from the first key to the way back."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.fleet.broker import MOSQUITTO, free_port
from tests.journeys.processes import ServerProcess, server_process
from tests.system.programs import SCRIPTS, run, unavailable
from tests.tiny_gguf import write_tiny_llama

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]

HUB = SCRIPTS / "hub"
DEADLINE_S = 90.0
MANIFEST = """
name = "tiny"
version = "{version}"
description = "Random weights."
kind = "gguf"
task = "completion"
licence = "Apache-2.0"
minimum_memory = 50_000_000

[[files]]
role = "model"
name = "tiny.gguf"
size = {size}
sha256 = "{sha256}"
"""


class Operator:
    """A person at the hub's machine."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.data = folder / "hub"

    def do(self, *arguments: object) -> Any:
        """Run a verb of the hub and return what it printed."""
        command = [sys.executable, "-m", "appliance", "hub", *map(str, arguments), "--json", "--data", str(self.data)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    def add_release(self, version: int, criteria: str = "") -> None:
        """Sign other random weights as a version of the model."""
        model = write_tiny_llama(self.folder / f"tiny-{version}.gguf", seed=version)
        digest = hashlib.sha256(model.read_bytes()).hexdigest()
        manifest = self.folder / f"tiny-{version}.toml"
        manifest.write_text(MANIFEST.format(version=version, size=model.stat().st_size, sha256=digest))
        wanted = self.folder / f"criteria-{version}.toml"
        wanted.write_text(criteria)
        self.do("releases", "add", manifest, model, *(("--criteria", wanted) if criteria else ()))

    def start_rollout(self, version: int) -> str:
        """Bring a version to all boxes, with a trial of a second."""
        rollout = self.do("rollouts", "start", f"tiny:{version}", "--trial-s", 1, "--soak-hours", 0)
        return str(rollout["id"])


def until(true: Callable[[], bool], tell: Callable[[], object]) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not true():
        assert time.monotonic() < deadline, tell()
        time.sleep(0.2)  # the state is other processes': there is nothing to be woken by


@pytest.fixture
def operator(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Operator]:
    if MOSQUITTO is None or shutil.which("appliance", path=f"{sys.prefix}/bin") is None:
        unavailable("mosquitto or the appliance's own environment is missing")
    monkeypatch.setenv("HUB_VENV", sys.prefix)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(SCRIPTS.parent), os.environ.get("PYTHONPATH", "")]))
    monkeypatch.setenv("APPLIANCE_HUB_PORT", "0")
    operator = Operator(tmp_path)
    started = run([HUB, "--name", "localhost", "--port", str(free_port()), "--data", operator.data], timeout=90)
    assert started.returncode == 0, started.stderr
    yield operator
    run([HUB, "stop", "--data", operator.data], timeout=60)


@pytest.fixture(params=["on", "off"])
def box(operator: Operator, tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[ServerProcess]:
    """Return a box with version 1 that is enrolled and runs, with telemetry or without."""
    data, claim = tmp_path / "box", tmp_path / "claim.json"
    first = write_tiny_llama(tmp_path / "tiny-1.gguf", seed=1)
    program = [sys.executable, "-m", "appliance"]
    adopted = run([*program, "models", "import", first, "--name", "tiny", "--licence", "Apache-2.0", "--data", data])
    assert adopted.returncode == 0, adopted.stderr
    operator.do("ca", "claim", claim, "--auto-approve")
    enrolled = run([*program, "fleet", "enrol", claim, "--id", "box-1", "--data", data], timeout=60)
    assert enrolled.returncode == 0, enrolled.stderr
    flags = ("--model", "tiny", "--context-cells", "1024")
    with server_process(data, tmp_path, *flags, environment={"APPLIANCE_FLEET_TELEMETRY": request.param}) as server:
        server.wait_until_ready()
        yield server


def answering(box: ServerProcess, name: str = "tiny") -> str:
    """Return the version that answers for a name."""
    return box.client().completions.create(model=name, prompt="Hello", max_tokens=4, temperature=0).model


def test_a_release_reaches_a_box_a_bad_one_does_not_and_there_is_a_way_back(
    operator: Operator, box: ServerProcess
) -> None:
    def device() -> Any:
        return operator.do("devices", "show", "box-1")

    def rollout() -> Any:
        return operator.do("rollouts", "show", current)

    until(lambda: any(each.get("status") == "online" for each in operator.do("devices", "list")), device)
    assert answering(box) == "tiny:1"
    operator.add_release(2)
    current = operator.start_rollout(2)
    until(lambda: answering(box) == "tiny:2", lambda: (rollout(), box.log))
    until(lambda: rollout()["state"] == "completed", rollout)
    assert answering(box, "tiny:1") == "tiny:1", "the version before is kept"

    operator.add_release(3, "least_tokens_per_second = 1e9\n")
    current = operator.start_rollout(3)
    until(lambda: rollout()["state"] in ("failed", "paused"), rollout)
    assert "too_slow" in json.dumps(rollout())
    assert answering(box) == "tiny:2", "a release that fails its test never answered anybody"

    operator.do("rollouts", "abort", current)
    back = run(
        [sys.executable, "-m", "appliance", "models", "rollback", "tiny", "--data", operator.folder / "box"], timeout=60
    )
    assert back.returncode == 0, back.stderr
    until(lambda: answering(box) == "tiny:1", lambda: box.log)


def test_a_release_reaches_a_box_on_a_stick_while_hub_and_broker_are_gone(
    operator: Operator, box: ServerProcess, tmp_path: Path
) -> None:
    operator.add_release(2)
    operator.do("releases", "export", tmp_path / "stick", "tiny")
    assert run([HUB, "stop", "--data", operator.data], timeout=60).returncode == 0
    stick, data = str(tmp_path / "stick"), str(tmp_path / "box")
    command = [sys.executable, "-m", "appliance", "fleet", "import", stick, "--data", data, "--wait", "60", "--json"]
    imported = run(command, timeout=90)
    assert imported.returncode == 0, (imported.stderr, box.log)
    assert json.loads(imported.stdout)["version"] == "2"
    until(lambda: answering(box) == "tiny:2", lambda: box.log)
    assert answering(box, "tiny:1") == "tiny:1", "the version before is kept"
