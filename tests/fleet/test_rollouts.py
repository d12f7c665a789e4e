"""Rollouts with real programs: begun on the command line, carried out by hubs that are killed, over a real broker."""

from __future__ import annotations

import asyncio
import json
import signal
import sys
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager, closing
from pathlib import Path
from typing import Any

import msgspec
import pytest
from click.testing import CliRunner

from appliance.cli.hub.rollouts import command as rollouts
from appliance.core.clock import SystemClock
from appliance.core.fleet import Job, JobReport
from appliance.core.hub_settings import HubSettings
from appliance.core.messaging import Message
from appliance.core.releases import JOB_TYPE, Release, ReleaseFile, release_target
from appliance.hub.authority import Authority
from appliance.hub.device_store import SqliteDevices
from appliance.hub.director import director_keys
from appliance.hub.init import HubDocument, HubFiles, init_hub, load_authority
from appliance.hub.schema import MIGRATIONS
from appliance.messaging.connection import ConnectionOptions, TlsFiles
from appliance.security.certificates import new_request
from appliance.security.envelopes import open_envelope
from appliance.security.signing import PublicKey
from appliance.store.database import Database
from appliance.store.grouped import GroupedWrites
from appliance.store.private_files import write_file
from tests.fleet.broker import MOSQUITTO, Peer, free_port

pytestmark = pytest.mark.anyio

DEADLINE_S = 90.0
NAMES = [f"box-{n}" for n in range(5)]

SERVE = """
import os, signal, sys
from pathlib import Path
from appliance.core.hub_settings import HubSettings
from appliance.hub.rollout_store import SqliteRollouts
from appliance.hub.rollouts import Rollouts
from appliance.hub.room import serve_hub

point, count = sys.argv[3], int(sys.argv[4])

def killing(function, after):
    async def call(*arguments, **options):
        global count
        count -= 1
        due = count == 0
        if due and not after:
            os.kill(os.getpid(), signal.SIGKILL)
        result = await function(*arguments, **options)
        if due:
            os.kill(os.getpid(), signal.SIGKILL)
        return result
    return call

if point != "never":
    where, name, when = point.split(".")
    kind = {"store": SqliteRollouts, "part": Rollouts}[where]
    setattr(kind, name, killing(getattr(kind, name), when == "after"))
sys.exit(serve_hub(HubSettings(data_dir=Path(sys.argv[1]), broker_port=int(sys.argv[2]), port=0)))
"""


class Site:
    """A hub's folder, its broker, a signed release, and devices that know the hub."""

    def __init__(self, folder: Path) -> None:
        self.port = free_port()
        self.folder = folder
        self.settings = HubSettings(data_dir=folder, broker_port=self.port)
        init_hub(self.settings, HubDocument("localhost", self.port), SystemClock())
        release = Release("m", "2", 1, "gguf", "chat", "MIT", (ReleaseFile("model", 1, "0" * 64),))
        self.authority = Authority(folder, SystemClock())
        self.authority.change_targets({release_target("m", 1): msgspec.json.encode(release)})
        with closing(Database(self.settings.database_path, migrations=MIGRATIONS)) as database:
            devices = SqliteDevices(database, GroupedWrites(database), SystemClock())
            for name in NAMES:
                asyncio.run(devices.expect(name))

    def options(self, device: str) -> ConnectionOptions:
        key, request = new_request(device)
        certificate = load_authority(self.settings).device(device, request, time.time())
        write_file(self.folder / f"{device}.pem", key + certificate)
        path = self.folder / f"{device}.pem"
        return ConnectionOptions("localhost", self.port, device, TlsFiles(self.settings.authority_path, path, path))

    def job(self, message: Message) -> Job:
        keys = [PublicKey(each) for each in director_keys(self.authority).keys]
        return msgspec.json.decode(open_envelope(message.payload, JOB_TYPE, keys), type=Job)

    def run(self, *arguments: str) -> Any:
        result = CliRunner().invoke(rollouts, [*arguments, "--json", "--data", str(self.folder)])
        assert result.exit_code == 0, result.output
        return json.loads(result.stdout)

    def refused(self, *arguments: str) -> str:
        result = CliRunner().invoke(rollouts, [*arguments, "--data", str(self.folder)])
        assert result.exit_code != 0
        return result.stderr

    @asynccontextmanager
    async def broker(self) -> AsyncIterator[None]:
        assert MOSQUITTO is not None
        configuration = str(HubFiles.of(self.settings).configuration)
        with (self.folder / "broker.log").open("wb") as log:
            process = await asyncio.create_subprocess_exec(MOSQUITTO, "-c", configuration, stderr=log)
        try:
            yield
        finally:
            process.terminate()
            await process.wait()

    async def hub(self, point: str = "never", count: int = 0) -> asyncio.subprocess.Process:
        with (self.folder / "hub.log").open("ab") as log:
            return await asyncio.create_subprocess_exec(
                sys.executable, "-c", SERVE, str(self.folder), str(self.port), point, str(count), stderr=log
            )


