"""The twin: what the hub wants this box to be, and what the box tells that it is.

    des ──> signed by the hub? ours? newer? ──> fleet.db ──> applied ──> rep (kept by the broker, version rising)
                    └─ no: a log line, and nothing is changed

The broker keeps the document and sends it at each connecting, so one that was lost on the way to the disk comes again.

What is applied: the log level at once, telemetry rates at once, model wishes once each through the one path that all
wishes take; every other setting from the next start on, which the report says. A document stays in force, hub or no
hub, until the hub replaces it. A name that something else moved meanwhile, such as an update, is not fought.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import msgspec

from appliance.core.errors import ApplianceError, UnavailableError, UntrustedError
from appliance.core.fleet import LARGEST_DOCUMENT_BYTES, Desired, DownKind, Reported, ReportedModel, up
from appliance.core.messaging import Link, Message
from appliance.core.releases import Criteria
from appliance.core.settings import EffectiveSetting, Settings, setting_fields
from appliance.core.wishes import ModelVersions, Soak
from appliance.fleet.twin_policy import LOCAL_ONLY, ORIGIN, Decision, compare, decide, pending
from appliance.fleet.twin_store import TwinStore
from appliance.observe.fleet_metrics import FleetMetrics

LOGGER = logging.getLogger("appliance.fleet")
LARGEST_ENVELOPE_BYTES = LARGEST_DOCUMENT_BYTES * 4 // 3 + 4096
"""Of a document in Base64 with its signatures."""
LOOK_AGAIN_S = 30.0
"""How often models, and wishes that could not be done, are looked at."""


@dataclass(frozen=True, slots=True)
class LocalSettings:
    """The settings of this box without the hub's.

    Attributes:
        settings: As they would be without a hub.
        origins: Of those that somebody set here: where.
        in_force: What the running process works with.
    """

    settings: Settings
    origins: Mapping[str, str]
    in_force: Mapping[str, Any]


def local_settings(effective: Sequence[EffectiveSetting]) -> LocalSettings:
    """Take the hub's settings out of the effective ones."""
    own = {each.name: each.value for each in effective if each.origin != ORIGIN}
    return LocalSettings(
        settings=replace(Settings(), **own),
        origins={each.name: each.origin for each in effective if each.origin not in {"default", ORIGIN}},
        in_force={each.name: each.value for each in effective},
    )


@dataclass(frozen=True, slots=True)
class TwinEffects:
    """What the twin acts on and tells of.

    Attributes:
        set_log_level: Takes the least severity that is logged.
        set_rates: Takes the seconds between rows of telemetry by stream, and returns which it refused and why.
        versions: The model wishes, or None where there are none.
        models: Returns every registered model.
        facts: Returns what this box is; may take seconds.
    """

    set_log_level: Callable[[str], None]
    set_rates: Callable[[Mapping[str, float]], Mapping[str, str]]
    versions: ModelVersions | None
    models: Callable[[], list[ReportedModel]]
    facts: Callable[[], Awaitable[dict[str, Any]]]


