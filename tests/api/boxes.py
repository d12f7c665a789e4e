"""Appliances that really listen, on a scripted serving floor or on the whole house with a tiny model."""

from __future__ import annotations

import asyncio
import json
import ssl
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import anyio.to_thread
import urllib3

from appliance.agents.registry import ToolRegistry
from appliance.agents.responder import Responder, loop_limits
from appliance.api.app import create_app
from appliance.api.offline import KeyHolders, offline_door
from appliance.batches.room import open_batches
from appliance.batches.runner import BatchRunner
from appliance.core.batches import Callers, OfflineDoor
from appliance.core.clock import Clock, SystemClock
from appliance.core.retrieval import Files
from appliance.core.settings import Settings
from appliance.engine.cpu_budget import CpuBudget
from appliance.observe.metrics import Metrics
from appliance.registry.install import import_model
from appliance.registry.versions import open_registry
from appliance.registry.wishes import Wishes
from appliance.security.keys import KeyStore
from appliance.serving.floor import ServingFloor
from appliance.sessions.context import Budget
from appliance.sessions.room import Sessions, open_sessions
from appliance.store.database import Database
from appliance.web.disconnect import task_group
from appliance.web.server import HttpServer
from tests.api.scripted import (
    ScriptedClassifiers,
    ScriptedEmbedding,
    ScriptedHealth,
    ScriptedModels,
    ScriptedTuning,
    ScriptedVersions,
)
from tests.api.scripted_retrieval import ScriptedFiles, ScriptedStores
from tests.api.scripted_tensors import ScriptedTensors

DEADLINE_S = 30.0


@dataclass(frozen=True, slots=True)
class Reply:
    """An answer, read to its end."""

    status: int
    headers: urllib3.HTTPHeaderDict
    body: bytes

    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def inference_error(self) -> str:
        """The text of an error under /v2, which must have the one shape that clients know."""
        document = self.json()
        assert set(document) == {"error"}
        text: str = document["error"]
        assert text
        return text

    @property
    def error(self) -> dict[str, Any]:
        """The error object, which must have the one shape that clients know."""
        document = self.json()
        assert set(document) == {"error"}
        error: dict[str, Any] = document["error"]
        assert set(error) == {"message", "type", "param", "code"}
        assert error["message"]
        assert error["code"]
        return error


