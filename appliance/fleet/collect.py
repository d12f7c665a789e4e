"""What is told of this box, and how often: health, serving figures, resources, models, and alarms.

Everything is made of numbers and of names that an operator gave. No prompt, no answer and nothing else of a request is
within reach: the sources are the box's readiness, its Prometheus metrics, its registry's names and its sensors.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from typing import Any

import msgspec

from appliance.core.clock import Clock
from appliance.core.errors import TooLargeError
from appliance.core.fleet import CLOCK_TOLERANCE_S, DownKind, ReportedModel, Stream
from appliance.core.messaging import Message
from appliance.core.types import Health, HealthSource
from appliance.fleet.alarms import AlarmBook, Change, Reading, Rule
from appliance.observe.figures import serving_figures, snapshot, waiting_requests
from appliance.observe.metrics import Metrics
from appliance.observe.resources import Disk, disk, load, memory
from appliance.observe.sensors import gpu_load, power_rails, temperatures
from appliance.store.outbox import Outbox

LOGGER = logging.getLogger("appliance.fleet")

DEFAULT_RATES: Mapping[str, float] = {"health": 60.0, "metric": 60.0, "sample": 0.0}
"""Seconds between rows by stream; 0 is off. Alarms and jobs are told when there are any."""

SHORTEST_S, LONGEST_S = 1.0, 86_400.0
LOOK_S = 10.0
"""How often alarms are looked at, and whether readiness has changed."""

MODELS_S = 86_400.0
LOSSY_S = 3600.0
_MOST_MODELS = 100
_DAY_S = 86_400.0

RULES: tuple[Rule, ...] = (
    Rule("disk", raise_at=0.05, clear_at=0.08, raise_s=30.0, severity="critical"),
    Rule("memory", raise_at=0.05, clear_at=0.10, raise_s=60.0),
    Rule("temperature", raise_at=90.0, clear_at=80.0, raise_s=30.0),
    Rule("engine_stalled", raise_at=1.0, clear_at=0.0, clear_s=30.0, severity="critical"),
    Rule("queue_full", raise_at=0.9, clear_at=0.5, raise_s=60.0),
    Rule("outbox_lossy", raise_at=1.0, clear_at=0.0, clear_s=0.0),
    Rule("outbox_failing", raise_at=1.0, clear_at=0.0, severity="critical"),
    Rule("outbox_damaged", raise_at=1.0, clear_at=0.0),
    Rule("certificate", raise_at=14.0, clear_at=20.0, severity="critical"),
    Rule("clock", raise_at=float(CLOCK_TOLERANCE_S), clear_at=60.0, raise_s=30.0),
)
"""Shares of disk and memory that are free; degrees Celsius; days; seconds."""


@dataclass(frozen=True, slots=True)
class Sources:
    """Where the figures come from.

    Attributes:
        health: Readiness.
        stalled: Names of models whose thread has not gone round for too long.
        metrics: Of this process.
        models: What there is and what is loaded.
        folder: The data folder, whose disk counts.
        queue_size: Requests that may wait at a model.
        certificate_ends: Unix seconds of the end of the device's certificate, or None.
        hub_unix: Unix seconds by the hub's clock, or None while it is not known.
        root: For tests, see `observe.sensors`.
    """

    health: HealthSource
    stalled: Callable[[], Sequence[str]]
    metrics: Metrics
    models: Callable[[], Sequence[ReportedModel]]
    folder: Path
    queue_size: int
    certificate_ends: Callable[[], float | None] = lambda: None
    hub_unix: Callable[[], float | None] = lambda: None
    root: Path = Path("/")


class Collector:
    """The part of the agent that appends to the outbox. It reads no topic."""

    def __init__(self, outbox: Outbox, sources: Sources, clock: Clock) -> None:
        """Tell nothing before `run`."""
        self._outbox = outbox
        self._sources = sources
        self._clock = clock
        self._rates = dict(DEFAULT_RATES)
        self._told: dict[str, float] = {}
        self._changed = asyncio.Event()
        self._book = AlarmBook(RULES)
        self._health: Health | None = None
        self._models: list[ReportedModel] | None = None
        self._snapshot = snapshot(sources.metrics)
        self._began = clock.monotonic()
        self._lost_before = outbox.lost
        self._losses: list[tuple[float, int]] = []

    @property
    def kinds(self) -> frozenset[DownKind]:
        """Return that it reads no topic."""
        return frozenset()

    @property
    def rates(self) -> Mapping[str, float]:
        """Return the seconds between rows by stream; 0 is off."""
        return dict(self._rates)

    def set_rates(self, rates: Mapping[str, float]) -> dict[str, str]:
        """Take over how often is told; what is not named is as by default.

        Returns:
            The names that were refused, each with the reason.
        """
        refused = {name: reason for name, value in rates.items() if (reason := _wrong_rate(name, value))}
        self._rates = {**DEFAULT_RATES, **{name: value for name, value in rates.items() if name not in refused}}
        self._changed.set()
        return refused

    async def handle(self, kind: DownKind, message: Message) -> None:
        """Take nothing: it reads no topic."""

    async def connected(self) -> None:
        """Say nothing anew: the outbox holds what there is to say."""

    async def note(self, name: str, figures: Mapping[str, Any]) -> None:
        """Raise an alarm that is an event, with figures and names; never with the text of a request."""
        detail = ", ".join(f"{key} {value}" for key, value in figures.items())[:500]
        await self._tell(self._book.note(name[:64], detail, self._clock.monotonic(), self._clock.unix()))

    async def run(self) -> None:
        """Collect until cancelled."""
        await self._append("alarm", "started", {"open": self._open()})
        while True:
            now = self._clock.monotonic()
            await self.collect(now)
            self._changed.clear()
            every = {**{name: rate for name, rate in self._rates.items() if rate}, "alarm": LOOK_S}
            wait_s = min(self._told.get(name, now) + rate for name, rate in every.items()) - self._clock.monotonic()
            try:
                async with asyncio.timeout(max(0.01, wait_s)):
                    await self._changed.wait()
            except TimeoutError:
                continue

    async def collect(self, now: float) -> None:
        """Tell what is due at a time of the monotonic clock."""
        if self._due("alarm", LOOK_S, now):
            await self._look(now)
        for stream, tell in (("health", self._tell_health), ("metric", self._tell_metrics), ("sample", self._sample)):
            if self._rates[stream] and self._due(stream, self._rates[stream], now):
                await tell(now)

    def _due(self, name: str, every_s: float, now: float) -> bool:
        if name in self._told and now - self._told[name] < every_s:
            return False
        self._told[name] = now
        return True

    async def _look(self, now: float) -> None:
        await self._tell(self._book.observe(self._readings(now), now, self._clock.unix()))
        if self._rates["health"] and self._sources.health.health() != self._health:
            self._told["health"] = now
            await self._tell_health(now)

    async def _tell(self, changes: Sequence[Change]) -> None:
        for change in changes:
            kind = "raised" if change.raised else "cleared"
            LOGGER.warning("alarm %s: %s %s", kind, change.name, change.detail)
            body = {"name": change.name, "severity": change.severity, "value": change.value, "detail": change.detail}
            await self._append("alarm", kind, {**body, "open": self._open()})

    def _open(self) -> dict[str, dict[str, Any]]:
        return {
            name: {"since": each.since, "severity": each.severity, "detail": each.detail[:200]}
            for name, each in self._book.open.items()
        }

    async def _tell_health(self, now: float) -> None:
        self._health = self._sources.health.health()
        body: dict[str, Any] = {"ready": self._health.ready, "reason": self._health.reason[:500]}
        body["alarms"] = sorted(self._book.open)
        body["uptime_s"] = round(now - self._began, 1)
        body["outbox"] = {"rows": sum(each.rows for each in self._outbox.held().values()), "lost": self._outbox.lost}
        await self._append("health", "health", body)

    async def _tell_metrics(self, now: float) -> None:
        before, self._snapshot = self._snapshot, snapshot(self._sources.metrics)
        since = self._told.get("serving", now - self._rates["metric"])
        self._told["serving"] = now
        await self._append("metric", "serving", serving_figures(before, self._snapshot, now - since))
        await self._append("metric", "resources", self._resources())
        models = list(self._sources.models())
        if models != self._models or self._due("models", MODELS_S, now):
            self._told["models"] = now
            self._models = models
            await self._append("metric", "models", _models(models))

    async def _sample(self, now: float) -> None:  # noqa: ARG002
        await self._append("sample", "resources", self._resources())

    def _resources(self) -> dict[str, Any]:
        root, busy = self._sources.root, load()
        main, storage = memory(root), self._disk()
        gpu = gpu_load(root)
        return {
            "cpu": round(busy.cpu, 3),
            "load": round(busy.runnable, 2),
            "resident": busy.resident,
            "memory": {"total": main.total, "available": main.available},
            "disk": {"total": storage.total, "free": storage.free},
            "temperatures": {name: round(value, 1) for name, value in temperatures(root).items()},
            "watts": {name: round(value, 2) for name, value in power_rails(root).items()},
            **({} if gpu is None else {"gpu": round(gpu, 3)}),
        }

    def _readings(self, now: float) -> dict[str, Reading]:
        root, wall = self._sources.root, self._clock.unix()
        main, storage = memory(root), self._disk()
        stalled = list(self._sources.stalled())
        waiting = waiting_requests(snapshot(self._sources.metrics))
        hub, ends = self._sources.hub_unix(), self._sources.certificate_ends()
        lost = self._newly_lost(now)
        found = {
            "disk": Reading(storage.free / max(1, storage.total), f"{storage.free / 1e9:.1f} GB are free"),
            "memory": Reading(main.available / max(1, main.total), f"{main.available / 1e6:.0f} MB are free"),
            "engine_stalled": Reading(float(len(stalled)), ", ".join(stalled)[:200]),
            "outbox_lossy": Reading(float(lost), f"{lost} rows of telemetry were lost in the last hour"),
            "outbox_failing": Reading(float(bool(self._outbox.failing)), self._outbox.failing[:200]),
            "outbox_damaged": Reading(float(bool(self._outbox.moved_aside)), self._outbox.moved_aside[:200]),
        }
        if self._sources.queue_size:
            found["queue_full"] = Reading(waiting / self._sources.queue_size, f"{waiting} requests wait")
        if zones := temperatures(root):
            name, degrees = max(zones.items(), key=lambda each: each[1])
            found["temperature"] = Reading(degrees, f"{name} has {degrees:.0f} °C")
        if hub is not None:
            found["clock"] = Reading(abs(hub - wall), f"the clock is {wall - hub:+.0f} s from the hub's")
        if ends is not None:
            days = (ends - (hub if hub is not None else wall)) / _DAY_S
            found["certificate"] = Reading(days, f"the certificate ends in {days:.1f} days")
        return found

    def _disk(self) -> Disk:
        try:
            return disk(self._sources.folder)
        except OSError:
            return Disk(0, 0)  # what cannot be looked at holds nothing: the alarm is right

    def _newly_lost(self, now: float) -> int:
        """Return how many rows were lost in the last hour."""
        grown, self._lost_before = self._outbox.lost - self._lost_before, self._outbox.lost
        self._losses = [each for each in (*self._losses, (now, grown)) if each[1] and now - each[0] < LOSSY_S]
        return sum(each for _, each in self._losses)

    async def _append(self, stream: Stream, kind: str, body: Mapping[str, Any]) -> None:
        try:
            await self._outbox.append(stream, kind, body)
        except TooLargeError as error:
            LOGGER.warning("a row of telemetry is left out: %s", error)


def _wrong_rate(name: str, value: object) -> str:
    if name not in DEFAULT_RATES:
        return f"there is no such rate; there are {', '.join(DEFAULT_RATES)}"
    if isinstance(value, bool) or not isinstance(value, int | float) or not isfinite(value):
        return "it is no number of seconds"
    if value != 0 and not SHORTEST_S <= value <= LONGEST_S:
        return f"it is neither 0 nor from {SHORTEST_S:g} to {LONGEST_S:g} seconds"
    return ""


def _models(models: Sequence[ReportedModel]) -> dict[str, Any]:
    told = [msgspec.to_builtins(each) for each in models[:_MOST_MODELS]]
    return {"count": len(models), "models": told}
