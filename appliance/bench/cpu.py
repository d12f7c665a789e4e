"""Who used the CPU during a measurement: the server, the client, or other programs that spoil the figure."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass

import psutil

from appliance.bench.server import Server


@dataclass(frozen=True, slots=True)
class CpuUse:
    """CPU seconds, and the `seconds` on the clock in which they were used.

    Attributes:
        server: Of the server and the processes that it started.
        client: Of this process.
        others: Of everything else on the machine, this process's ended children excepted.
    """

    server: float
    client: float
    others: float
    seconds: float

    @property
    def other_cores(self) -> float:
        """Return how many cores other programs kept busy on average."""
        return max(0.0, self.others) / self.seconds


class CpuMeter:
    """Measures from its making to each call of `use`."""

    def __init__(self, server: Server) -> None:
        """Begin now."""
        self._server = server
        self._began = self._now()

    def use(self) -> CpuUse:
        """Return what was used since the beginning."""
        server, client, children, machine, at = (
            after - before for after, before in zip(self._now(), self._began, strict=True)
        )
        return CpuUse(server, client, machine - server - client - children, at)

    def _now(self) -> tuple[float, ...]:
        own = os.times()
        machine = psutil.cpu_times()
        busy = machine.user + machine.nice + machine.system
        children = own.children_user + own.children_system
        return self._server.cpu_s(), own.user + own.system, children, busy, time.perf_counter()
