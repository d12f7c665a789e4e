"""The one file that knows every room: builds them, connects them, starts and stops them.

One event loop, one TaskGroup; every task is named. A task that dies takes the process down with exit code 1, and
systemd starts it again. SIGTERM or Ctrl-C ends it in order: readiness turns red, no new connection is accepted, open
requests finish or are cut off after a limit, engines and databases close, exit code 0. A second signal cuts the wait
short.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import cast

import sdnotify
import uvloop

from appliance.agents.responder import Responder, loop_limits
from appliance.agents.room import open_tools
from appliance.api.app import create_app
from appliance.api.offline import KeyHolders, offline_door
from appliance.batches.room import open_batches
from appliance.batches.runner import BatchRunner
from appliance.core.agents import Agents
from appliance.core.batches import Batches
from appliance.core.clock import SystemClock
from appliance.core.errors import ApplianceError, errors_in
from appliance.core.sessions import Conversations
from appliance.core.settings import EffectiveSetting, Settings, effective_of
from appliance.engine.cpu_budget import THREADS_A_CORE, CpuBudget
from appliance.fleet.means import FleetMeans
from appliance.fleet.room import Fleet, open_fleet
from appliance.observe.allocator import collect_garbage_seldom, keep_freed_memory
from appliance.observe.logs import configure_logging
from appliance.observe.metrics import Metrics
from appliance.observe.resources import physical_cores
from appliance.registry.boot_guard import BootGuard
from appliance.registry.versions import open_registry
from appliance.registry.wishes import Wishes
from appliance.retrieval.documents import Documents
from appliance.retrieval.ownership import DocumentsElsewhere
from appliance.retrieval.room import open_documents
from appliance.security.keys import KeyStore
from appliance.serving.floor import ServingFloor
from appliance.serving.residency import ModelResidency
from appliance.sessions.context import Budget
from appliance.sessions.room import Sessions, open_sessions
from appliance.sessions.upkeep import Upkeep
from appliance.store.database import Database
from appliance.store.ownership import Elsewhere
from appliance.web.exposure import check_exposure
from appliance.web.server import HttpServer

LOGGER = logging.getLogger("appliance")
SWITCH_INTERVAL_S = 0.0002
"""How soon a thread that wants the GIL gets it: Python's 5 ms would delay engine or loop by as much, each time."""
BEAT_S = 1.0
"""How often systemd hears of us, at most; half its watchdog's limit if that is shorter."""

RESTART_CODE = 75
"""Exit code (EX_TEMPFAIL) that asks whoever watches over the process to start it again; systemd does so after any."""

LAST_WORDS_S = 3.0
"""Time for the error answers to reach their clients when an engine has died."""


