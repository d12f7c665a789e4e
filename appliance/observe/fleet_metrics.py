"""Prometheus metrics of the agent that talks to the fleet's hub."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge

PREFIX = "appliance_fleet_"
OUTCOMES = ("done", "failed", "refused", "repeated")


class FleetMetrics:
    """The series of the agent, at 0 also on a box without a hub."""

    def __init__(self, registry: CollectorRegistry) -> None:
        """Make every series at 0; `Metrics` has the one of the process."""
        self._connected = Gauge(f"{PREFIX}connected", "1 while connected to the fleet's broker", registry=registry)
        self._sessions = Counter(f"{PREFIX}connects", "Sessions opened at the fleet's broker", registry=registry)
        self._failures = Counter(f"{PREFIX}part_failures", "Failures of parts of the fleet's agent", registry=registry)
        self._commands = Counter(f"{PREFIX}commands", "Commands of the hub", ["outcome"], registry=registry)
        self._desired = Counter(f"{PREFIX}desired", "Desired twins of the hub", ["outcome"], registry=registry)
        for outcome in OUTCOMES:
            self._commands.labels(outcome)
        for outcome in ("applied", "refused"):
            self._desired.labels(outcome)

    def connected(self) -> None:
        """Count a session that was opened."""
        self._connected.set(1)
        self._sessions.inc()

    def disconnected(self) -> None:
        """Note that the session ended."""
        self._connected.set(0)

    def part_failed(self) -> None:
        """Count a part of the agent that raised."""
        self._failures.inc()

    def command(self, outcome: str) -> None:
        """Count a command by what became of it: one of `OUTCOMES`."""
        self._commands.labels(outcome).inc()

    def desired(self, *, applied: bool) -> None:
        """Count a desired twin."""
        self._desired.labels("applied" if applied else "refused").inc()