@pytest.fixture
def site(tmp_path: Path) -> Site:
    return Site(tmp_path / "hub")


async def devices_of(site: Site, stack: AsyncExitStack) -> dict[str, Peer]:
    peers = {name: Peer(site.options(name), f"ea/1/dn/{name}/job") for name in NAMES}
    for each in peers.values():
        await stack.enter_async_context(each)
    return peers


async def test_a_hub_killed_between_decision_and_publish_loses_no_job_and_doubles_none(site: Site) -> None:
    begun = site.run("start", "m:2", "--canary", "1.0")
    async with asyncio.timeout(DEADLINE_S), site.broker(), AsyncExitStack() as stack:
        peers = await devices_of(site, stack)
        points = [
            ("store.settle.before", 1),
            ("store.settle.after", 1),
            ("store.give_jobs.after", 1),
            ("part._send.before", 3),
            ("part._send.after", 2),
            ("store.sent.before", 1),
        ]
        for point, count in points:
            process = await site.hub(point, count)
            assert await process.wait() == -signal.SIGKILL, point
        process = await site.hub()
        try:
            for name, peer in peers.items():
                jobs = [site.job(await peer.next(30.0))]
                while not peer.received.empty():
                    jobs.append(site.job(peer.received.get_nowait()))
                assert {(each.device, each.version, each.id) for each in jobs} == {(name, 1, f"{begun['id']}.1")}
                report = JobReport(jobs[0].id, 1, 1, 1, "confirmed")
                await peer.link.publish(Message(f"ea/1/up/{name}/job/{report.job}", msgspec.json.encode(report)))
            while any(each["state"] != "succeeded" for each in site.run("show", begun["id"])["devices"]):  # noqa: ASYNC110
                await asyncio.sleep(0.1)
        finally:
            process.terminate()
            await process.wait()
    shown = site.run("show", begun["id"])
    assert [each["device"] for each in shown["devices"]] == NAMES
    assert [each["step"] for each in shown["timeline"]][:2] == ["begin", "wave 0: 5 devices"]


async def test_an_abort_on_the_command_line_reaches_the_devices_of_a_running_hub(site: Site) -> None:
    begun = site.run("start", "m", "--canary", "1.0")
    async with asyncio.timeout(DEADLINE_S), site.broker(), AsyncExitStack() as stack:
        peers = await devices_of(site, stack)
        process = await site.hub()
        try:
            installs = {name: site.job(await peer.next(30.0)) for name, peer in peers.items()}
            assert {each.action for each in installs.values()} == {"install"}
            assert site.run("abort", begun["id"], "--reason", "wrong model")["state"] == "aborted"
            for peer in peers.values():
                cancel = site.job(await peer.next(30.0))
                while cancel.action == "install":  # the broker sends what it keeps as often as the hub says it
                    cancel = site.job(await peer.next(30.0))
                assert (cancel.action, cancel.version) == ("cancel", 2)
        finally:
            process.terminate()
            await process.wait()


def test_a_rollout_is_begun_shown_and_ended_on_the_command_line(site: Site) -> None:
    assert site.run("list") == []
    assert "no release 'n'" in site.refused("start", "n")
    assert "no window" in site.refused("start", "m", "--window", "5")
    assert "group 'x'" in site.refused("start", "m", "--to", "x")
    assert "box-99" in site.refused("start", "m", "--device", "box-99")
    assert site.run("list") == [], "nothing was begun"
    begun = site.run("start", "m:2", "--window", "01:00-05:00", "--device", "box-1")
    assert (begun["state"], begun["counter"], begun["audience"]["devices"]) == ("running", 1, ["box-1"])
    assert "is running" in site.refused("start", "m:2")
    assert "is running" in site.refused("resume", begun["id"])
    assert site.run("pause", begun["id"])["state"] == "paused"
    assert site.run("resume", begun["id"], "--reason", "looked")["state"] == "running"
    assert site.run("abort", begun["id"], "--recall")["state"] == "aborted"
    assert "is aborted" in site.refused("pause", begun["id"])
    shown = site.run("show", begun["id"])
    assert [each["step"] for each in shown["timeline"]] == ["begin", "pause", "resume", "recall"]
    assert shown["timeline"][2]["reason"] == "looked"
    text = CliRunner().invoke(rollouts, ["show", begun["id"], "--data", str(site.folder)]).stdout
    assert "is aborted" in text
    assert "looked" in text