@dataclass(slots=True)
class Box:
    """An appliance that listens on 127.0.0.1.

    Attributes:
        model: A model that answers.
    """

    port: int
    server: HttpServer
    model: str = "tiny"
    pool: urllib3.PoolManager = field(default_factory=lambda: urllib3.PoolManager(retries=False))

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    async def ask(
        self,
        method: str,
        path: str,
        document: Any = None,
        *,
        body: bytes | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> Reply:
        """Send one request and read the whole answer."""
        if document is not None:
            body = json.dumps(document).encode()
        sent = {"content-type": "application/json"} if body is not None else {}
        sent |= dict(headers or {})

        def request() -> Reply:
            response = self.pool.request(method, self.url + path, body=body, headers=sent, timeout=DEADLINE_S)
            return Reply(response.status, response.headers, response.data)

        return await anyio.to_thread.run_sync(request)

    async def chat(self, text: str = "Hello", **fields: Any) -> Reply:
        """Send a chat completion request."""
        messages = [{"role": "user", "content": text}]
        return await self.ask("POST", "/v1/chat/completions", {"model": self.model, "messages": messages, **fields})

    async def complete(self, prompt: Any = "Hello", **fields: Any) -> Reply:
        """Send a text completion request."""
        return await self.ask("POST", "/v1/completions", {"model": self.model, "prompt": prompt, **fields})


@dataclass(slots=True)
class ScriptedBox(Box):
    """A box whose serving floor, keys, metrics and health are in the test's hands."""

    models: ScriptedModels = field(default_factory=ScriptedModels)
    embedding: ScriptedEmbedding = field(default_factory=ScriptedEmbedding)
    classifiers: ScriptedClassifiers = field(default_factory=ScriptedClassifiers)
    tensors: ScriptedTensors = field(default_factory=ScriptedTensors)
    files: ScriptedFiles = field(default_factory=ScriptedFiles)
    stores: ScriptedStores = field(default_factory=lambda: ScriptedStores(ScriptedFiles()))
    tuning: ScriptedTuning = field(default_factory=ScriptedTuning)
    versions: ScriptedVersions = field(default_factory=ScriptedVersions)
    health: ScriptedHealth = field(default_factory=ScriptedHealth)
    metrics: Metrics = field(default_factory=Metrics)
    keys: KeyStore | None = None
    sessions: Sessions | None = None
    agents: Responder | None = None


@asynccontextmanager
async def listening(server: HttpServer, deadline_s: float = DEADLINE_S) -> AsyncIterator[int]:
    """Run a server and yield its port; on leaving it stops, and whatever is still open is cut."""
    port: asyncio.Future[int] = asyncio.get_running_loop().create_future()
    async with asyncio.timeout(deadline_s), task_group() as tasks:
        tasks.create_task(server.serve(port.set_result))  # a failure to listen cancels what follows
        try:
            yield await port
        finally:
            server.stop()
            server.abort()


def settings_with(folder: Path, **changes: Any) -> Settings:
    """Return settings for a test: a free port, and no model but on demand."""
    return replace(Settings(), **{"data_dir": folder, "port": 0, "model": "", **changes})


@asynccontextmanager
async def answering(
    settings: Settings, models: Any, metrics: Metrics, sessions: Sessions, tools: ToolRegistry | None = None
) -> AsyncIterator[Responder]:
    """Run what answers `/v1/responses`."""
    async with task_group() as tasks:
        agents = Responder(
            models=models,
            idle=models,
            conversations=sessions.conversations,
            responses=sessions.responses,
            tools=tools or ToolRegistry({}),
            metrics=metrics.responses,
            clock=SystemClock(),
            limits=loop_limits(settings),
            context=Budget(),
            most_in_background=settings.max_background_responses,
        )
        running = tasks.create_task(agents.run())
        try:
            yield agents
        finally:
            running.cancel()


@asynccontextmanager
async def working_off(
    settings: Settings,
    clock: Clock,
    *,
    files: Files,
    door: OfflineDoor,
    callers: Callers,
    metrics: Metrics,
) -> AsyncIterator[BatchRunner]:
    """Run what answers `/v1/batches`."""
    async with (
        open_batches(settings, clock, files=files, door=door, callers=callers, metrics=metrics.batches) as batches,
        task_group() as tasks,
    ):
        assert isinstance(batches, BatchRunner), "nobody else has the folder"
        running = tasks.create_task(batches.run())
        try:
            yield batches
        finally:
            running.cancel()


@asynccontextmanager
async def scripted_box(
    folder: Path, deadline_s: float = DEADLINE_S, tools: Any = None, **changes: Any
) -> AsyncIterator[ScriptedBox]:
    """Run the real door over a scripted serving floor."""
    settings = settings_with(folder, **changes)
    models, health, metrics, versions = ScriptedModels(), ScriptedHealth(), Metrics(), ScriptedVersions()
    async with AsyncExitStack() as stack:
        database = Database(folder / "appliance.db")
        stack.callback(database.close)
        sessions = await stack.enter_async_context(open_sessions(settings, SystemClock(), forget=models.forget))
        assert isinstance(sessions, Sessions), "nobody else has the folder"
        agents = await stack.enter_async_context(answering(settings, models, metrics, sessions, tools))
        keys = KeyStore(database, SystemClock())
        tuning, embedding = ScriptedTuning(), ScriptedEmbedding()
        classifiers, tensors = ScriptedClassifiers(), ScriptedTensors()
        files = ScriptedFiles(settings.max_file_bytes)
        stores = ScriptedStores(files)
        batches = await stack.enter_async_context(
            working_off(
                settings,
                SystemClock(),
                files=files,
                door=offline_door(
                    settings,
                    text_models=models,
                    embedding_models=embedding,
                    classifiers=classifiers,
                    agents=agents,
                    conversations=sessions.conversations,
                ),
                callers=KeyHolders(settings, keys),
                metrics=metrics,
            )
        )
        app = create_app(
            settings=settings,
            text_models=models,
            embedding_models=embedding,
            classifiers=classifiers,
            tensor_models=tensors,
            files=files,
            vector_stores=stores,
            conversations=sessions.conversations,
            agents=agents,
            batches=batches,
            tunable_models=tuning,
            versions=versions,
            keys=keys,
            metrics=metrics,
            health=health,
        )
        server = HttpServer(app, settings)
        async with listening(server, deadline_s) as port:
            box = ScriptedBox(
                port,
                server,
                models=models,
                embedding=embedding,
                classifiers=classifiers,
                tensors=tensors,
                files=files,
                stores=stores,
                tuning=tuning,
                versions=versions,
                health=health,
                metrics=metrics,
                keys=keys,
                sessions=sessions,
                agents=agents,
            )
            try:
                yield box
            finally:
                box.pool.clear()


@asynccontextmanager
async def real_box(
    folder: Path,
    model: Path,
    deadline_s: float = DEADLINE_S,
    *,
    encoder: Path | None = None,
    tools: ToolRegistry | None = None,
    **changes: Any,
) -> AsyncIterator[Box]:
    """Run the real door over the real serving floor with a tiny model, and an encoder, which first requests load."""
    sizes = {"context_cells": 512, "max_sequences": 4, "batch_tokens": 64}
    settings = settings_with(folder, threads=1, **(sizes | changes))
    metrics = Metrics()
    async with AsyncExitStack() as stack:
        database = Database(settings.database_path)
        stack.callback(database.close)
        registry = open_registry(settings, database)
        import_model(model, registry, name="tiny", licence="Apache-2.0")
        if encoder is not None:
            import_model(encoder, registry, name="encoder", licence="Apache-2.0")
        floor = ServingFloor(settings, registry, Wishes(database, registry), metrics, CpuBudget(2))
        sessions = await stack.enter_async_context(open_sessions(settings, SystemClock(), forget=floor.text.forget))
        assert isinstance(sessions, Sessions), "nobody else has the folder"
        agents = await stack.enter_async_context(answering(settings, floor.text, metrics, sessions, tools))
        keys = KeyStore(database, SystemClock())
        files = ScriptedFiles()
        batches = await stack.enter_async_context(
            working_off(
                settings,
                SystemClock(),
                files=files,
                door=offline_door(
                    settings,
                    text_models=floor.text,
                    embedding_models=floor.embedding,
                    classifiers=floor.classifiers,
                    agents=agents,
                    conversations=sessions.conversations,
                ),
                callers=KeyHolders(settings, keys),
                metrics=metrics,
            )
        )
        app = create_app(
            settings=settings,
            text_models=floor.text,
            embedding_models=floor.embedding,
            classifiers=floor.classifiers,
            tensor_models=floor.tensors,
            files=files,
            vector_stores=ScriptedStores(files),
            conversations=sessions.conversations,
            agents=agents,
            batches=batches,
            tunable_models=floor.tuning,
            versions=floor.versions,
            keys=keys,
            metrics=metrics,
            health=floor.models,
        )
        server = HttpServer(app, settings)
        async with task_group() as tasks:
            running = [tasks.create_task(run()) for run in floor.runs.values()]
            try:
                async with listening(server, deadline_s) as port:
                    box = Box(port, server)
                    yield box
                    box.pool.clear()
            finally:
                for each in running:
                    each.cancel()
                await floor.close()


@dataclass(slots=True)
class Wire:
    """One connection, byte by byte."""

    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter

    async def send(self, data: bytes) -> None:
        self.writer.write(data)
        await self.writer.drain()

    async def read_to_end(self) -> bytes:
        """Return everything up to the server's closing of the connection."""
        async with asyncio.timeout(DEADLINE_S):
            return await self.reader.read()

    async def read_until(self, mark: bytes) -> bytes:
        async with asyncio.timeout(DEADLINE_S):
            return await self.reader.readuntil(mark)

    async def read_reply(self) -> Reply:
        """Return one answer with a Content-Length; the connection may go on."""
        head = await self.read_until(b"\r\n\r\n")
        status_line, *lines = head.decode().strip().split("\r\n")
        headers = urllib3.HTTPHeaderDict((name, value) for name, _, value in (line.partition(": ") for line in lines))
        async with asyncio.timeout(DEADLINE_S):
            body = await self.reader.readexactly(int(headers["content-length"]))
        return Reply(int(status_line.split()[1]), headers, body)

    def close(self) -> None:
        self.writer.close()


@asynccontextmanager
async def wire(box: Box, tls: ssl.SSLContext | None = None) -> AsyncIterator[Wire]:
    """Open one TCP connection to a box, with TLS if a context is given."""
    reader, writer = await asyncio.open_connection("127.0.0.1", box.port, ssl=tls)
    try:
        yield Wire(reader, writer)
    finally:
        writer.close()


async def until(true: Callable[[], bool]) -> None:
    """Give the loop its turns until something is true."""
    async with asyncio.timeout(DEADLINE_S):
        while not true():  # noqa: ASYNC110  (what is waited for here is no event of ours)
            await asyncio.sleep(0)


def post(path: str, document: Any, *headers: str) -> bytes:
    """Return the bytes of a POST request."""
    body = json.dumps(document).encode()
    lines = [f"POST {path} HTTP/1.1", "Host: 127.0.0.1", "Content-Type: application/json", *headers]
    return "\r\n".join([*lines, f"Content-Length: {len(body)}", "", ""]).encode() + body


def events(body: bytes) -> list[Any]:
    """Return the documents of a stream's events; `[DONE]` stays text."""
    found: list[Any] = []
    for block in body.decode().split("\n\n"):
        if block.startswith("data: "):
            data = block.removeprefix("data: ")
            found.append(data if data == "[DONE]" else json.loads(data))
    return found
