"""The service as it is in the field: installed by `install`, run by a booted Debian's systemd, in its sandbox.

The trial (`trial.py`) is run once; each test judges one fact of it. It needs root, because it boots a systemd in
namespaces of its own (`boot`), and the Python package index that `tests/check` itself installs from.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.system.programs import copy_checkout, need, run, system_python, unavailable

pytestmark = [pytest.mark.slow, pytest.mark.journey, pytest.mark.timeout(600)]


def edit(path: Path, pattern: str, replacement: str) -> None:
    """Replace a pattern that must occur exactly once."""
    text, count = re.subn(pattern, replacement, path.read_text(), flags=re.MULTILINE)
    assert count == 1, f"{pattern} occurs {count} times in {path}"
    path.write_text(text)


@pytest.fixture(scope="module")
def facts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Stage three versions into a layer, boot a system over it, and return what the trial saw there."""
    need("unshare", "util-linux")
    need("systemctl", "systemd")
    if os.geteuid() != 0:
        unavailable("booting a system in namespaces needs root")
    model_data = os.environ.get("APPLIANCE_TEST_MODEL_DATA")
    if model_data is None:
        unavailable("APPLIANCE_TEST_MODEL_DATA is not set: tests/check pulls the model and sets it")
    assert model_data is not None

    folder = tmp_path_factory.mktemp("service")
    checkouts = folder / "checkouts"
    good, better, broken = (copy_checkout(checkouts / name) for name in ("good", "better", "broken"))
    edit(better / "appliance" / "__init__.py", r'^__version__ = ".*"$', '__version__ = "9.9.9"')
    edit(broken / "appliance" / "__init__.py", r'^__version__ = ".*"$', '__version__ = "9.9.10"')
    failure = "import sys\nif 'serve' in sys.argv:\n    sys.exit('this version cannot start')\n\n\ndef main() -> None:"
    edit(broken / "appliance" / "__main__.py", r"^def main\(\) -> None:$", failure)

    layer = folder / "layer"
    (layer / "etc").mkdir(parents=True)
    for table in ("passwd", "group", "shadow", "gshadow"):
        shutil.copy2(Path("/etc") / table, layer / "etc" / table)
    shutil.copytree(model_data, layer / "var" / "lib" / "appliance", symlinks=True)
    releases = layer / "opt" / "appliance" / "releases"
    for checkout in (broken, better, good):
        staged = run(
            [checkout / "firmware_scripts" / "install", "--root", layer, "--python", system_python(), "--force"],
            timeout=400,
        )
        assert staged.returncode == 0, staged.stderr
        # An image keeps only the version in use and the one before it; the trial needs all three, and starts with none.
        assert run(["cp", "--archive", "--no-clobber", releases, folder]).returncode == 0
    for used in ("opt/appliance", "etc/systemd", "etc/appliance"):
        shutil.rmtree(layer / used)

    booted = run([Path(__file__).parent / "boot", folder, Path(__file__).parent / "trial.py", layer], timeout=400)
    output = folder / "output"
    assert output.exists(), f"the system did not boot: {booted.stderr}"
    assert (folder / "code").read_text().strip() == "0", output.read_text()
    result: dict[str, Any] = json.loads((folder / "facts.json").read_text())
    return result


def test_install_starts_the_service_as_its_own_user_and_it_is_ready(facts: dict[str, Any]) -> None:
    assert facts["install"]["code"] == 0, facts["install"]["output"]
    assert facts["unit"]["ActiveState"] == "active"
    assert facts["unit"]["User"] == "appliance"
    assert facts["unit"]["StatusText"] == "Ready."


def test_the_model_answers_inside_the_sandbox(facts: dict[str, Any]) -> None:
    assert "Paris" in facts["answer"]


def test_the_process_can_gain_no_rights(facts: dict[str, Any]) -> None:
    status = facts["status"]
    assert status["NoNewPrivs"] == "1"
    assert status["Seccomp"] == "2"
    assert int(status["CapEff"], 16) == int(status["CapBnd"], 16) == 0


def test_the_journal_holds_json_lines(facts: dict[str, Any]) -> None:
    lines = [line for line in facts["journal"].splitlines() if line.startswith("{")]
    assert any("listening on" in json.dumps(json.loads(line)) for line in lines)


def test_installing_again_changes_nothing_that_runs(facts: dict[str, Any]) -> None:
    assert facts["install again"]["code"] == 0, facts["install again"]["output"]
    assert facts["restarted by installing again"] is False


def test_a_killed_server_comes_back(facts: dict[str, Any]) -> None:
    assert facts["after a kill"]["healthy"]
    assert int(facts["after a kill"]["unit"]["NRestarts"]) >= 1


def test_a_hung_server_is_ended_by_the_watchdog_and_comes_back(facts: dict[str, Any]) -> None:
    assert "Watchdog timeout" in facts["watchdog"]
    assert facts["after a hang"]["healthy"]


def test_an_upgrade_keeps_settings_and_data(facts: dict[str, Any]) -> None:
    before, after = facts["before the upgrade"], facts["after the upgrade"]
    assert facts["upgrade"]["code"] == 0, facts["upgrade"]["output"]
    assert "9.9.9" not in before["version"]
    assert after["version"].endswith("9.9.9")
    assert "kept" in before["keys"]
    assert after["keys"] == before["keys"]
    assert after["settings"].endswith('log_level = "debug"\n')
    assert "Paris" in after["answer"]


def test_an_upgrade_that_cannot_start_is_undone(facts: dict[str, Any]) -> None:
    before, after = facts["after the upgrade"], facts["after the bad upgrade"]
    assert facts["bad upgrade"]["code"] == 1
    assert "was undone" in facts["bad upgrade"]["output"]
    assert "this version cannot start" in facts["bad upgrade"]["output"]
    assert after["healthy"]
    assert after["unit"]["ActiveState"] == "active"
    assert {name: after[name] for name in ("version", "keys", "settings")} == {
        name: before[name] for name in ("version", "keys", "settings")
    }


def test_stopping_is_orderly(facts: dict[str, Any]) -> None:
    assert facts["stopped"]["ActiveState"] == "inactive"
    assert facts["stopped"]["Result"] == "success"


def test_uninstall_keeps_settings_data_and_their_owner(facts: dict[str, Any]) -> None:
    for step in ("uninstall", "uninstall again"):
        assert facts[step]["code"] == 0, facts[step]["output"]
        assert facts[step]["left"] == ["/etc/appliance", "/var/lib/appliance"]
        assert facts[step]["user"]


def test_purge_leaves_nothing(facts: dict[str, Any]) -> None:
    assert facts["purge"]["code"] == 0, facts["purge"]["output"]
    assert facts["purge"]["left"] == []
    assert not facts["purge"]["user"]
