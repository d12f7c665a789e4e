"""The agent built from its parts: the connection, what is stored, and each part wired to the others.

Imported when a box is enrolled: what it brings (MQTT, TUF, certificates) costs a box without a hub nothing.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from appliance.core.clock import Clock
from appliance.core.errors import ApplianceError, UnavailableError
from appliance.core.messaging import Message
from appliance.core.settings import EffectiveSetting, Settings
from appliance.fleet.actions import Actions
from appliance.fleet.agent import FleetAgent, subscriptions
from appliance.fleet.asking import Questions
from appliance.fleet.collect import Collector, Sources
from appliance.fleet.command_ledger import CommandLedger
from appliance.fleet.commands import Commands
from appliance.fleet.device_ledger import DeviceLedger
from appliance.fleet.diagnostics import DiagnosticsSources
from appliance.fleet.hub_watch import HubClock, HubWatch
from appliance.fleet.identity import Identity, IdentityFolder
from appliance.fleet.import_desk import ImportDesk
from appliance.fleet.imports import Imports
from appliance.fleet.job_acks import JobAcknowledgements
from appliance.fleet.journal import Journal
from appliance.fleet.means import FleetMeans
from appliance.fleet.part import Asking, FleetPart
from appliance.fleet.recovery import MarkFile, open_or_rescue
from appliance.fleet.renewal import Renewal
from appliance.fleet.reported import box_facts
from appliance.fleet.signed_files import FolderAsking
from appliance.fleet.telemetry import Telemetry
from appliance.fleet.trust import Trust
from appliance.fleet.trust_record import TrustRecord
from appliance.fleet.twin import Twin, TwinEffects, local_settings
from appliance.fleet.twin_store import TwinStore
from appliance.fleet.update_parts import build_updates
from appliance.fleet.updates import Updates
from appliance.messaging.connection import Connection
from appliance.messaging.options import ConnectionOptions, TlsFiles, Will
from appliance.observe.log_ring import LogRing
from appliance.observe.logs import set_log_level
from appliance.security.certificates import certificate_facts
from appliance.store.database import Database
from appliance.store.outbox import Limits, Outbox
from appliance.store.ownership import ADVICE, own

LOGGER = logging.getLogger("appliance.fleet")
SESSION_EXPIRY_S = 3600
LANES = 16

SetRates = Callable[[Mapping[str, float]], Mapping[str, str]]
"""Takes the seconds between rows of telemetry by stream, and returns which it refused and why."""


@dataclass(frozen=True, slots=True)
class _Telemetry:
    sending: Telemetry
    collector: Collector


@dataclass(frozen=True, slots=True)
class _Stored:
    """What a session opened; `trouble` is what was wrong with the database, or ""."""

    database: Database
    mark: MarkFile
    outbox: Outbox | None
    trouble: str


@dataclass(frozen=True, slots=True)
class _Jobs:
    """Who is asked for the current job, and the time by which jobs open and expire."""

    asking: Asking
    clock: Clock


class FleetSession:
    """One attempt to speak for this box."""

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

    async def run(self, identity: Identity) -> None:
        """Open what is stored, connect, and speak for this box until cancelled.

        Raises:
            UnavailableError: Another process speaks for it.
            StorageError: What is stored cannot be used.
        """
        async with AsyncExitStack() as stack:
            stack.enter_context(await asyncio.to_thread(own, self._settings.fleet_lock_path, _in_use))
            path, now = self._settings.fleet_path, self._clock.unix()
            database, mark, trouble = await asyncio.to_thread(open_or_rescue, path, now)
            stack.callback(database.close)
            root = await asyncio.to_thread(identity.root.read_bytes)
            await TrustRecord(database).anchor(root)
            await asyncio.to_thread(TwinStore(database).begin, hashlib.sha256(root).hexdigest())
            outbox = None
            if self._settings.fleet_telemetry == "on":
                limits = Limits(bytes=self._settings.fleet_outbox_bytes)
                outbox = await asyncio.to_thread(Outbox, self._settings.telemetry_path, self._clock, limits)
                stack.push_async_callback(outbox.close)
            await self._speak(identity, _Stored(database, mark, outbox, trouble))

    async def _speak(self, identity: Identity, stored: _Stored) -> None:
        database, outbox = stored.database, stored.outbox
        connection, device, hub = self._connection(identity), identity.device, HubWatch(self._clock)
        asking = Questions(device, connection)
        clock = HubClock(self._clock, hub)
        journal = Journal(database, clock, stored.mark.raise_floor)
        trust = Trust(device, TrustRecord(database), asking, release_floor=journal.floor)
        updates = self._updates(identity, connection, journal, trust, _Jobs(asking, clock))
        acknowledged = None if updates is None else updates.acknowledged
        telemetry = None if outbox is None else self._telemetry(identity, connection, outbox, hub, acknowledged)
        alarm = _log_alarm if telemetry is None else telemetry.collector.note
        set_rates = _no_rates if telemetry is None else telemetry.collector.set_rates
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
        if updates is not None:
            parts += [updates, self._imports(device, database, journal, updates, clock)]
        if telemetry is not None:
            parts += [telemetry.sending, telemetry.collector]
        elif updates is not None:
            parts.append(JobAcknowledgements(updates.acknowledged))
        self._agent = agent = FleetAgent(
            device,
            identity.instance,
            connection,
            DeviceLedger(database, stored.mark.raise_epoch),
            hub=hub,
            asking=asking,
            parts=parts,
            clock=self._clock,
            metrics=metrics,
            alarm=alarm,
        )
        if stored.trouble:
            await alarm("record_damaged", {"what": stored.trouble[:300]})
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(agent.run(), name="fleet parts")
            tasks.create_task(connection.run(), name="fleet connection")
            if outbox is not None:
                tasks.create_task(outbox.run(), name="fleet outbox")

    def _updates(
        self, identity: Identity, connection: Connection, journal: Journal, trust: Trust, jobs: _Jobs
    ) -> Updates | None:
        if self._means.versions is None:
            return None
        return build_updates(
            identity.device,
            connection,
            journal,
            releases=trust,
            asking=jobs.asking,
            registry=self._means.registry,
            versions=self._means.versions,
            settings=self._settings,
            clock=jobs.clock,
            tls=_tls(identity),
        )

    def _imports(self, device: str, database: Database, journal: Journal, updates: Updates, jobs: Clock) -> Imports:
        def trust_of(folder: Path) -> Trust:
            return Trust(device, TrustRecord(database), FolderAsking(folder), release_floor=journal.floor)

        assert self._means.versions is not None, "what installs needs them too"
        return Imports(
            ImportDesk(self._settings.fleet_imports_dir),
            journal,
            installing=updates,
            trust_of=trust_of,
            versions=self._means.versions,
            clock=self._clock,
            job_time=jobs.unix,
        )

    def _telemetry(
        self,
        identity: Identity,
        connection: Connection,
        outbox: Outbox,
        hub: HubWatch,
        acknowledged: Callable[[int], None] | None,
    ) -> _Telemetry:
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
        sending = Telemetry(
            outbox, connection, identity.device, self._clock, welcome=hub.welcome, job_acknowledged=acknowledged
        )
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
                tls=_tls(identity),
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

    async def say_goodbye(self) -> None:
        """Tell the hub that this end is meant, if it can be told at once."""
        if self._agent is not None:
            await self._agent.say_goodbye()


def _tls(identity: Identity) -> TlsFiles:
    return TlsFiles(identity.authority, identity.credentials, identity.credentials)


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
