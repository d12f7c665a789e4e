"""The room as a whole: waits until this box is enrolled, builds the agent from its parts, and runs it.

Nothing of it is needed to serve. It is built after the doors are open, and whatever is wrong with it is a log line and
another try: no error of it ends the process.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
from collections.abc import AsyncIterator, Callable, Collection, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from appliance.core.clock import Clock
from appliance.core.errors import ApplianceError, UnavailableError
from appliance.core.fleet import ReportedModel
from appliance.core.messaging import Message
from appliance.core.settings import EffectiveSetting, Settings
from appliance.core.types import HealthSource
from appliance.core.wishes import ModelVersions
from appliance.fleet.actions import Actions, ModelMemory
from appliance.fleet.agent import FleetAgent, subscriptions
from appliance.fleet.asking import Questions
from appliance.fleet.collect import Collector, Sources
from appliance.fleet.command_ledger import CommandLedger
from appliance.fleet.commands import Commands
from appliance.fleet.device_ledger import DeviceLedger
from appliance.fleet.diagnostics import DiagnosticsSources
from appliance.fleet.hub_watch import HubWatch
from appliance.fleet.identity import Identity, IdentityFolder
from appliance.fleet.journal import Journal
from appliance.fleet.part import FleetPart
from appliance.fleet.renewal import Renewal
from appliance.fleet.reported import box_facts, reported_models
from appliance.fleet.schema import open_fleet_database
from appliance.fleet.telemetry import Telemetry
from appliance.fleet.trust import Trust
from appliance.fleet.trust_record import TrustRecord
from appliance.fleet.twin import Twin, TwinEffects, local_settings
from appliance.fleet.twin_store import TwinStore
from appliance.fleet.update_parts import build_updates
from appliance.messaging.connection import Connection
from appliance.messaging.options import ConnectionOptions, TlsFiles, Will
from appliance.observe.log_ring import LogRing, last_lines
from appliance.observe.logs import set_log_level
from appliance.observe.metrics import Metrics
from appliance.registry.versions import Registry
from appliance.security.certificates import certificate_facts
from appliance.store.database import Database
from appliance.store.outbox import Limits, Outbox
from appliance.store.ownership import ADVICE, own

LOGGER = logging.getLogger("appliance.fleet")
LOOK_S = 5.0
"""How often a box that is not enrolled looks whether it is: the verb that enrols it runs beside the server."""
AGAIN_S = 60.0
"""After an error of the agent itself."""
SESSION_EXPIRY_S = 3600
LANES = 16

SetRates = Callable[[Mapping[str, float]], Mapping[str, str]]
"""Takes the seconds between rows of telemetry by stream, and returns which it refused and why."""


@dataclass(frozen=True, slots=True)
class FleetMeans:
    """What the agent gets from the rooms that it does not know.

    Attributes:
        registry: The models that there are.
        loaded: Returns the full names of the models in memory.
        memory: Loads and unloads models.
        versions: The model wishes, or None where there are none.
        health: Whether the box can serve.
        stalled: Returns the models whose thread has not gone round for too long.
        metrics: What is told of, and where the agent counts.
        restart: Begins an orderly end of the process after which it is started again.
    """

    registry: Registry
    loaded: Callable[[], Collection[str]]
    memory: ModelMemory
    versions: ModelVersions | None
    health: HealthSource
    stalled: Callable[[], Sequence[str]]
    metrics: Metrics
    restart: Callable[[], None]

    def models(self) -> list[ReportedModel]:
        """Return every registered model as it is reported."""
        return reported_models(self.registry, self.loaded())


@dataclass(frozen=True, slots=True)
class _Telemetry:
    sending: Telemetry
    collector: Collector


class Fleet:
    """The agent of this box, once it is enrolled."""

    def __init__(
        self,
        settings: Settings,
        effective: Sequence[EffectiveSetting],
        clock: Clock,
        means: FleetMeans,
        log: LogRing,
    ) -> None:
        """Touch nothing before `run`."""
        self._settings = settings
        self._effective = effective
        self._clock = clock
        self._means = means
        self._log = log
        self._folder = IdentityFolder(settings.fleet_dir)
        self._agent: FleetAgent | None = None

    async def run(self) -> None:
        """Speak to the hub until cancelled; ends only where the settings want no hub."""
        if self._settings.fleet == "off":
            return
        while True:
            try:
                await self._work(await self._identity())
            except ApplianceError as error:
                LOGGER.error("the fleet's agent begins anew in %g s: %s", AGAIN_S, error)  # noqa: TRY400
            except Exception:
                LOGGER.exception("the fleet's agent failed and begins anew in %g s", AGAIN_S)
            self._agent = None
            await asyncio.sleep(AGAIN_S)

    async def say_goodbye(self) -> None:
        """Tell the hub that this end is meant, if it can be told at once."""
        if self._agent is not None:
            await self._agent.say_goodbye()

    async def _identity(self) -> Identity:
        """Wait until this box is enrolled."""
        told = False
        while (identity := await asyncio.to_thread(self._folder.identity)) is None:
            if not told and self._settings.fleet == "on":
                LOGGER.warning("this box is not enrolled at a hub: `appliance fleet enrol` does that")
            told = True
            await asyncio.sleep(LOOK_S)
        return identity

    async def _work(self, identity: Identity) -> None:
        async with AsyncExitStack() as stack:
            stack.enter_context(await asyncio.to_thread(own, self._settings.fleet_lock_path, _in_use))
            database = await asyncio.to_thread(open_fleet_database, self._settings.fleet_path)
            stack.callback(database.close)
            root = await asyncio.to_thread(identity.root.read_bytes)
            await TrustRecord(database).anchor(root)
            await asyncio.to_thread(TwinStore(database).begin, hashlib.sha256(root).hexdigest())
            outbox = None
            if self._settings.fleet_telemetry == "on":
                limits = Limits(bytes=self._settings.fleet_outbox_bytes)
                outbox = await asyncio.to_thread(Outbox, self._settings.telemetry_path, self._clock, limits)
                stack.push_async_callback(outbox.close)
            await self._speak(identity, database, outbox)

    async def _speak(self, identity: Identity, database: Database, outbox: Outbox | None) -> None:
        connection, device, hub = self._connection(identity), identity.device, HubWatch(self._clock)
        asking = Questions(device, connection)
        telemetry = None if outbox is None else self._telemetry(identity, connection, outbox, hub)
        alarm = _log_alarm if telemetry is None else telemetry.collector.note
        set_rates = _no_rates if telemetry is None else telemetry.collector.set_rates
        journal = Journal(database, self._clock)
        trust = Trust(device, TrustRecord(database), asking, release_floor=journal.floor)
        twin = self._twin(device, connection, database, trust, set_rates)
        actions, metrics = self._actions(twin).by_name(), self._means.metrics.fleet
        parts: list[FleetPart] = [
            asking,
            twin,
            Commands(device, connection, CommandLedger(database), actions, hub=hub, metrics=metrics),
            Renewal(
                self._folder,
                connection,
                asking,
                self._clock,
                now=hub.unix,
                reconnect=connection.reconnect,
                alarm=alarm,
            ),
        ]
        if telemetry is not None:
            parts += [telemetry.sending, telemetry.collector]
        if self._means.versions is not None:
            parts.append(
                build_updates(
                    device,
                    connection,
                    journal,
                    releases=trust,
                    asking=asking,
                    registry=self._means.registry,
                    versions=self._means.versions,
                    settings=self._settings,
                    clock=self._clock,
                )
            )
        self._agent = agent = FleetAgent(
            device,
            identity.instance,
            connection,
            DeviceLedger(database),
            hub=hub,
            asking=asking,
            parts=parts,
            clock=self._clock,
            metrics=metrics,
            alarm=alarm,
        )
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(agent.run(), name="fleet parts")
            tasks.create_task(connection.run(), name="fleet connection")
            if outbox is not None:
                tasks.create_task(outbox.run(), name="fleet outbox")

    def _telemetry(self, identity: Identity, connection: Connection, outbox: Outbox, hub: HubWatch) -> _Telemetry:
        sources = Sources(
            health=self._means.health,
            stalled=self._means.stalled,
            metrics=self._means.metrics,
            models=self._means.models,
            folder=self._settings.data_dir,
            queue_size=self._settings.queue_size,
            certificate_ends=lambda: certificate_end(identity.credentials),
            hub_unix=hub.heard_unix,
        )
        sending = Telemetry(outbox, connection, identity.device, self._clock, welcome=hub.welcome)
        return _Telemetry(sending, Collector(outbox, sources, self._clock))

    def _connection(self, identity: Identity) -> Connection:
        """Return the connection whose session the agent owns; it is there before any of them is called."""

        async def will() -> Will:
            return Will(await self._owner().opening(), self._settings.fleet_will_delay_s)

        async def receive(message: Message) -> None:
            await self._owner().receive(message)

        async def connected() -> None:
            await self._owner().opened()

        async def disconnected(reason: str) -> None:
            connection.hold_off(await self._owner().closed(taken_over="taken over" in reason.lower()))

        connection = Connection(
            ConnectionOptions(
                host=identity.host,
                port=identity.port,
                client_id=identity.device,
                tls=TlsFiles(identity.authority, identity.credentials, identity.credentials),
                clean_start=False,  # or the broker would end our last session, and say at once that we are lost
                session_expiry_s=max(SESSION_EXPIRY_S, self._settings.fleet_will_delay_s),
            ),
            receive,
            subscriptions=subscriptions(identity.device),
            will=will,
            on_connected=connected,
            on_disconnected=disconnected,
            lanes=LANES,
            clock=self._clock,
        )
        return connection

    def _owner(self) -> FleetAgent:
        assert self._agent is not None, "a connection runs only beside its agent"
        return self._agent

    def _twin(self, device: str, connection: Connection, database: Database, trust: Trust, set_rates: SetRates) -> Twin:
        async def facts() -> dict[str, Any]:
            return await asyncio.to_thread(box_facts, self._settings)

        return Twin(
            device,
            connection,
            TwinStore(database),
            local_settings(self._effective),
            opened=trust.open_desired,
            effects=TwinEffects(set_log_level, set_rates, self._means.versions, self._means.models, facts),
            metrics=self._means.metrics.fleet,
        )

    def _actions(self, twin: Twin) -> Actions:
        sources = DiagnosticsSources(
            self._settings, self._effective, self._means.health, self._means.models, self._log, self._clock
        )
        return Actions(
            sources,
            self._means.memory,
            clock=self._clock,
            report_again=twin.report_again,
            restart=self._means.restart,
        )


@asynccontextmanager
async def open_fleet(
    settings: Settings, effective: Sequence[EffectiveSetting], clock: Clock, means: FleetMeans
) -> AsyncIterator[Fleet]:
    """Prepare the agent; `Fleet.run` does the work. Takes no time: nothing is opened, and nobody is called, before."""
    with last_lines() as log:
        yield Fleet(settings, effective, clock, means, log)


def certificate_end(credentials: Path) -> float | None:
    """Return the Unix seconds at which the certificate ends, or None if it cannot be told."""
    try:
        return certificate_facts(credentials.read_bytes()).not_after
    except (OSError, ApplianceError):
        return None  # the connection says what is wrong with it


async def _log_alarm(name: str, figures: Mapping[str, Any]) -> None:
    """Raise an alarm where there is no telemetry."""
    LOGGER.error("alarm %s: %s", name, figures)


def _no_rates(rates: Mapping[str, float]) -> Mapping[str, str]:
    return dict.fromkeys(rates, "telemetry is off on this box")


def _in_use(owner: str) -> UnavailableError:
    return UnavailableError(
        f"The identity of this data folder at its hub is in use by {owner}.", advice=ADVICE, code="fleet_in_use"
    )
