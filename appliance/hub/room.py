"""The hub: its parts, how they are connected, started and stopped. What `compose.py` is to the box, this is here.

One event loop, one TaskGroup; every task is named. A task that dies takes the process down with exit code 1, and
systemd starts it again. SIGTERM or Ctrl-C ends it in order: no new request is accepted, open ones finish or are cut off
after a limit, devices are told, the database closes, exit code 0. A second signal cuts the wait short.

A further part of the hub is one line in `PLUGS`: a function that takes the `Means` and returns the part.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field

import sdnotify
import uvloop

from appliance.core.clock import Clock, SystemClock
from appliance.core.errors import ApplianceError, NotFoundError, UnavailableError, errors_in
from appliance.core.hub_settings import HubSettings
from appliance.core.messaging import Link, Receive
from appliance.hub.authority import Authority
from appliance.hub.blocks import plug_blocks
from appliance.hub.command_store import SqliteCommands
from appliance.hub.commands import Commands
from appliance.hub.device_records import DeviceStore
from appliance.hub.device_store import SqliteDevices
from appliance.hub.devices import Devices
from appliance.hub.director import Director
from appliance.hub.dispatch import Complaints, Counting, Dispatcher
from appliance.hub.enrolment_plug import plug_enrolment
from appliance.hub.http.app import Router, create_hub_app
from appliance.hub.http.devices import DeviceResource, device_operations
from appliance.hub.http.files import files_server
from appliance.hub.http.rollouts import RolloutResource, rollout_operations
from appliance.hub.key_watch import plug_key_watch
from appliance.hub.mqtt import HubLink
from appliance.hub.operators import MAKE_KEY, SCOPES
from appliance.hub.overview import Overview
from appliance.hub.part import HubPart
from appliance.hub.questions import Questions
from appliance.hub.release_plug import plug_repository
from appliance.hub.release_store import SqliteReleases
from appliance.hub.rollout_store import SqliteRollouts
from appliance.hub.rollouts import job_maker, plug_rollouts
from appliance.hub.schema import MIGRATIONS
from appliance.hub.telemetry_plug import plug_telemetry
from appliance.hub.telemetry_store import SqliteTelemetry, TelemetryStore
from appliance.hub.twin_store import SqliteTwins
from appliance.hub.twins import Twins
from appliance.observe.hub_metrics import HubMetrics
from appliance.observe.logs import configure_logging
from appliance.security.keys import KeyStore
from appliance.store.database import Database
from appliance.store.grouped import GroupedWrites
from appliance.store.ownership import own
from appliance.web.exposure import check_exposure
from appliance.web.routes import Operation
from appliance.web.server import HttpServer

LOGGER = logging.getLogger("appliance.hub")

BEAT_S = 1.0
"""How often systemd hears of us, at most; half its watchdog's limit if that is shorter."""


@dataclass(slots=True, kw_only=True)
class Means:
    """What the hub's parts are made of.

    Attributes:
        database: `hub.db`; reads, and writes that stand alone.
        writes: Writes that come many at a time, as messages do.
        link: To the devices.
        devices: Who there is.
        presence: Tells of new reported twins, and of each connecting.
        complaints: For what devices send that will not do.
        questions: Where answerers register.
        counting: Of messages.
        closing: What a part opens, it has closed here.
        director: Puts a payload of a type into an envelope that the devices believe.
        commands: What devices are told to do.
        twins: What devices should be.
        telemetry: What devices told.
        listening: Topics outside of the devices' own branch, by prefix.
        operations: What operators are offered over HTTP; those of one path stand together.
    """

    settings: HubSettings
    clock: Clock
    database: Database
    writes: GroupedWrites
    link: Link
    devices: DeviceStore
    presence: Devices
    complaints: Complaints
    questions: Questions
    counting: Counting
    metrics: HubMetrics
    closing: AsyncExitStack
    director: Director
    commands: SqliteCommands
    twins: SqliteTwins
    telemetry: TelemetryStore
    listening: dict[str, Receive] = field(default_factory=dict)
    operations: list[Operation] = field(default_factory=list)


def plug_twins(means: Means) -> Twins:
    """Make the part that tells devices what they should be."""
    twins = Twins(means.twins, means.link, means.director, means.clock)
    means.presence.on_report(twins.note_report)
    means.questions.answer_with("desired", twins.answer)
    return twins


