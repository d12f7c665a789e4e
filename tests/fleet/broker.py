"""A real mosquitto with the configuration that `appliance hub init` writes, on a free port in a temporary folder.

`broker` is a fixture; `conftest.py` of each room that needs it imports it.
"""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Self

import pytest

from appliance.core.messaging import Message, Subscription
from appliance.hub.broker import ACCESS, DATA, BrokerFiles, BrokerSettings, write_broker
from appliance.messaging.connection import Connection, ConnectionOptions, TlsFiles, Will
from appliance.security.certificates import CLAIM_NAME, HUB_NAME, Authority, certificate_facts, new_request
from appliance.store.files import write_durably

MOSQUITTO = shutil.which("mosquitto") or shutil.which("mosquitto", path="/usr/sbin:/usr/local/sbin")
START_S = 10.0


class Broker:
    """Mosquitto, its authority, and the identities of those who connect to it.

    Attributes:
        folder: The broker's.
        authority: Signs every certificate here.
        port: For TLS; stays the same over a restart.
        plain_port: Without TLS and without certificates, on the loopback, where `plain` was asked for; otherwise 0.
    """

    def __init__(self, folder: Path, *, plain: bool = False, settings: BrokerSettings | None = None) -> None:
        self.folder = folder
        self.authority = Authority.create("Fleet of a test", time.time())
        self.port = free_port()
        self.plain_port = free_port() if plain else 0
        self._settings = replace(settings or BrokerSettings(), port=self.port, address="127.0.0.1")
        self._process: subprocess.Popen[bytes] | None = None
        self._revoked: dict[int, float] = {}
        self.files = BrokerFiles(
            authority=folder / "authority.crt",
            certificate=folder / "broker.crt",
            key=folder / "broker.key",
            revoked=folder / "revoked.crl",
        )
        server = self.authority.server(["localhost", "127.0.0.1"], time.time())
        write_durably(self.files.authority, self.authority.identity.certificate)
        write_durably(self.files.certificate, server.certificate)
        write_durably(self.files.key, server.key, mode=0o600)
        self._write_revocations()
        self.configuration = write_broker(folder, self.files, self._settings)
        if plain:
            self._add_plain_listener()

    def start(self) -> None:
        """Start the broker and wait until it listens."""
        assert MOSQUITTO is not None, "mosquitto is not installed; on Debian: apt-get install mosquitto"
        with (self.folder / "mosquitto.log").open("ab") as log:
            self._process = subprocess.Popen([MOSQUITTO, "-c", str(self.configuration)], stderr=log, stdout=log)
        for port in (self.port, self.plain_port):
            if port:
                self._wait_for(port)

    def stop(self, how: int = signal.SIGTERM) -> None:
        """Stop the broker and wait until it is gone."""
        if self._process is not None:
            self._process.send_signal(how)
            self._process.wait(timeout=30)
            self._process = None

    def restart(self, *, memory: bool = True) -> None:
        """Stop and start the broker; without memory it is as if its disk had been changed."""
        self.stop()
        if not memory:
            shutil.rmtree(self.folder / DATA)
            (self.folder / DATA).mkdir()
        self.start()

    def reload(self) -> None:
        """Let the broker read revocations and ACL anew."""
        assert self._process is not None
        self._process.send_signal(signal.SIGHUP)

    @property
    def pid(self) -> int:
        """Return the broker's process id."""
        assert self._process is not None
        return self._process.pid

    def log(self) -> str:
        """Return what the broker has logged so far."""
        return (self.folder / "mosquitto.log").read_text(encoding="utf-8", errors="replace")

    def device(self, device: str) -> TlsFiles:
        """Return the files of a device, made at the first call; the same certificate is returned by the next."""
        if not (self.folder / f"{device}.crt").exists():
            key, request = new_request(device)
            self._write(device, self.authority.device(device, request, time.time()), key)
        return self._tls(device)

    def hub(self) -> TlsFiles:
        """Return the files of the hub."""
        return self._client(HUB_NAME)

    def claim(self) -> TlsFiles:
        """Return the files of a claim."""
        return self._client(CLAIM_NAME)

    def revoke(self, device: str) -> None:
        """Revoke a device's certificate and let the broker know."""
        facts = certificate_facts((self.folder / f"{device}.crt").read_bytes())
        self._revoked[facts.serial] = time.time()
        self._write_revocations()
        self.reload()

    def options(self, name: str) -> ConnectionOptions:
        """Return how `name` connects: a device by its id, HUB_NAME, or CLAIM_NAME."""
        files = {HUB_NAME: self.hub, CLAIM_NAME: self.claim}.get(name, lambda: self.device(name))()
        return ConnectionOptions(host="localhost", port=self.port, client_id=name, tls=files, timeout_s=5.0)

    def _client(self, name: str) -> TlsFiles:
        if not (self.folder / f"{name}.crt").exists():
            identity = self.authority.client(name, time.time())
            self._write(name, identity.certificate, identity.key)
        return self._tls(name)

    def _write(self, name: str, certificate: bytes, key: bytes) -> None:
        write_durably(self.folder / f"{name}.key", key, mode=0o600)
        write_durably(self.folder / f"{name}.crt", certificate)

    def _tls(self, name: str) -> TlsFiles:
        return TlsFiles(self.files.authority, self.folder / f"{name}.crt", self.folder / f"{name}.key")

    def _write_revocations(self) -> None:
        write_durably(self.files.revoked, self.authority.revocations(self._revoked, time.time()))

    def _add_plain_listener(self) -> None:
        text = self.configuration.read_text(encoding="utf-8").replace("allow_anonymous false", "allow_anonymous true")
        text += f"listener {self.plain_port} 127.0.0.1\nmax_topic_alias 0\n"
        self.configuration.write_text(text, encoding="utf-8")
        access = self.folder / ACCESS  # whoever has no certificate has no name, but a client id
        patterns = "pattern write ea/1/up/%c/#\npattern read ea/1/dn/%c/#\n"
        access.write_text(access.read_text(encoding="utf-8") + patterns, encoding="utf-8")

    def _wait_for(self, port: int) -> None:
        deadline = time.monotonic() + START_S
        while True:
            try:
                socket.create_connection(("127.0.0.1", port), timeout=1.0).close()
            except ConnectionRefusedError:
                assert self._process is not None
                assert self._process.poll() is None, f"the broker ended at once:\n{self.log()}"
                assert time.monotonic() < deadline, f"the broker does not listen on {port}:\n{self.log()}"
                time.sleep(0.01)
            else:
                return


