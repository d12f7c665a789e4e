"""What a simulation has seen so far."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

_MOST_LATENCIES = 200_000


@dataclass(slots=True)
class Latencies:
    """The newest so many round trips in seconds, from a batch's publishing to the hub's word that it is committed."""

    seconds: deque[float] = field(default_factory=lambda: deque(maxlen=_MOST_LATENCIES))

    def percentiles(self, *shares: float) -> tuple[float, ...]:
        """Return for each share the smallest value that so many do not exceed, 0.0 if there are none."""
        ordered = sorted(self.seconds)
        if not ordered:
            return (0.0,) * len(shares)
        return tuple(ordered[min(len(ordered) - 1, int(each * len(ordered)))] for each in shares)


@dataclass(slots=True)
class SimulationFigures:
    """Counts since the simulation began.

    Attributes:
        devices: Simulated devices.
        connected: Of these, now.
        lost: Of these, lost on purpose.
        connects: Times that the broker accepted one.
        refusals: Times that connecting failed.
        batches: Batches of telemetry that were made.
        committed: Of these, those whose commit the hub has told.
        overflowed: Batches and reports given up because too many waited.
        repeated: Batches and reports said again because no acknowledgement had come.
        sent: Messages that the broker took over.
        unsent: Messages that met a connection that had just broken; they are sent again.
        received: Messages.
        asked: Devices that were ever given a job.
        jobs: Jobs by how they ended.
        problem: What the broker said when it refused a connection or a message last, or "".
        p50_s: Median from a batch's publishing to its commit being told, of those that needed no repetition.
        p99_s: The same, 99th percentile.
    """

    devices: int = 0
    connected: int = 0
    lost: int = 0
    connects: int = 0
    refusals: int = 0
    batches: int = 0
    committed: int = 0
    overflowed: int = 0
    repeated: int = 0
    sent: int = 0
    unsent: int = 0
    received: int = 0
    asked: int = 0
    jobs: dict[str, int] = field(default_factory=dict)
    problem: str = ""
    p50_s: float = 0.0
    p99_s: float = 0.0
