"""A hub's folder: made once, finished when it was broken off, never overwritten."""

from __future__ import annotations

import json
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from appliance.cli.hub.ca import command as ca
from appliance.cli.hub.init import command as init
from appliance.core.clock import SystemClock
from appliance.core.fleet import ClaimBundle
from appliance.core.hub_settings import HubSettings
from appliance.fleet.enrolment import read_bundle
from appliance.hub.authority import Authority as ReleaseAuthority
from appliance.hub.init import HubFiles, load_authority, read_hub
from appliance.hub.schema import MIGRATIONS
from appliance.security.certificates import HUB_NAME, certificate_facts, check_certificate, revoked_serials
from appliance.store.database import Database


def run(verb: object, folder: Path, *arguments: str) -> Result:
    return CliRunner().invoke(verb, [*arguments, "--data", str(folder)])  # type: ignore[arg-type]


def contents(folder: Path) -> dict[str, bytes]:
    """Return every file's content; of the database only that it is there, for looking at it may touch its log."""
    return {
        str(each.relative_to(folder)): b"" if each.name.startswith("hub.db") else each.read_bytes()
        for each in sorted(folder.rglob("*"))
        if each.is_file() and not each.name.endswith(("-wal", "-shm"))
    }


def check_complete(folder: Path) -> None:
    """Hold a hub's folder against what a hub needs."""
    settings = HubSettings(data_dir=folder)
    files = HubFiles.of(settings)
    authority = files.authority.read_bytes()
    check_certificate(files.hub.read_bytes(), files.hub_key.read_bytes(), authority, HUB_NAME)
    broker = certificate_facts(files.broker.read_bytes()).common_name
    check_certificate(files.broker.read_bytes(), files.broker_key.read_bytes(), authority, broker)
    assert load_authority(settings).identity.certificate == authority
    assert revoked_serials(files.revoked.read_bytes()) == set()
    assert ReleaseAuthority(folder, SystemClock()).root()
    assert str(files.broker_key) in files.configuration.read_text()
    with closing(Database(settings.database_path, migrations=MIGRATIONS)) as database:
        rows = database.read(lambda c: c.execute("SELECT count(*) FROM audit WHERE action = 'hub.init'").fetchone()[0])
    assert rows == 1


def test_a_hub_is_made_and_says_what_to_do_next(tmp_path: Path) -> None:
    result = run(init, tmp_path / "hub", "--name", "hub.test")
    assert result.exit_code == 0, result.output
    assert "Carry" in result.stdout
    assert "mosquitto -c" in result.stdout
    check_complete(tmp_path / "hub")
    secrets = [each for each in (tmp_path / "hub").rglob("*") if each.name.endswith(("-key.pem", ".db"))]
    assert len(secrets) >= 4
    assert {each.stat().st_mode & 0o777 for each in secrets} == {0o600}


def test_repeating_it_changes_nothing(tmp_path: Path) -> None:
    assert run(init, tmp_path / "hub", "--name", "hub.test").exit_code == 0
    before = contents(tmp_path / "hub")
    again = run(init, tmp_path / "hub", "--name", "hub.test", "--json")
    assert json.loads(again.stdout)["made"] == []
    assert contents(tmp_path / "hub") == before
    other = run(init, tmp_path / "hub", "--name", "other.test")
    assert (other.exit_code, "There is a hub" in other.stderr) == (4, True)
    assert contents(tmp_path / "hub") == before


@pytest.mark.parametrize(
    "plan",
    [("--root-threshold", "4"), ("--targets-threshold", "0"), ("--root-keys", "0")],
    ids=lambda each: each[0],
)
def test_a_plan_of_keys_that_cannot_be_kept_makes_nothing(tmp_path: Path, plan: tuple[str, str]) -> None:
    result = run(init, tmp_path / "hub", "--name", "hub.test", *plan)
    assert result.exit_code == 5
    assert not (tmp_path / "hub").exists()


def test_a_half_made_hub_is_finished_wherever_it_was_killed(tmp_path: Path) -> None:
    program = [sys.executable, "-m", "tests.fleet.killed", "init", str(tmp_path)]
    result = subprocess.run(program, capture_output=True, text=True, timeout=100, check=False)
    assert result.returncode == 0, result.stderr
    assert int(result.stdout) > 15, "it was killed at every change of the disk"
    for count in range(1, int(result.stdout) + 2):
        check_complete(tmp_path / str(count))


def test_a_claim_is_one_file_that_says_all_and_is_not_overwritten(tmp_path: Path) -> None:
    run(init, tmp_path / "hub", "--name", "hub.test", "--broker-port", "8899")
    file = tmp_path / "claim.json"
    made = run(ca, tmp_path / "hub", "claim", str(file), "--uses", "3", "--days", "2")
    assert made.exit_code == 0, made.output
    assert "approve" in made.stdout
    bundle = read_bundle(file, now=0.0)
    assert isinstance(bundle, ClaimBundle)
    assert (bundle.host, bundle.port, "root" in bundle.root) == ("hub.test", 8899, True)
    assert file.stat().st_mode & 0o777 == 0o600
    before = file.read_bytes()
    assert run(ca, tmp_path / "hub", "claim", str(file)).exit_code == 4
    assert file.read_bytes() == before
    listed = json.loads(run(ca, tmp_path / "hub", "list", "--json").stdout)
    assert listed["claims"][0]["allowed"] == 3
    assert bundle.token not in json.dumps(listed)


def test_verbs_of_a_folder_without_a_hub_make_none(tmp_path: Path) -> None:
    for arguments in (("list",), ("show",), ("claim", str(tmp_path / "c")), ("revoke", "a")):
        result = run(ca, tmp_path / "hub", *arguments)
        assert (result.exit_code, "appliance hub init" in result.stderr) == (3, True), result.output
    assert not (tmp_path / "hub").exists()


def test_who_is_not_there_cannot_be_revoked(tmp_path: Path) -> None:
    run(init, tmp_path / "hub", "--name", "hub.test")
    for arguments in (("revoke", "box"), ("revoke", "claim_1")):
        assert run(ca, tmp_path / "hub", *arguments).exit_code == 3
    assert "SHA-256" in run(ca, tmp_path / "hub", "show").stdout
    assert len(json.loads(run(ca, tmp_path / "hub", "show", "--json").stdout)["fingerprint"]) == 64
    assert read_hub(HubSettings(data_dir=tmp_path / "hub")).name == "hub.test"
