"""The operators' HTTP API of a real hub that listens."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import anyio
import anyio.to_thread
import msgspec
import pytest
import urllib3

from appliance.core.clock import SystemClock
from appliance.core.errors import NotFoundError, SettingsError
from appliance.core.fleet import Command, CommandResult, Reported, down, up
from appliance.core.hub_settings import HubSettings
from appliance.core.messaging import Message
from appliance.hub.batches import sound
from appliance.hub.init import HubDocument, init_hub
from appliance.hub.operators import SCOPES
from appliance.hub.rollout_policy import Plan, Progress
from appliance.hub.rollout_records import Audience, Options, Rollout
from appliance.hub.rollout_store import SqliteRollouts
from appliance.hub.rollouts import job_maker
from appliance.hub.room import Hub, open_hub
from appliance.hub.telemetry_store import Received
from appliance.security.keys import KeyStore
from tests.fleet.broker import Broker, Peer, free_port
from tests.hub.hubs import (
    PATIENCE_S,
    born,
    hub_settings,
    report_message,
    running_hub,
    state_message,
    until_device,
)
from tests.hub.telemetry_batches import run_of

pytestmark = pytest.mark.anyio

DEVICE = "box-1"
SCHEMATHESIS_TIMEOUT_S = 100.0


@dataclass(frozen=True, slots=True)
class Reply:
    status: int
    headers: Mapping[str, str]
    body: bytes

    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def code(self) -> str:
        """The code of an error, which must have the one shape."""
        document = self.json()
        assert set(document["error"]) == {"message", "type", "param", "code"}
        code: str = document["error"]["code"]
        return code


async def ask(hub: Hub, method: str, path: str, body: Any = None, **headers: str) -> Reply:
    def send() -> Reply:
        with urllib3.PoolManager(retries=False, timeout=PATIENCE_S) as pool:
            content = body if isinstance(body, bytes | None) else json.dumps(body).encode()
            answer = pool.request(method, f"http://127.0.0.1:{hub.port}{path}", body=content, headers=headers)
            return Reply(answer.status, answer.headers, answer.data)

    return await anyio.to_thread.run_sync(send)


@asynccontextmanager
async def lonely_hub(folder: Path, **changes: Any) -> AsyncIterator[Hub]:
    """Return a hub that listens and finds no broker."""
    settings = HubSettings(data_dir=folder, port=0, broker_port=free_port(), **changes)
    init_hub(settings, HubDocument("localhost"), SystemClock())
    async with open_hub(settings) as hub, asyncio.TaskGroup() as tasks:
        running = tasks.create_task(hub.run())
        try:
            async with asyncio.timeout(PATIENCE_S):
                await hub.listening.wait()
            await hub.means.devices.note_state(DEVICE, born(1), retained=False)
            yield hub
        finally:
            hub.stop()
            async with asyncio.timeout(PATIENCE_S):
                await running


async def test_an_operator_sees_a_device_and_what_it_reported(tmp_path: Path, broker: Broker) -> None:
    async with running_hub(hub_settings(tmp_path / "hub", broker)) as hub:
        await hub.listening.wait()
        async with Peer(broker.options(DEVICE), down(DEVICE, "cmd")) as device:
            await device.link.publish(state_message(DEVICE, born(1)))
            await device.link.publish(report_message(DEVICE, Reported(1, 0, facts={"hardware": "x86_64-avx2"})))
            await until_device(hub, DEVICE, lambda each: each.reported_version == 1, "reported")
            listed = (await ask(hub, "GET", "/v1/devices?hardware=x86_64-avx2")).json()
            assert [each["id"] for each in listed["data"]] == [DEVICE]
            assert listed["data"][0]["status"] == "online"
            shown = (await ask(hub, "GET", f"/v1/devices/{DEVICE}")).json()
            assert shown["reported"]["facts"] == {"hardware": "x86_64-avx2"}
            fleet = (await ask(hub, "GET", "/v1/fleet")).json()
            assert (fleet["devices"]["online"], fleet["broker"], fleet["hardware"]) == (1, True, {"x86_64-avx2": 1})
            assert (await ask(hub, "GET", "/readyz")).status == 200
            metrics = (await ask(hub, "GET", "/metrics")).body.decode()
            assert 'appliance_hub_devices{status="online"} 1.0' in metrics
            assert 'appliance_hub_messages_total{kind="state"} 1.0' in metrics
            async with asyncio.TaskGroup() as tasks:
                command = {"name": "ping", "wait_s": 20}
                asked = tasks.create_task(ask(hub, "POST", f"/v1/devices/{DEVICE}/commands", command))
                sent = msgspec.json.decode((await device.next()).payload, type=Command)
                reply = msgspec.json.encode(CommandResult(sent.id, True, {"pong": 1}))
                await device.link.publish(Message(up(DEVICE, "res"), reply))
            assert (asked.result().json()["state"], asked.result().json()["result"]) == ("done", {"pong": 1})


async def test_a_desired_twin_is_written_only_over_the_version_that_was_read(tmp_path: Path) -> None:
    async with lonely_hub(tmp_path) as hub:
        path = f"/v1/devices/{DEVICE}/desired"
        assert (await ask(hub, "GET", path)).json()["version"] == 0
        wanted = {"version": 0, "settings": {"threads": 2}, "models": {"chat": "7"}}
        assert (await ask(hub, "PUT", path, wanted)).json()["version"] == 1
        refused = await ask(hub, "PUT", path, {"version": 0, "settings": {"threads": 3}})
        assert (refused.status, refused.code) == (409, "conflict")
        bad = await ask(hub, "PUT", path, {"version": 1, "settings": {"Threads": 3}})
        assert (bad.status, bad.code) == (400, "invalid_value")
        assert (await ask(hub, "GET", path)).json()["settings"] == {"threads": 2}
        assert (await ask(hub, "PUT", "/v1/groups/line-3/desired", wanted)).status == 200
        changed = await ask(hub, "PATCH", f"/v1/devices/{DEVICE}", {"groups": ["line-3"], "labels": {"hall": "A"}})
        assert (changed.json()["groups"], changed.json()["labels"]) == (["line-3"], {"hall": "A"})
        assert (await ask(hub, "GET", f"/v1/devices/{DEVICE}")).json()["device"]["desired_version"] == 1


async def test_a_page_of_devices_leads_to_the_next(tmp_path: Path) -> None:
    async with lonely_hub(tmp_path) as hub:
        for number in range(5):
            await hub.means.devices.expect(f"new-{number}")
        found: list[str] = []
        query = "limit=2"
        while True:
            page = (await ask(hub, "GET", f"/v1/devices?{query}")).json()
            found += [each["id"] for each in page["data"]]
            if not page["has_more"]:
                break
            query = f"limit=2&after={page['last_id']}"
        assert found == [DEVICE, *(f"new-{number}" for number in range(5))]


@pytest.mark.parametrize(
    ("method", "path", "body", "status"),
    [
        ("GET", "/v1/devices/nobody", None, 404),
        ("GET", "/v1/devices/nobody/desired", None, 404),
        ("GET", "/v1/devices/nobody/telemetry", None, 404),
        ("GET", "/v1/devices/%00", None, 404),
        ("GET", "/v1/devices?limit=0", None, 400),
        ("GET", "/v1/devices?nonsense=1", None, 400),
        ("GET", "/v1/devices?limit=1&limit=2", None, 400),
        ("GET", f"/v1/devices/{DEVICE}/telemetry?stream=gossip", None, 400),
        ("POST", f"/v1/devices/{DEVICE}/commands", b"{", 400),
        ("POST", f"/v1/devices/{DEVICE}/commands", {"name": "ping", "expires_in_s": 301}, 400),
        ("POST", f"/v1/devices/{DEVICE}/commands", {"name": "Ping"}, 400),
        ("POST", "/v1/devices/nobody/commands", {"name": "ping"}, 404),
        ("POST", f"/v1/devices/{DEVICE}/release", None, 409),
        ("GET", "/v1/commands/none", None, 404),
        ("PUT", "/v1/groups/BAD/desired", {"version": 0, "settings": {"threads": 1}}, 400),
        ("PUT", f"/v1/devices/{DEVICE}/desired", {"version": 0, "settings": {"a": "x" * 50_000}}, 413),
        ("PUT", f"/v1/devices/{DEVICE}/desired", b" " * 70_000, 413),
        ("DELETE", "/v1/devices/nobody", None, 404),
        ("DELETE", "/v1/fleet", None, 405),
        ("GET", "/v1/nothing", None, 404),
    ],
)
async def test_what_cannot_be_is_refused_in_one_shape(
    tmp_path: Path, method: str, path: str, body: Any, status: int
) -> None:
    async with lonely_hub(tmp_path, max_body_bytes=64 * 1024) as hub:
        refused = await ask(hub, method, path, body)
        assert (refused.status, bool(refused.code)) == (status, True), refused.body
        assert not hub.means.commands.of_device(DEVICE)
        assert hub.means.twins.get("device", DEVICE).version == 0


async def test_each_key_does_only_what_its_scopes_say(tmp_path: Path) -> None:
    async with lonely_hub(tmp_path, require_api_key=True) as hub:
        keys = KeyStore(hub.means.database, SystemClock(), scopes=SCOPES)
        secrets = {scope: keys.create(scope, [scope])[1] for scope in SCOPES}
        allowed = {
            "read": {"/v1/devices"},
            "operate": {"commands"},
            "metrics": {"/metrics"},
            "admin": {"/v1/devices", "commands", "/metrics", "delete"},
        }
        asked = {
            "/v1/devices": ("GET", "/v1/devices", None),
            "commands": ("POST", f"/v1/devices/{DEVICE}/commands", {"name": "ping"}),
            "/metrics": ("GET", "/metrics", None),
            "delete": ("DELETE", f"/v1/devices/{DEVICE}", None),
        }
        for scope, secret in secrets.items():
            for what, (method, path, body) in asked.items():
                reply = await ask(hub, method, path, body, authorization=f"Bearer {secret}")
                assert (reply.status < 300) == (what in allowed[scope]), (scope, what, reply.body)
        nobody = await ask(hub, "GET", "/v1/devices")
        assert (nobody.status, "hub api-keys create" in nobody.json()["error"]["message"]) == (401, True)
        assert (await ask(hub, "GET", "/healthz")).status == 200


async def test_a_hub_without_a_broker_is_alive_and_not_ready(tmp_path: Path) -> None:
    async with lonely_hub(tmp_path) as hub:
        assert (await ask(hub, "GET", "/healthz")).json() == {"status": "ok"}
        reply = await ask(hub, "GET", "/readyz")
        assert (reply.status, reply.json()["reason"]) == (503, "There is no connection to the broker.")


async def test_a_hub_listens_to_strangers_only_with_tls_and_keys(tmp_path: Path) -> None:
    settings = HubSettings(data_dir=tmp_path, host="0.0.0.0", port=0)
    init_hub(settings, HubDocument("localhost"), SystemClock())
    with pytest.raises(SettingsError, match="hub api-keys create"):
        async with open_hub(settings):
            pass


async def test_a_folder_without_a_hub_is_left_as_it_is(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="hub init"):
        async with open_hub(HubSettings(data_dir=tmp_path / "nothing", port=0)):
            pass
    assert not (tmp_path / "nothing").exists()


async def test_two_hubs_do_not_serve_one_folder(tmp_path: Path) -> None:
    async with lonely_hub(tmp_path) as hub:
        with pytest.raises(Exception, match="Another hub"):
            async with open_hub(hub.means.settings):
                pass
        assert (await ask(hub, "GET", "/v1/fleet")).status == 200


async def test_a_foreign_web_page_is_refused_on_an_open_loopback(tmp_path: Path) -> None:
    async with lonely_hub(tmp_path) as hub:
        refused = await ask(hub, "DELETE", f"/v1/devices/{DEVICE}", origin="https://example.com")
        assert (refused.status, refused.code) == (403, "foreign_page")
        assert hub.means.devices.find(DEVICE) is not None


@pytest.mark.slow
async def test_the_hub_does_what_its_document_says_and_nothing_else(tmp_path: Path, broker: Broker) -> None:
    async with running_hub(hub_settings(tmp_path / "hub", broker)) as hub:
        await hub.listening.wait()
        await hub.means.devices.note_state(DEVICE, born(1), retained=False)
        document = (await ask(hub, "GET", "/openapi.json")).json()
        for operations in document["paths"].values():
            for parameter in [each for one in operations.values() for each in one.get("parameters", ())]:
                if parameter["name"] == "device" and parameter["in"] == "path":
                    parameter["schema"] = {"enum": [DEVICE]}
                if parameter["name"] == "group" and parameter["in"] == "path":
                    parameter["schema"] = {"enum": ["line-3"]}
        for operations in document["paths"].values():
            operations.pop("delete", None)
        document["components"]["schemas"]["CommandRequest"]["properties"]["wait_s"]["maximum"] = 0
        path = tmp_path / "openapi.json"
        path.write_bytes(msgspec.json.encode(document))
        # A name may be refused that is a text; no schema says which settings there are, or which version is there.
        checks = "not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance"
        command = [
            *(sys.executable, "-m", "schemathesis.cli", "run", str(path), "--url", f"http://127.0.0.1:{hub.port}"),
            *("--no-color", "--seed", "1", "--generation-deterministic", "--checks", checks, "--max-examples", "5"),
        ]
        with anyio.fail_after(SCHEMATHESIS_TIMEOUT_S):
            result = await anyio.run_process(command, cwd=tmp_path, check=False)
        assert result.returncode == 0, result.stdout.decode() + result.stderr.decode()


async def test_an_operator_pauses_goes_on_with_and_ends_a_rollout(tmp_path: Path) -> None:
    async with lonely_hub(tmp_path) as hub:
        rollouts = SqliteRollouts(hub.means.database, hub.means.writes, job_maker(hub.means.devices, hub.means.clock))
        rollout = Rollout(
            id="r-1",
            model="chat",
            release="chat:2",
            target="releases/chat/2/release.json",
            length=10,
            digest="0" * 64,
            counter=2,
            audience=Audience(),
            options=Options(),
            plan=Plan(),
            progress=Progress(),
            attempt=1,
            created=hub.means.clock.unix(),
            actor="test",
        )
        await anyio.to_thread.run_sync(rollouts.begin, rollout)
        assert [each["id"] for each in (await ask(hub, "GET", "/v1/rollouts")).json()["data"]] == ["r-1"]
        paused = await ask(hub, "POST", "/v1/rollouts/r-1/pause", {"reason": "Looks slow."})
        assert (paused.json()["state"], paused.json()["code"]) == ("paused", "person")
        again = await ask(hub, "POST", "/v1/rollouts/r-1/pause")
        assert (again.status, again.code) == (409, "conflict")
        assert (await ask(hub, "POST", "/v1/rollouts/r-1/resume")).json()["state"] == "running"
        assert (await ask(hub, "POST", "/v1/rollouts/r-1/abort", b"[]")).status == 400
        assert (await ask(hub, "POST", "/v1/rollouts/r-1/abort")).json()["state"] == "aborted"
        assert (await ask(hub, "POST", "/v1/rollouts/r-1/resume")).status == 409
        shown = (await ask(hub, "GET", "/v1/rollouts/r-1")).json()
        told = [(each["step"], each["reason"]) for each in shown["timeline"]]
        assert ("pause", "Looks slow.") in told
        assert (await ask(hub, "GET", "/v1/rollouts/none")).status == 404
        assert (await ask(hub, "GET", "/v1/releases")).json() == {"data": []}


async def test_what_a_device_told_is_read_page_by_page(tmp_path: Path) -> None:
    async with lonely_hub(tmp_path) as hub:
        told = sound(DEVICE, "metric", run_of(1, 3))
        await hub.means.telemetry.keep([Received(told, hub.means.clock.unix())])
        path = f"/v1/devices/{DEVICE}/telemetry?stream=metric&limit=2"
        first = (await ask(hub, "GET", path)).json()
        second = (await ask(hub, "GET", f"{path}&before={first['next_before']}")).json()
        assert [each["body"]["number"] for each in first["data"] + second["data"]] == [3, 2, 1]
        assert second["next_before"] is None
        assert (await ask(hub, "GET", f"/v1/devices/{DEVICE}/telemetry?until=1")).json()["data"] == []
        assert (await ask(hub, "GET", "/v1/alarms")).json() == {"data": []}
        assert (await ask(hub, "DELETE", f"/v1/devices/{DEVICE}")).status == 204
        assert hub.means.telemetry.rows(device=DEVICE)[0] == []