def plug_commands(means: Means) -> Commands:
    """Make the part that sends commands, and offer operators the devices."""
    resource = DeviceResource(means.devices, means.twins, means.commands, means.telemetry)
    means.operations += device_operations(resource)
    return Commands(means.commands, means.link, means.complaints, means.clock)


PLUGS: tuple[Callable[[Means], HubPart], ...] = (
    plug_enrolment,
    plug_twins,
    plug_commands,
    plug_repository,
    plug_telemetry,
    plug_rollouts,
    plug_blocks,
    plug_key_watch,
)
"""Each makes one part, in this order."""


@dataclass(slots=True)
class Hub:
    """A running hub: its parts and how to stop it.

    Attributes:
        port: The port that operators reach, 0 before `listening` is set.
    """

    means: Means
    link: HubLink
    parts: list[HubPart]
    dispatcher: Dispatcher
    app: Router
    server: HttpServer
    files: HttpServer | None
    systemd: sdnotify.SystemdNotifier | None
    port: int = 0
    listening: asyncio.Event = field(default_factory=asyncio.Event)
    _stop: asyncio.Event = field(default_factory=asyncio.Event)
    _hurry: asyncio.Event = field(default_factory=asyncio.Event)

    def stop(self) -> None:
        """Begin an orderly stop; a second call stops waiting for open requests."""
        (self._hurry if self._stop.is_set() else self._stop).set()

    async def run(self) -> None:
        """Serve until `stop`.

        Raises:
            BaseExceptionGroup: A task died.
        """
        async with asyncio.TaskGroup() as tasks:
            running = [tasks.create_task(each.run(), name=type(each).__name__) for each in self.parts]
            running.append(tasks.create_task(self._stay_connected(), name="mqtt"))
            running.append(tasks.create_task(self._tell_systemd(), name="systemd"))
            http = tasks.create_task(self.server.serve(self._on_listening), name="http")
            if self.files is not None:
                tasks.create_task(self.files.serve(self._on_offering), name="files")
            await self._stop.wait()
            LOGGER.info("stopping")
            self._notify("STOPPING=1\nSTATUS=Stopping.")
            self.server.stop()
            if self.files is not None:  # a box goes on where it was
                self.files.stop()
                self.files.abort()
            await self._end_requests(http)
            await self.link.say_farewell()
            for each in running:
                each.cancel()
        await self.means.presence.write_seen()

    def _on_listening(self, port: int) -> None:
        self.port = port
        settings = self.means.settings
        scheme = "https" if settings.tls_certificate else "http"
        LOGGER.info("operators reach the hub at %s://%s:%d", scheme, settings.host, port)
        self.listening.set()

    def _on_offering(self, port: int) -> None:
        LOGGER.info("boxes fetch files of releases by HTTPS from port %d", port)

    async def _end_requests(self, http: asyncio.Task[None]) -> None:
        """Wait for the open requests; after the limit, or when hurried, cut them off."""
        async with asyncio.TaskGroup() as waiting:
            hurry = waiting.create_task(self._hurry.wait(), name="hurry")
            limit_s = self.means.settings.shutdown_grace_s
            await asyncio.wait({http, hurry}, timeout=limit_s, return_when="FIRST_COMPLETED")
            hurry.cancel()
        if not http.done():
            LOGGER.warning("open requests are cut off")
            self.server.abort()
            await http

    def _notify(self, state: str) -> None:
        if self.systemd is not None:
            self.systemd.notify(state)

    async def _stay_connected(self) -> None:
        subscriptions = self.dispatcher.subscriptions(self.means.settings.shared_group)
        await self.link.run(self.dispatcher.receive, subscriptions, self.means.presence.said_anew)

    async def _tell_systemd(self) -> None:
        """Say that we are ready, and feed the watchdog for as long as the loop turns."""
        watchdog_s = int(os.environ.get("WATCHDOG_USEC", "0")) / 1e6
        every_s = min(BEAT_S, watchdog_s / 2) if watchdog_s else BEAT_S
        await self.listening.wait()
        self._notify("READY=1")
        status = ""
        while True:
            self._notify("WATCHDOG=1")
            now = "Connected to the broker." if self.link.connected else "Waiting for the broker."
            if now != status:
                status = now
                self._notify(f"STATUS={status}")
                LOGGER.info("status: %s", status)
            await asyncio.sleep(every_s)