@dataclass(slots=True)
class Appliance:
    """A running appliance: its parts and how to stop it.

    Attributes:
        port: The port that it listens on, 0 before `listening` is set.
        exit_code: Of the process, once it has ended in order.
    """

    settings: Settings
    floor: ServingFloor
    guard: BootGuard
    documents: Documents | DocumentsElsewhere
    upkeep: Upkeep | Elsewhere
    agents: Responder | Elsewhere
    batches: BatchRunner | Elsewhere
    server: HttpServer
    systemd: sdnotify.SystemdNotifier
    fleet: Fleet = field(init=False)
    port: int = 0
    exit_code: int = 0
    listening: asyncio.Event = field(default_factory=asyncio.Event)
    _stop: asyncio.Event = field(default_factory=asyncio.Event)
    _hurry: asyncio.Event = field(default_factory=asyncio.Event)

    def stop(self) -> None:
        """Begin an orderly stop; a second call stops waiting for open requests."""
        (self._hurry if self._stop.is_set() else self._stop).set()

    def restart(self) -> None:
        """Begin an orderly stop after which systemd starts the program again."""
        self.exit_code = RESTART_CODE
        if not self._stop.is_set():  # a stop that is under way is not hurried
            self.stop()

    async def run(self) -> None:
        """Serve until `stop`.

        Raises:
            BaseExceptionGroup: A task died.
        """
        async with asyncio.TaskGroup() as tasks:
            http = tasks.create_task(self.server.serve(self._on_listening), name="http")
            running = [
                tasks.create_task(self._run_models(http, run), name=name) for name, run in self.floor.runs.items()
            ]
            running.append(tasks.create_task(self.documents.run(), name="documents"))
            running.append(tasks.create_task(self.upkeep.run(), name="sessions"))
            running.append(tasks.create_task(self.agents.run(), name="responses"))
            running.append(tasks.create_task(self.batches.run(), name="batches"))
            running.append(tasks.create_task(self._tell_systemd(), name="systemd"))
            running.append(tasks.create_task(self.fleet.run(), name="fleet"))
            await self._stop.wait()
            LOGGER.info("stopping: open requests have %g s to end", self.settings.shutdown_grace_s)
            self.systemd.notify("STOPPING=1\nSTATUS=Stopping: open requests are finishing.")
            self._drain()
            await self._end_requests(http)
            await self.fleet.say_goodbye()
            self.guard.end_in_order()
            for each in running:
                each.cancel()

    def _drain(self) -> None:
        self.floor.drain()
        self.agents.drain()
        self.batches.drain()
        self.server.stop()

    async def _run_models(self, http: asyncio.Task[None], run: Callable[[], Awaitable[None]]) -> None:
        """Run the models; when one dies, let those who waited for it hear so before the process goes down."""
        try:
            await run()
        except ApplianceError:
            self._drain()
            await asyncio.wait({http}, timeout=LAST_WORDS_S)
            raise

    def _on_listening(self, port: int) -> None:
        self.port = port
        scheme = "https" if self.settings.tls_certificate else "http"
        LOGGER.info("listening on %s://%s:%d", scheme, self.settings.host, port)
        self.listening.set()

    async def _end_requests(self, http: asyncio.Task[None]) -> None:
        """Wait for the open requests; after the limit, or when hurried, end their work and then their connections."""
        async with asyncio.TaskGroup() as waiting:
            hurry = waiting.create_task(self._hurry.wait(), name="hurry")
            await asyncio.wait({http, hurry}, timeout=self.settings.shutdown_grace_s, return_when="FIRST_COMPLETED")
            hurry.cancel()
        if not http.done():
            LOGGER.warning("open requests are cut off")
            await self.floor.close()
            await asyncio.wait({http}, timeout=BEAT_S)
            self.server.abort()
            await http

    async def _tell_systemd(self) -> None:
        """Say when we are ready, and feed the watchdog for as long as loop and engines are alive."""
        watchdog_s = int(os.environ.get("WATCHDOG_USEC", "0")) / 1e6
        every_s = min(BEAT_S, watchdog_s / 2) if watchdog_s else BEAT_S
        ready, status = False, ""
        await self.listening.wait()
        while True:
            health = self.floor.readiness.health()
            if not ready and self.floor.models.attempted:
                ready = True
                self.systemd.notify("READY=1")
            elif not ready:
                self.systemd.notify(f"EXTEND_TIMEOUT_USEC={int(1e6 * (every_s + 30))}")
            if not self.floor.readiness.stalled:
                self.systemd.notify("WATCHDOG=1")
            now = "Ready." if health.ready else health.reason
            if now != status:
                status = now
                self.systemd.notify(f"STATUS={status}")
                LOGGER.info("status: %s", status)
            await asyncio.sleep(every_s)


