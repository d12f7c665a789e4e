"""`appliance hub devices`, `api-keys` and `status` on a hub's folder, beside no hub."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from appliance.cli.hub import command
from appliance.core.clock import SystemClock
from appliance.core.fleet import CommandResult
from appliance.hub.batches import sound
from appliance.hub.command_store import SqliteCommands
from appliance.hub.device_store import SqliteDevices
from appliance.hub.operators import SCOPES
from appliance.hub.schema import MIGRATIONS
from appliance.hub.telemetry_records import Received
from appliance.hub.telemetry_store import SqliteTelemetry
from appliance.security.keys import KeyStore
from appliance.store.database import Database
from appliance.store.grouped import GroupedWrites
from tests.hub.hubs import born
from tests.hub.telemetry_batches import run_of

DEVICE = "box-1"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Return a hub's folder with a device and one in quarantine."""
    with stores(tmp_path) as (devices, _):
        asyncio.run(devices.note_state(DEVICE, born(1), retained=False))
        asyncio.run(devices.note_state("box-2", born(1), retained=False))
        asyncio.run(devices.note_state("box-2", born(1, at=9.0), retained=False))
    return tmp_path


@contextmanager
def stores(folder: Path) -> Iterator[tuple[SqliteDevices, SqliteCommands]]:
    with closing(Database(folder / "hub.db", migrations=MIGRATIONS)) as database:
        writes = GroupedWrites(database)
        yield SqliteDevices(database, writes, SystemClock()), SqliteCommands(database, writes, SystemClock())


def run(folder: Path, *arguments: str) -> Result:
    return CliRunner().invoke(command, [*arguments, "--data", str(folder)])


def as_json(folder: Path, *arguments: str) -> Any:
    result = run(folder, *arguments, "--json")
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def audited(folder: Path) -> list[tuple[str, str]]:
    with closing(Database(folder / "hub.db", migrations=MIGRATIONS)) as database:
        rows = database.read(lambda each: each.execute("SELECT action, subject FROM audit ORDER BY id").fetchall())
    return [(row["action"], row["subject"]) for row in rows]


def test_devices_are_listed_as_a_table_and_as_json(folder: Path) -> None:
    assert "quarantined" in run(folder, "devices", "list").stdout
    assert [each["id"] for each in as_json(folder, "devices", "list")] == [DEVICE, "box-2"]
    assert [each["id"] for each in as_json(folder, "devices", "list", "--status", "quarantined")] == ["box-2"]
    assert as_json(folder, "devices", "list", "--group", "none") == []


def test_setting_changes_one_value_and_keeps_the_others(folder: Path) -> None:
    as_json(folder, "devices", "set", DEVICE, "log_level=debug", "threads=2", "telemetry.health=60", "models.chat=7")
    document = as_json(folder, "devices", "set", DEVICE, "log_level=", "models.chat=8")
    assert (document["version"], document["settings"]) == (2, {"threads": 2})
    assert (document["telemetry"], document["models"]) == ({"health": 60.0}, {"chat": "8"})
    as_json(folder, "devices", "describe", DEVICE, "hall=A", "--group", "line-3")
    as_json(folder, "devices", "set", "line-3", "--group", "flash_attention=on")
    shown = as_json(folder, "devices", "show", DEVICE)
    assert shown["desired"]["settings"] == {"flash_attention": "on", "threads": 2}
    assert shown["device"]["labels"] == {"hall": "A"}
    assert "flash_attention" in run(folder, "devices", "show", DEVICE).stdout
    assert [action for action, _ in audited(folder)] == ["twin.set_device"] * 2 + ["device.describe", "twin.set_group"]


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (("set", DEVICE, "threads"), 5),
        (("set", DEVICE, "telemetry.health=often"), 5),
        (("set", DEVICE, "telemetry.gossip=1"), 5),
        (("set", DEVICE, "Threads=1"), 5),
        (("set", "nobody", "threads=1"), 3),
        (("describe", DEVICE, "Hall=A"), 5),
        (("describe", "nobody", "hall=A"), 3),
        (("show", "nobody"), 3),
        (("command", "nobody", "ping", "--wait", "0"), 3),
        (("command", DEVICE, "ping", "[1]", "--wait", "0"), 5),
        (("command", "box-2", "ping", "--wait", "0"), 4),
        (("approve", DEVICE), 3),
        (("refuse", DEVICE), 3),
        (("forget", "nobody", "--yes"), 3),
    ],
)
def test_what_cannot_be_is_refused_and_changes_nothing(folder: Path, arguments: tuple[str, ...], code: int) -> None:
    result = run(folder, "devices", *arguments)
    assert result.exit_code == code, result.output
    assert audited(folder) == []


