"""The one command that starts hub and broker, as a person runs it; and a box that it enrols."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.fleet.broker import MOSQUITTO, free_port
from tests.system.programs import SCRIPTS, run, unavailable

HUB = SCRIPTS / "hub"


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    if MOSQUITTO is None or shutil.which("appliance", path=f"{sys.prefix}/bin") is None:
        unavailable("mosquitto or the appliance's own environment is missing")
    monkeypatch.setenv("HUB_VENV", sys.prefix)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(SCRIPTS.parent), os.environ.get("PYTHONPATH", "")]))
    monkeypatch.setenv("APPLIANCE_HUB_PORT", "0")
    yield tmp_path / "hub"
    run([HUB, "stop", "--data", tmp_path / "hub"])


def test_one_command_starts_hub_and_broker_and_a_second_enrols_a_box(data: Path, tmp_path: Path) -> None:
    assert run([HUB, "--data", data]).returncode == 2, "it does not guess the name of this machine"
    started = run([HUB, "--name", "localhost", "--port", str(free_port()), "--data", data], timeout=90)
    assert started.returncode == 0, started.stderr
    assert "fleet enrol" in started.stdout
    again = run([HUB, "--data", data], timeout=60)
    assert (again.returncode, "runs already" in again.stderr) == (0, True), again.stderr
    appliance = f"{sys.prefix}/bin/appliance"
    claim = tmp_path / "claim.json"
    made = run([appliance, "hub", "ca", "claim", claim, "--auto-approve", "--data", data])
    assert made.returncode == 0, made.stderr
    enrolled = run(
        [appliance, "fleet", "enrol", claim, "--id", "box-1", "--json", "--data", tmp_path / "box"], timeout=60
    )
    assert json.loads(enrolled.stdout)["device"] == "box-1", enrolled.stderr
    assert run([HUB, "status", "--data", data]).returncode == 0
    assert run([HUB, "stop", "--data", data], timeout=60).returncode == 0
    assert run([HUB, "status", "--data", data]).returncode == 3
