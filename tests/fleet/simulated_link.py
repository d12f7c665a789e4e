"""A link in simulated time for `fleet.window`: blocks leave one after the other and arrive half a round trip later."""

from __future__ import annotations

import heapq
import random
from collections.abc import Callable
from dataclasses import dataclass, field

from appliance.core.fleet import BLOCK_BYTES
from appliance.fleet.window import Window


@dataclass
class SimulatedLink:
    """Attributes:
    drops: Tells of the n-th block whether it is lost for good, as a broker may drop one.
    """

    bytes_per_s: float = 2e6
    round_trip_s: float = 0.1
    late: float = 0.0
    jitter_s: float = 0.0
    noise_s: float = 0.0
    drops: Callable[[int], bool] = lambda _: False
    seed: int = 1
    now: float = 0.0
    free_at: float = 0.0
    arrived_at: float = 0.0
    sent: int = 0
    queues: list[tuple[float, float]] = field(default_factory=list)
    windows: list[int] = field(default_factory=list)
    _coming: list[tuple[float, int]] = field(default_factory=list)

    def run(self, window: Window, until: float = 10_000.0) -> float:
        """Download everything; return the seconds it took."""
        chance = random.Random(self.seed)
        while not window.done and self.now < until:
            for ask in window.ask(self.now):
                for block in ask.blocks:
                    self._send(block, chance)
            self.windows.append(window.size_bytes)
            self.queues.append((self.now, max(0.0, self.free_at - self.now)))
            wait_s = max(1e-3, min(0.5, window.ask_at() - self.now))
            if self._coming and self._coming[0][0] <= self.now + wait_s:
                self.now, block = heapq.heappop(self._coming)
                window.arrived(block, self.now)
            else:
                self.now += wait_s
        return self.now

    def _send(self, block: int, chance: random.Random) -> None:
        self.sent += 1
        if self.drops(self.sent):
            return
        asked = self.now + self.round_trip_s / 2
        self.free_at = max(self.free_at, asked) + BLOCK_BYTES / self.bytes_per_s
        late = self.round_trip_s if chance.random() < self.late else 0.0
        late += chance.expovariate(1 / self.jitter_s) if self.jitter_s else 0.0
        late += self.noise_s * (0.7 + 0.6 * chance.random()) if self.now > 5 else 0.0
        self.arrived_at = max(self.arrived_at, self.free_at + self.round_trip_s / 2 + late)
        heapq.heappush(self._coming, (self.arrived_at, block))