def test_without_a_hub_every_verb_says_how_to_make_one(tmp_path: Path) -> None:
    for verb in (("devices", "list"), ("status",), ("api-keys", "list")):
        result = run(tmp_path, *verb)
        assert result.exit_code == 3
        assert "appliance hub init" in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_command_waits_for_a_hub_and_tells_its_result(folder: Path) -> None:
    given = as_json(folder, "devices", "command", DEVICE, "ping", '{"n": 1}', "--wait", "0")
    assert (given["state"], given["arguments"]) == ("waiting", {"n": 1})
    with stores(folder) as (_, commands):
        asyncio.run(commands.finish(DEVICE, CommandResult(given["id"], False, {}, "busy", "Not now.")))
    assert as_json(folder, "devices", "show", DEVICE)["commands"][0]["code"] == "busy"
    assert audited(folder) == [("device.command", DEVICE)]


def test_approving_ends_a_quarantine_once(folder: Path) -> None:
    assert as_json(folder, "devices", "approve", "box-2")["approved"] == "the quarantine is over"
    assert run(folder, "devices", "approve", "box-2").exit_code == 3
    assert as_json(folder, "status")["devices"]["quarantined"] == 0


def test_a_device_is_forgotten_with_all_that_is_known_of_it(folder: Path) -> None:
    as_json(folder, "devices", "set", DEVICE, "threads=2")
    as_json(folder, "devices", "command", DEVICE, "ping", "--wait", "0")

    def telemetry(of: str) -> int:
        with closing(Database(folder / "hub.db", migrations=MIGRATIONS)) as database:
            store = SqliteTelemetry(database)
            if of == "new":
                for device in (DEVICE, "box-2"):
                    asyncio.run(store.keep([Received(sound(device, "metric", run_of(1, 5)), 1.0)]))
            return len(store.rows(device=None if of == "new" else of)[0])

    assert telemetry("new") == 10
    assert run(folder, "devices", "forget", DEVICE).exit_code == 1, "nobody said yes"
    assert as_json(folder, "devices", "forget", DEVICE, "--yes") == {"device": DEVICE, "forgotten": True}
    assert (telemetry(DEVICE), telemetry("box-2")) == (0, 5)
    assert [each["id"] for each in as_json(folder, "devices", "list")] == ["box-2"]
    assert run(folder, "devices", "show", DEVICE).exit_code == 3


def test_the_status_counts_devices(folder: Path) -> None:
    document = as_json(folder, "status")
    assert document["running"] is False
    assert (document["devices"]["online"], document["devices"]["quarantined"]) == (1, 1)
    assert document["agents"] == {"1.0": 2}
    assert "appliance hub serve" in run(folder, "status").stdout


def test_operators_keys_have_scopes_of_the_hub(folder: Path) -> None:
    made = as_json(folder, "api-keys", "create", "dashboard", "--scope", "read", "--scope", "operate")
    with closing(Database(folder / "hub.db", migrations=MIGRATIONS)) as database:
        key = KeyStore(database, SystemClock(), scopes=SCOPES).authenticate(made["secret"])
    assert key is not None
    assert (key.allows("operate"), key.allows("admin")) == (True, False)
    assert run(folder, "api-keys", "create", "x", "--scope", "inference").exit_code == 2
    as_json(folder, "api-keys", "revoke", made["id"])
    assert as_json(folder, "api-keys", "list")[0]["revoked"] is not None
    assert "dashboard" in run(folder, "api-keys", "list").stdout
