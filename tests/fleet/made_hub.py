"""A hub as `appliance hub init` makes it, with the broker that it configures, both running, and boxes of its own."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from appliance.core.clock import SystemClock
from appliance.core.hub_settings import HubSettings
from appliance.fleet.enrolment import Pauses, begin, enrol
from appliance.fleet.identity import Identity, IdentityFolder
from appliance.hub.claims import make_bundle
from appliance.hub.enrolments import SqliteEnrolments
from appliance.hub.init import HubDocument, HubFiles, init_hub
from appliance.hub.room import Hub
from appliance.hub.schema import MIGRATIONS
from appliance.messaging.connection import ConnectionOptions, TlsFiles
from appliance.store.database import Database
from tests.fleet.broker import MOSQUITTO, free_port
from tests.hub.hubs import running_hub, until

QUICK = Pauses(0.01, 0.2)


@dataclass(slots=True)
class MadeHub:
    """A hub that runs in this process.

    Attributes:
        settings: Its folder.
        hub: Itself.
        enrolments: As the command line uses them, beside it.
    """

    settings: HubSettings
    hub: Hub
    enrolments: SqliteEnrolments

    async def enrol(self, folder: Path, device: str) -> Identity:
        """Enrol one box whose data is in a folder."""
        clock = SystemClock()
        _, bundle = make_bundle(
            self.settings, self.enrolments, uses=1, days=1.0, automatic=True, actor="test", clock=clock
        )
        identity = IdentityFolder(folder)
        pending = begin(identity, device, bundle)
        assert pending is not None
        return await enrol(identity, pending, facts={}, clock=clock, pauses=QUICK)


@asynccontextmanager
async def made_hub(folder: Path, **changes: Any) -> AsyncIterator[MadeHub]:
    """Make a hub in a folder, and run its broker and it until the block ends."""
    port = free_port()
    settings = HubSettings(data_dir=folder, broker_port=port, port=0, **changes)
    init_hub(settings, HubDocument("localhost", port), SystemClock())
    async with mosquitto(settings), running_hub(settings) as hub:
        with closing(Database(settings.database_path, migrations=MIGRATIONS)) as database:
            yield MadeHub(settings, hub, SqliteEnrolments(database))


@asynccontextmanager
async def mosquitto(settings: HubSettings) -> AsyncIterator[None]:
    """Run the broker of a hub's folder, and note its process as README's command does."""
    files = HubFiles.of(settings)
    assert MOSQUITTO is not None, "mosquitto is not installed; on Debian: apt-get install mosquitto"
    with (files.broker_folder / "log").open("wb") as log:
        process = await asyncio.create_subprocess_exec(
            MOSQUITTO, "-c", str(files.configuration), stdout=log, stderr=log
        )
    try:
        files.broker_process.write_text(str(process.pid))
        await until(lambda: _listens(settings.broker_port), "the broker listens")
        yield
    finally:
        process.terminate()
        await process.wait()


def _listens(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), timeout=1.0).close()
    except ConnectionRefusedError:
        return False
    return True


def options_of(identity: Identity) -> ConnectionOptions:
    """Return how an enrolled box connects."""
    tls = TlsFiles(identity.authority, identity.credentials, identity.credentials)
    return ConnectionOptions(
        identity.host, identity.port, identity.device, tls, clean_start=False, session_expiry_s=3600
    )


async def soon(awaitable: Any, deadline_s: float = 60.0) -> Any:
    """Wait for something, but not for ever."""
    async with asyncio.timeout(deadline_s):
        return await awaitable