@asynccontextmanager
async def open_hub(settings: HubSettings, plugs: tuple[Callable[[Means], HubPart], ...] = PLUGS) -> AsyncIterator[Hub]:
    """Build every part and connect them; on leaving, close what was opened, newest first.

    Raises:
        NotFoundError: There is no hub in the folder; nothing is made there.
        SettingsError: The settings would let strangers in, or name files that cannot be used.
        StorageError: The database cannot be opened.
        UnavailableError: Another process serves this folder.
    """
    if not settings.authority_path.exists():
        raise NotFoundError(
            f"There is no hub in {settings.data_dir}.",
            advice="Make one with: appliance hub init --data FOLDER --name HOST",
        )
    async with contextlib.AsyncExitStack() as stack:
        if not settings.shared_group:
            stack.enter_context(own(settings.lock_path, _in_use))
        database = Database(settings.database_path, migrations=MIGRATIONS)
        stack.callback(database.close)
        keys = KeyStore(database, SystemClock(), scopes=SCOPES)
        check_exposure(settings, keys.has_keys(), MAKE_KEY)
        means = _means(settings, database, stack)
        parts: list[HubPart] = [means.presence, means.questions, *(plug(means) for plug in plugs)]
        means.operations += rollout_operations(_rollout_resource(means))
        dispatcher = Dispatcher(parts, means.complaints, means.counting, means.clock)
        for prefix, receive in means.listening.items():
            dispatcher.listen(prefix, receive)
        means.presence.watch(dispatcher)
        systemd = sdnotify.SystemdNotifier() if "NOTIFY_SOCKET" in os.environ else None
        if systemd is not None and systemd.socket is not None:
            stack.callback(systemd.socket.close)
        link = means.link
        assert isinstance(link, HubLink)
        app = create_hub_app(settings, _overview(means, link), means.operations, keys=keys, metrics=means.metrics)
        yield Hub(means, link, parts, dispatcher, app, HttpServer(app, settings), files_server(means), systemd)


def serve_hub(settings: HubSettings) -> int:
    """Run the hub in this process until a signal; returns the process's exit code.

    Raises:
        ApplianceError: It cannot start.
    """
    configure_logging(settings.log_level, settings.log_format)
    try:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(_serve(settings))
    except* ApplianceError as group:
        errors = errors_in(group)
        for error in errors:
            LOGGER.critical("%s", error)
        raise errors[0] from None
    return 0


async def _serve(settings: HubSettings) -> None:
    async with open_hub(settings) as hub:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, hub.stop)
        await hub.run()


def _means(settings: HubSettings, database: Database, stack: AsyncExitStack) -> Means:
    clock, metrics, writes = SystemClock(), HubMetrics(), GroupedWrites(database)
    link = HubLink(settings, clock)
    devices = SqliteDevices(database, writes, clock)
    complaints = Complaints(clock, metrics)
    return Means(
        settings=settings,
        clock=clock,
        database=database,
        writes=writes,
        link=link,
        devices=devices,
        presence=Devices(devices, link, complaints, clock),
        complaints=complaints,
        questions=Questions(link, devices, complaints, clock, most_a_minute=settings.questions_per_minute),
        counting=metrics,
        metrics=metrics,
        closing=stack,
        director=Director(Authority(settings.data_dir, clock)),
        commands=SqliteCommands(database, writes, clock),
        twins=SqliteTwins(database, clock),
        telemetry=SqliteTelemetry(database),
    )


def _rollout_resource(means: Means) -> RolloutResource:
    rollouts = SqliteRollouts(means.database, means.writes, job_maker(means.devices, means.clock))
    return RolloutResource(SqliteReleases(means.database, means.clock), rollouts, means.clock)


def _overview(means: Means, link: HubLink) -> Overview:
    return Overview(
        means.devices,
        means.clock,
        unreached_days=means.settings.unreached_days,
        connected=lambda: link.connected,
    )


def _in_use(owner: str) -> UnavailableError:
    return UnavailableError(
        f"Another hub ({owner}) serves this folder.", advice="Stop it, or give this one a folder of its own."
    )