class Twin:
    """A part of the agent."""

    def __init__(
        self,
        device: str,
        link: Link,
        store: TwinStore,
        local: LocalSettings,
        *,
        opened: Callable[[bytes], Awaitable[Desired]],
        effects: TwinEffects,
        metrics: FleetMetrics,
    ) -> None:
        """Take documents that `opened` believes.

        It raises UntrustedError for what is never to be believed, and UnavailableError if the hub has to be asked for
        the keys and is away.
        """
        self._device = device
        self._link = link
        self._store = store
        self._local = local
        self._opened = opened
        self._effects = effects
        self._metrics = metrics
        kept = store.desired()
        self._accepted = kept if kept is not None and kept.device == device else None
        self._log_level = str(local.in_force["log_level"])
        self._arrived: bytes | None = None
        self._reported: Reported | None = None
        self._due = True
        self._wake = asyncio.Event()

    @property
    def kinds(self) -> frozenset[DownKind]:
        """Return the topic of the desired twin."""
        return frozenset({"des"})

    async def handle(self, kind: DownKind, message: Message) -> None:  # noqa: ARG002
        """Have a desired twin considered; the newest replaces one that was not yet."""
        if len(message.payload) > LARGEST_ENVELOPE_BYTES:
            self._refuse(f"it has {len(message.payload):,} bytes, {LARGEST_ENVELOPE_BYTES:,} are allowed")
        elif message.payload:  # an empty one takes back what the broker kept
            self._arrived = message.payload
            self._wake.set()

    async def connected(self) -> None:
        """Have everything reported anew."""
        self.report_again()

    def report_again(self) -> None:
        """Report soon, whether or not anything changed."""
        self._due = True
        self._wake.set()

    async def run(self) -> None:
        """Apply what is desired, and report what changed."""
        facts = await self._effects.facts()
        while True:
            self._wake.clear()
            await self._consider()
            await self._report(await self._apply(self._accepted), facts)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(LOOK_AGAIN_S):
                    await self._wake.wait()

    # Accepting

    async def _consider(self) -> None:
        """Accept what arrived, or refuse it; it waits while the hub is away and its keys are not known."""
        envelope, self._arrived = self._arrived, None
        if envelope is None:
            return
        try:
            desired = await self._opened(envelope)
        except UntrustedError as error:
            self._refuse(error.message)
            return
        except UnavailableError as error:
            LOGGER.info("a desired twin waits: %s", error)
            self._arrived = self._arrived or envelope
            return
        verdict = compare(desired, self._accepted)
        known = self._accepted.version if self._accepted else 0
        if desired.device != self._device:
            self._refuse(f"it is for {desired.device}")
        elif verdict == "new":
            await self._store.accept(desired)
            self._accepted = desired
            self._metrics.desired(applied=True)
            LOGGER.info("the desired twin is of version %d now", desired.version)
        elif verdict != "known":
            self._refuse(f"it has the version {desired.version} ({verdict}), and {known} was accepted")

    def _refuse(self, reason: str) -> None:
        LOGGER.warning("a desired twin was refused: %s", reason)
        self._metrics.desired(applied=False)

    # Applying

    async def _apply(self, accepted: Desired | None) -> Decision:
        if accepted is None:
            return Decision()
        decision = decide(accepted, self._local.settings, self._local.origins)
        level = str(decision.settings.get("log_level", self._local.settings.log_level))
        if level != self._log_level:
            LOGGER.info("the hub sets the log level to %s", level)
            self._effects.set_log_level(level)
            self._log_level = level
        refused = self._effects.set_rates(decision.telemetry)
        decision.refused.update({f"telemetry.{name}": reason for name, reason in refused.items()})
        await self._wish(decision, accepted.version)
        return decision

    async def _wish(self, decision: Decision, version: int) -> None:
        """Hand on the model wishes that were not yet, and say which are not so."""
        done = self._store.models_done()
        for name, wanted in decision.models.items():
            try:
                problem = self._moved(name, wanted) if done.get(name) == wanted else ""
                if done.get(name) != wanted:
                    await self._activate(f"{name}:{wanted}", f"desired twin {version}")
                    done[name] = wanted
                    await self._store.note_models(done)
            except ApplianceError as error:
                problem = str(error)
            if problem:
                decision.refused[f"models.{name}"] = problem[:200]

    async def _activate(self, full_name: str, origin: str) -> None:
        if self._effects.versions is None:
            raise UnavailableError("This box takes no model wishes.")
        await self._effects.versions.activate(full_name, origin=origin, soak=Soak(), criteria=Criteria())

    def _moved(self, name: str, wanted: str) -> str:
        """Return why a wish that was handed on is not so now, or nothing."""
        wish = None if self._effects.versions is None else self._effects.versions.wish(name)
        if wish is None:
            return "the wish for it was withdrawn on the box"
        if wish.version != wanted:
            return f"{wish.origin} has wished for version {wish.version} since"
        return f"it was tried and rolled back: {wish.reason}" if wish.state == "rolled_back" else ""

    # Reporting

    async def _report(self, decision: Decision, facts: dict[str, Any]) -> None:
        in_force = {**self._local.in_force, "log_level": self._log_level}
        report = Reported(
            version=0,
            desired_version=self._accepted.version if self._accepted else 0,
            settings={name: in_force[name] for name in sorted(setting_fields().keys() - LOCAL_ONLY)},
            refused=decision.refused,
            pending=pending(decision, self._local.settings, in_force),
            models=self._effects.models(),
            facts=facts,
        )
        if (report == self._reported and not self._due) or not self._link.connected:
            return
        self._due = False
        numbered = msgspec.structs.replace(report, version=await self._store.next_report())
        try:
            await self._link.publish(Message(up(self._device, "rep"), msgspec.json.encode(numbered), retain=True))
        except ApplianceError as error:
            LOGGER.info("the report waits for the next connection: %s", error)
            self._due = True
        else:
            self._reported = report
