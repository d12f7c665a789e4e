"""A small hub on a real broker: it answers questions from a signed repository, wants things, and sends commands."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

import msgspec

from appliance.core.clock import SystemClock
from appliance.core.errors import UnavailableError
from appliance.core.fleet import (
    HUB_TOPIC,
    Answer,
    Command,
    CommandResult,
    Desired,
    DeviceState,
    HubState,
    Question,
    Reported,
    TelemetryAck,
    TelemetryBatch,
    down,
)
from appliance.core.messaging import Message
from appliance.core.releases import DESIRED_TYPE
from appliance.fleet.identity import HubAddress
from appliance.hub.authority import Authority
from appliance.hub.director import Director
from appliance.messaging.compression import decompress
from appliance.security.certificates import HUB_NAME
from appliance.security.repository_files import read_slice
from tests.fleet.broker import Broker, Peer

DEADLINE_S = 60.0


class SmallHub:
    """Use it as `async with`.

    Attributes:
        states: Of the device, as they came.
        reports: Its reported twins.
        results: Its answers to commands, with their correlation.
        batches: Of its telemetry by stream; each is acknowledged.
        questions: Kinds of what it asked.
        answering: Whether questions are answered.
    """

    def __init__(self, broker: Broker, folder: Path, device: str) -> None:
        self.device = device
        self.broker = broker
        self.states: list[DeviceState] = []
        self.reports: list[Reported] = []
        self.results: list[tuple[bytes, CommandResult]] = []
        self.batches: dict[str, list[TelemetryBatch]] = {}
        self.questions: list[str] = []
        self.answering = True
        self._folder = folder
        if not folder.exists():
            folder.mkdir()
            Authority(folder, SystemClock()).create()
        self.authority = Authority(folder, SystemClock())
        self.peer = Peer(broker.options(HUB_NAME), f"ea/1/up/{device}/#")
        self._news = asyncio.Event()

    def enrol(self, data: Path, *, instance: str = "0123456789abcdef", port: int = 0) -> None:
        """Write what an enrolment leaves in a data folder, with a certificate made by hand."""
        folder = data / "fleet"
        folder.mkdir(parents=True)
        files = self.broker.device(self.device)
        (folder / "instance").write_text(instance)
        (folder / "authority.pem").write_bytes(files.authority.read_bytes())
        (folder / "root.json").write_bytes(self.authority.root())
        address = HubAddress(self.device, "localhost", port or self.broker.port)
        (folder / "hub.json").write_bytes(msgspec.json.encode(address))
        (folder / "credentials.pem").write_bytes(files.key.read_bytes() + files.certificate.read_bytes())

    async def __aenter__(self) -> Self:
        await self.peer.__aenter__()
        self._task = asyncio.get_running_loop().create_task(self._serve())
        return self

    async def __aexit__(self, *rest: object) -> None:
        self._task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._task
        await self.peer.__aexit__(*rest)

    async def until(self, true: Callable[[], object]) -> None:
        """Wait until something is so that the device's messages tell."""
        async with asyncio.timeout(DEADLINE_S):
            while not true():
                self._news.clear()
                await self._news.wait()

    async def desire(self, desired: Desired) -> None:
        """Sign and send a desired twin, kept by the broker."""
        envelope = Director(self.authority).sign(msgspec.json.encode(desired), DESIRED_TYPE)
        await self.send(Message(down(self.device, "des"), envelope, retain=True))

    async def command(self, name: str, *, id: str = "", life_s: float = 60.0, **arguments: Any) -> CommandResult:  # noqa: A002
        """Send a command and return its result."""
        correlation = await self.ask(name, id=id, life_s=life_s, **arguments)
        await self.until(lambda: correlation in dict(self.results))
        return dict(self.results)[correlation]

    async def ask(self, name: str, *, id: str = "", life_s: float = 60.0, **arguments: Any) -> bytes:  # noqa: A002
        """Send a command; return the correlation that its result will have."""
        correlation = secrets.token_bytes(8)
        command = Command(id or f"c-{correlation.hex()}", name, arguments, time.time() + life_s)
        await self.send(
            Message(down(self.device, "cmd"), msgspec.json.encode(command), expiry_s=300, correlation=correlation)
        )
        return correlation

    async def say(self, state: HubState) -> None:
        """Say on `all/hub` how the hub is."""
        await self.send(Message(HUB_TOPIC, msgspec.json.encode(state), retain=True))

    async def send(self, message: Message) -> None:
        await self.peer.link.publish(message)

    async def _serve(self) -> None:
        while True:
            message = await self.peer.received.get()
            kind = message.topic.split("/")[4]
            if kind == "state":
                self.states.append(msgspec.json.decode(message.payload, type=DeviceState))
            elif kind == "rep":
                self.reports.append(msgspec.json.decode(message.payload, type=Reported))
            elif kind == "res":
                result = msgspec.json.decode(message.payload, type=CommandResult)
                self.results.append((message.correlation or b"", result))
            elif kind == "tm":
                await self._take(message)
            elif kind == "req":
                await self._answer(message)
            self._news.set()

    async def _take(self, message: Message) -> None:
        batch = msgspec.json.decode(decompress(message.payload), type=TelemetryBatch)
        self.batches.setdefault(batch.stream, []).append(batch)
        ack = TelemetryAck(batch.stream, batch.boot, batch.last, batch.first)
        with contextlib.suppress(UnavailableError):
            await self.send(Message(down(self.device, "ack"), msgspec.json.encode(ack), qos=0))

    async def _answer(self, message: Message) -> None:
        question = msgspec.json.decode(message.payload, type=Question)
        self.questions.append(question.kind)
        if not self.answering:
            return
        if question.kind == "file":
            answer = read_slice(self.authority.repository.folder, question.path, question.offset, now=time.time())
        else:
            answer = Answer(ok=question.kind == "time", now=time.time())
        payload = msgspec.msgpack.encode(answer)
        with contextlib.suppress(UnavailableError):  # the broker is gone, and the device asks again
            await self.send(Message(down(self.device, "res"), payload, correlation=message.correlation))
