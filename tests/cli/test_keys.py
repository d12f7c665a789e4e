from __future__ import annotations

import json
from contextlib import closing
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from appliance.cli.keys import command
from appliance.core.clock import SystemClock
from appliance.security.keys import KeyStore
from appliance.store.database import Database


def run(folder: Path, *arguments: str) -> Result:
    return CliRunner().invoke(command, [*arguments, "--data", str(folder)])


def authenticated(folder: Path, secret: str) -> bool:
    with closing(Database(folder / "appliance.db")) as database:
        return KeyStore(database, SystemClock()).authenticate(secret) is not None


def test_creating_prints_the_secret_alone_on_standard_output(tmp_path: Path) -> None:
    result = run(tmp_path, "create", "line 3 camera")
    assert result.exit_code == 0
    secret = result.stdout.removesuffix("\n")
    assert secret not in result.stderr
    assert "never shown again" in result.stderr
    assert "Authorization: Bearer" in result.stderr
    assert authenticated(tmp_path, secret)


def test_creating_as_json_gives_one_document(tmp_path: Path) -> None:
    result = run(tmp_path, "create", "ops", "--scope", "admin", "--scope", "metrics", "--json")
    document = json.loads(result.stdout)
    assert result.stderr == ""
    assert (document["name"], document["scopes"], document["revoked"]) == ("ops", ["admin", "metrics"], None)
    assert authenticated(tmp_path, document["secret"])


def test_listing_shows_every_key_without_its_secret(tmp_path: Path) -> None:
    secret = run(tmp_path, "create", "摄像头").stdout.strip()
    revoked = json.loads(run(tmp_path, "create", "old", "--json").stdout)["id"]
    run(tmp_path, "revoke", revoked)
    table = run(tmp_path, "list").stdout
    document = json.loads(run(tmp_path, "list", "--json").stdout)
    assert "摄像头" in table
    assert "valid" in table
    assert "revoked 20" in table
    assert [each["name"] for each in document] == ["摄像头", "old"]
    assert [each["revoked"] is None for each in document] == [True, False]
    assert secret not in table + str(document)


def test_listing_where_nothing_is_makes_nothing(tmp_path: Path) -> None:
    folder = tmp_path / "not made"
    assert "no API key yet" in run(folder, "list").stdout
    assert json.loads(run(folder, "list", "--json").stdout) == []
    assert not folder.exists()


def test_revoking_ends_the_key(tmp_path: Path) -> None:
    document = json.loads(run(tmp_path, "create", "camera", "--json").stdout)
    result = run(tmp_path, "revoke", document["id"])
    assert result.exit_code == 0
    assert f"{document['id']} (camera) is revoked 20" in result.stdout
    assert not authenticated(tmp_path, document["secret"])
    again = json.loads(run(tmp_path, "revoke", document["id"], "--json").stdout)
    assert again["revoked"] is not None


def test_an_unknown_id_is_refused_and_the_known_ones_are_named(tmp_path: Path) -> None:
    document = json.loads(run(tmp_path, "create", "camera", "--json").stdout)
    result = run(tmp_path, "revoke", "key_unknown")
    assert result.exit_code == 3
    assert document["id"] in result.stderr
    assert authenticated(tmp_path, document["secret"])


def test_a_taken_name_is_refused(tmp_path: Path) -> None:
    run(tmp_path, "create", "camera")
    result = run(tmp_path, "create", "camera")
    assert (result.exit_code, result.stdout) == (4, "")
    assert "already a valid API key named 'camera'" in result.stderr
    assert len(json.loads(run(tmp_path, "list", "--json").stdout)) == 1


def test_an_unknown_scope_is_refused(tmp_path: Path) -> None:
    result = run(tmp_path, "create", "camera", "--scope", "root")
    assert result.exit_code == 2
    assert "'inference', 'metrics', 'admin'" in result.stderr
    assert not (tmp_path / "appliance.db").exists()


def test_a_keys_share_and_tier_are_shown(tmp_path: Path) -> None:
    run(tmp_path, "create", "urgent", "--weight", "2.5", "--tier", "priority")
    run(tmp_path, "create", "ordinary")
    table = run(tmp_path, "list").stdout
    document = json.loads(run(tmp_path, "list", "--json").stdout)
    assert "2.5" in table
    assert "priority" in table
    shares = {each["name"]: (each["weight"], each["highest_tier"]) for each in document}
    assert shares == {"urgent": (2.5, "priority"), "ordinary": (1.0, "default")}


@pytest.mark.parametrize(
    ("arguments", "status"), [(("--weight", "0"), 2), (("--weight", "nan"), 5), (("--tier", "royal"), 2)]
)
def test_a_share_or_tier_that_cannot_be_is_refused(tmp_path: Path, arguments: tuple[str, ...], status: int) -> None:
    assert run(tmp_path, "create", "camera", *arguments).exit_code == status
    assert "no API key yet" in run(tmp_path, "list").stdout
