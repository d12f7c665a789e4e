"""The operator's path with real programs: make a hub, start its broker, enrol a box, revoke it."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from appliance.core.errors import UnavailableError
from appliance.core.hub_settings import HubSettings
from appliance.fleet.enrolment import while_connected
from appliance.fleet.identity import IdentityFolder
from appliance.hub.init import HubFiles
from appliance.messaging.connection import Connection, ConnectionOptions, TlsFiles
from appliance.messaging.session import Session
from tests.fleet.broker import MOSQUITTO, free_port

pytestmark = pytest.mark.anyio

DEADLINE_S = 60.0


async def appliance(*arguments: str, fails: bool = False) -> str:
    """Run the command line and return what it printed."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "appliance", *arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    output, errors = await process.communicate()
    assert (process.returncode != 0) == fails, errors.decode()
    return (errors if fails else output).decode()


SERVE = """
import sys
from pathlib import Path
from appliance.core.hub_settings import HubSettings
from appliance.hub.room import serve_hub

sys.exit(serve_hub(HubSettings(data_dir=Path(sys.argv[1]), broker_port=int(sys.argv[2]), port=0)))
"""


@asynccontextmanager
async def hub_and_broker(folder: Path) -> AsyncIterator[None]:
    port = free_port()
    await appliance("hub", "init", "--name", "localhost", "--data", str(folder), "--broker-port", str(port))
    files = HubFiles.of(HubSettings(data_dir=folder))
    assert MOSQUITTO is not None
    with (folder / "log").open("wb") as log:
        broker = await asyncio.create_subprocess_exec(MOSQUITTO, "-c", str(files.configuration), stderr=log)
        files.broker_process.write_text(str(broker.pid))
        hub = await asyncio.create_subprocess_exec(sys.executable, "-c", SERVE, str(folder), str(port), stderr=log)
    try:
        yield
    finally:
        for process in (hub, broker):
            process.terminate()
            await process.wait()


def box_options(folder: Path) -> ConnectionOptions:
    identity = IdentityFolder(folder / "fleet").identity()
    assert identity is not None
    tls = TlsFiles(identity.authority, identity.credentials, identity.credentials)
    return ConnectionOptions(identity.host, identity.port, identity.device, tls, timeout_s=5.0)


async def connects(options: ConnectionOptions) -> bool:
    try:
        session = await Session.open(options, None, lambda *_: None)
    except UnavailableError:
        return False
    await asyncio.sleep(0)
    session.close(with_will=False)
    return True


async def test_a_hub_is_made_a_box_enrolled_approved_and_revoked(tmp_path: Path) -> None:
    hub_flags = ("--data", str(tmp_path / "hub"))
    box_flags = ("--data", str(tmp_path / "box"))
    async with asyncio.timeout(DEADLINE_S), hub_and_broker(tmp_path / "hub"):
        claim = str(tmp_path / "claim.json")
        await appliance("hub", "ca", "claim", claim, *hub_flags)
        enrolling = asyncio.gather(appliance("fleet", "enrol", claim, "--id", "box-7", "--json", *box_flags))
        while '"waiting"' not in await appliance("hub", "ca", "list", "--json", *hub_flags):  # noqa: ASYNC110
            await asyncio.sleep(0.1)
        await appliance("hub", "devices", "approve", "box-7", *hub_flags)
        [printed] = await enrolling
        assert json.loads(printed)["device"] == "box-7"

        status = json.loads(await appliance("fleet", "status", "--json", *box_flags))
        assert (status["enrolled"], status["enrolling"], status["device"]) == (True, None, "box-7")
        assert "'box-7' at localhost" in await appliance(
            "fleet", "enrol", claim, "--id", "other", *box_flags, fails=True
        )

        options = box_options(tmp_path / "box")
        connection = Connection(options, _nothing)
        await while_connected(connection, _now)
        assert "The broker was told" in await appliance("hub", "ca", "revoke", "box-7", "--reason", "lost", *hub_flags)
        while await connects(options):  # noqa: ASYNC110  (the broker reads the list when it comes to it)
            await asyncio.sleep(0.05)
        await appliance("fleet", "leave", *box_flags)
        assert json.loads(await appliance("fleet", "status", "--json", *box_flags))["enrolled"] is False


async def _nothing(_: object) -> None:
    """Take a message."""


async def _now() -> None:
    """Connecting was all."""


async def test_a_bundle_that_is_none_changes_nothing_on_the_box(tmp_path: Path) -> None:
    (tmp_path / "claim.json").write_text("{}")
    error = await appliance("fleet", "enrol", str(tmp_path / "claim.json"), "--data", str(tmp_path / "box"), fails=True)
    assert "no claim bundle" in error
    assert not (tmp_path / "box" / "fleet").exists()
