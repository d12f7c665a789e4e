"""The systemd units of the hub and of its broker, judged by Debian's own systemd."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

from appliance.core.hub_settings import HubSettings
from tests.system.programs import UNITS, need, run
from tests.system.test_unit import service_section

HUB = UNITS / "appliance-hub.service"
BROKER = UNITS / "appliance-hub-broker.service"


@pytest.mark.parametrize("unit", [HUB, BROKER], ids=lambda each: each.stem)
def test_a_unit_of_the_hub_has_no_fault_in_systemds_eyes(tmp_path: Path, unit: Path) -> None:
    need("systemd-analyze", "systemd")
    for each in (HUB, BROKER):  # the hub's names the broker's
        text = re.sub(r"^ExecStart=\S+", f"ExecStart={sys.executable}", each.read_text(), flags=re.MULTILINE)
        (tmp_path / each.name).write_text(text)
    result = run(["systemd-analyze", "verify", "--man=no", tmp_path / unit.name])
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")


@pytest.mark.parametrize("unit", [HUB, BROKER], ids=lambda each: each.stem)
def test_the_sandbox_of_the_hub_leaves_an_exposure_of_at_most_two(unit: Path) -> None:
    need("systemd-analyze", "systemd")
    result = run(["systemd-analyze", "security", "--offline=true", "--threshold=20", "--no-pager", unit])
    assert result.returncode == 0, result.stdout[-200:] + result.stderr


def test_broker_and_hub_share_one_user_and_one_folder() -> None:
    hub, broker = service_section(HUB), service_section(BROKER)
    assert {hub["User"], broker["User"]} == {"appliance-hub"}
    folder = hub["Environment"].removeprefix("APPLIANCE_HUB_DATA_DIR=")
    assert broker["ExecStart"].endswith(f"{folder}/broker/mosquitto.conf")
    assert f"{folder}/broker/mosquitto.pid" in broker["ExecStartPost"]


def test_systemd_waits_longer_than_the_hub_needs_to_end_its_requests() -> None:
    assert float(service_section(HUB)["TimeoutStopSec"]) > HubSettings().shutdown_grace_s
