"""The systemd unit, judged by Debian's own systemd."""

from __future__ import annotations

import configparser
import re
import sys
from pathlib import Path

from appliance.core.settings import Settings, load_settings
from tests.system.programs import CHECKOUT, UNITS, need, run

UNIT = UNITS / "appliance.service"


def service_section(path: Path = UNIT) -> dict[str, str]:
    """Return the last value of each directive of [Service]."""
    parser = configparser.ConfigParser(strict=False, interpolation=None)
    parser.optionxform = str  # type: ignore[assignment,method-assign]  # directives are case-sensitive
    parser.read(path)
    return dict(parser["Service"])


def runnable_copy(folder: Path, *additions: Path) -> Path:
    """Return a copy whose program exists on this machine, under the unit's own name, with drop-ins appended."""
    text = re.sub(r"^ExecStart=\S+", f"ExecStart={sys.executable}", UNIT.read_text(), flags=re.MULTILINE)
    copy = folder / UNIT.name
    copy.write_text(text + "".join(each.read_text() for each in additions))
    return copy


def test_the_unit_has_no_fault_in_systemds_eyes(tmp_path: Path) -> None:
    need("systemd-analyze", "systemd")
    result = run(["systemd-analyze", "verify", "--man=no", runnable_copy(tmp_path)])
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")


def test_the_gpu_drop_in_has_no_fault_either(tmp_path: Path) -> None:
    need("systemd-analyze", "systemd")
    result = run(["systemd-analyze", "verify", "--man=no", runnable_copy(tmp_path, UNITS / "appliance-gpu.conf")])
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")


def test_the_sandbox_leaves_an_exposure_of_at_most_three() -> None:
    need("systemd-analyze", "systemd")
    result = run(["systemd-analyze", "security", "--offline=true", "--threshold=30", "--no-pager", UNIT])
    assert result.returncode == 0, result.stdout[-200:] + result.stderr


def test_without_its_sandbox_the_unit_would_be_refused(tmp_path: Path) -> None:
    need("systemd-analyze", "systemd")
    bare = tmp_path / UNIT.name
    bare.write_text("[Service]\nExecStart=/bin/true\n")
    result = run(["systemd-analyze", "security", "--offline=true", "--threshold=30", "--no-pager", bare])
    assert result.returncode != 0


def test_the_user_file_makes_the_user_that_the_unit_names(tmp_path: Path) -> None:
    need("systemd-sysusers", "systemd")
    (tmp_path / "etc").mkdir()
    result = run(["systemd-sysusers", f"--root={tmp_path}", UNITS / "appliance-sysusers.conf"])
    assert result.returncode == 0, result.stderr
    users = (tmp_path / "etc" / "passwd").read_text()
    assert re.search(rf"^{service_section()['User']}:", users, re.MULTILINE)


def test_systemd_waits_longer_than_the_server_needs_to_end_its_requests() -> None:
    assert float(service_section()["TimeoutStopSec"]) > Settings().shutdown_grace_s


def test_the_watchdog_leaves_an_engine_the_time_that_the_settings_give_it() -> None:
    assert float(service_section()["WatchdogSec"]) > Settings().stalled_engine_s


def test_the_installed_settings_file_is_valid_and_changes_no_default() -> None:
    _, effective = load_settings(config_file=UNITS / "appliance.toml")
    assert {each.origin for each in effective} == {"default"}


def test_the_examples_in_the_settings_file_are_settings(tmp_path: Path) -> None:
    text = (UNITS / "appliance.toml").read_text()
    active = tmp_path / "active.toml"
    active.write_text(re.sub(r"^# (\w+ = )", r"\1", text, flags=re.MULTILINE))
    settings, _ = load_settings(config_file=active)
    assert settings.host == "0.0.0.0"
    assert settings.tls_certificate is not None
    assert settings.tls_key is not None


def test_the_unit_starts_the_program_where_install_puts_it() -> None:
    program, verb, *_ = service_section()["ExecStart"].split()
    assert (program, verb) == ("/opt/appliance/venv/bin/appliance", "serve")
    assert "final_opt=/opt/appliance" in (CHECKOUT / "firmware_scripts" / "service_files.bash").read_text()