@asynccontextmanager
async def build(settings: Settings, effective: Sequence[EffectiveSetting] | None = None) -> AsyncIterator[Appliance]:
    """Build every room and connect them; on leaving, close what was opened, newest first.

    Args:
        settings: What to run with.
        effective: The same with their origins; None if all of them were given by whoever calls.

    Raises:
        SettingsError: The settings would let strangers in, or name files that cannot be used.
        StorageError: The database cannot be opened.
    """
    async with contextlib.AsyncExitStack() as stack:
        database = Database(settings.database_path)
        stack.callback(database.close)
        keys = KeyStore(database, SystemClock())
        check_exposure(settings, keys.has_keys())
        metrics = Metrics()
        registry = open_registry(settings, database)
        wishes = Wishes(database, registry)
        guard = BootGuard(settings.data_dir / "serving.lock", wishes)
        stack.callback(guard.close)
        guard.begin()
        floor = ServingFloor(settings, registry, wishes, metrics, CpuBudget(THREADS_A_CORE * physical_cores()))
        stack.push_async_callback(floor.close)
        documents = await stack.enter_async_context(
            open_documents(
                settings,
                SystemClock(),
                models=floor.embedding,
                counter=floor.token_counts,
                rerankers=floor.classifiers,
                tensors=floor.tensors,
            )
        )
        sessions = await stack.enter_async_context(open_sessions(settings, SystemClock(), forget=floor.text.forget))
        upkeep: Upkeep | Elsewhere
        agents: Responder | Elsewhere
        conversations: Conversations
        if isinstance(sessions, Sessions):
            conversations, upkeep = sessions.conversations, sessions.upkeep
            agents = Responder(
                models=floor.text,
                idle=floor.text,
                conversations=conversations,
                responses=sessions.responses,
                tools=open_tools(settings, documents.stores),
                metrics=metrics.responses,
                clock=SystemClock(),
                limits=loop_limits(settings),
                context=Budget(),
                most_in_background=settings.max_background_responses,
            )
        else:
            agents = upkeep = sessions
            conversations = cast("Conversations", sessions)
        batches = await stack.enter_async_context(
            open_batches(
                settings,
                SystemClock(),
                files=documents.files,
                door=offline_door(
                    settings,
                    text_models=floor.text,
                    embedding_models=floor.embedding,
                    classifiers=floor.classifiers,
                    agents=cast("Agents", agents),
                    conversations=conversations,
                ),
                callers=KeyHolders(settings, keys),
                metrics=metrics.batches,
            )
        )
        app = create_app(
            settings=settings,
            text_models=floor.text,
            embedding_models=floor.embedding,
            classifiers=floor.classifiers,
            tensor_models=floor.tensors,
            files=documents.files,
            vector_stores=documents.stores,
            agents=cast("Agents", agents),
            conversations=conversations,
            batches=cast("Batches", batches),
            tunable_models=floor.tuning,
            versions=floor.versions,
            keys=keys,
            metrics=metrics,
            health=floor.readiness,
        )
        systemd = sdnotify.SystemdNotifier()
        if systemd.socket is not None:
            stack.callback(systemd.socket.close)
        appliance = Appliance(
            settings, floor, guard, documents, upkeep, agents, batches, HttpServer(app, settings), systemd
        )
        means = FleetMeans(
            registry=registry,
            loaded=lambda: floor.models.names | floor.embedders.names | floor.tensor_models.names,
            memory=ModelResidency(settings, registry, floor.models, floor.tensors),
            versions=floor.versions,
            health=floor.readiness,
            stalled=lambda: floor.readiness.stalled,
            metrics=metrics,
            restart=appliance.restart,
        )
        appliance.fleet = await stack.enter_async_context(
            open_fleet(settings, effective or effective_of(settings), SystemClock(), means)
        )
        yield appliance


def serve(settings: Settings, effective: Sequence[EffectiveSetting] | None = None) -> int:
    """Run the appliance in this process until a signal; returns the process's exit code.

    Args:
        settings: What to run with.
        effective: The same with their origins.

    Raises:
        ApplianceError: It cannot start.
    """
    configure_logging(settings.log_level, settings.log_format)
    sys.setswitchinterval(SWITCH_INTERVAL_S)
    keep_freed_memory()
    try:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            code = runner.run(_serve(settings, effective))
    except* ApplianceError as group:
        errors = errors_in(group)
        for error in errors:
            LOGGER.critical("%s", error)
        raise errors[0] from None
    return code


async def _serve(settings: Settings, effective: Sequence[EffectiveSetting] | None) -> int:
    async with build(settings, effective) as appliance:
        collect_garbage_seldom()
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, appliance.stop)
        await appliance.run()
        return appliance.exit_code