def free_port() -> int:
    """Return a TCP port on which nobody listened a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@pytest.fixture
def broker(tmp_path: Path) -> Iterator[Broker]:
    """Return a broker that runs."""
    folder = tmp_path / "broker"
    folder.mkdir()
    broker = Broker(folder)
    broker.start()
    yield broker
    broker.stop()


class Peer:
    """Whoever connects to the broker in a test, with what he received.

    Use it as `async with`; it runs its connection in a task of its own.
    """

    def __init__(
        self,
        options: ConnectionOptions,
        *topics: str,
        will: Callable[[], Will] | None = None,
        uniform: Callable[[], float] = lambda: 0.0,
    ) -> None:
        self.received: asyncio.Queue[Message] = asyncio.Queue()
        self.link = Connection(
            options,
            self.received.put,
            subscriptions=[Subscription(topic) for topic in topics],
            will=will,
            uniform=uniform,
        )

    async def __aenter__(self) -> Self:
        self._task = asyncio.get_running_loop().create_task(self.link.run())
        async with asyncio.timeout(20):
            await self.link.until_connected()
        return self

    async def __aexit__(self, *_: object) -> None:
        self._task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._task

    async def next(self, timeout_s: float = 10.0) -> Message:
        """Return the next message, or fail."""
        async with asyncio.timeout(timeout_s):
            return await self.received.get()
