"""Who is measured: the appliance, raw onnxruntime, and MLServer, all with the same threads for the same files."""

from __future__ import annotations

import os
import shutil
import socket
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import msgspec

from appliance.bench.server import Server, running, running_program
from appliance.core.settings import Settings
from tests.benchmarks.peers import OURS, home_like, new_home, program_of
from tests.benchmarks.tensor.models import ECHO, ENCODER, POOLED, TABULAR, Models

THREADS = 2
RAW, MLSERVER, STOCK = "onnxruntime", "mlserver", "mlserver as it comes"
PEERS = (RAW, MLSERVER)
RUNTIME = Path(__file__).with_name("mlserver_runtime.py")
BATCHED = (POOLED, ENCODER)
SERVED = (*BATCHED, ECHO, TABULAR)


@dataclass(frozen=True)
class Peer(ABC):
    """Whoever evaluates models."""

    models: Models
    threads: int

    @property
    @abstractmethod
    def name(self) -> str:
        """Return what the tables call it."""

    @property
    @abstractmethod
    def about(self) -> str:
        """Return in a line how it is run."""


@dataclass(frozen=True)
class RawSession(Peer):
    """No server at all; see `raw.py`."""

    @property
    def name(self) -> str:
        return RAW

    @property
    def about(self) -> str:
        return (
            f"sessions in a process of its own, {self.threads} threads, at the best batch size and number of "
            "evaluations at once, the rest its defaults"
        )


@dataclass(frozen=True)
class ServingPeer(Peer):
    """A server that can be started."""

    @abstractmethod
    def running(self) -> AbstractAsyncContextManager[Server]:
        """Start the server in a folder of its own, and stop it in the end.

        Raises:
            UnavailableError: It did not become ready.
        """


@dataclass(frozen=True)
class Appliance(ServingPeer):
    """Ours.

    Attributes:
        data: The data folder in which the models are registered; only read.
        changes: Settings that differ from those of the other workloads.
    """

    data: Path
    changes: Mapping[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return OURS

    @property
    def given(self) -> dict[str, Any]:
        """Return the settings that are not their defaults, but for the data folder."""
        return {
            "threads": self.threads,
            "onnx_threads": self.threads,
            "embedding_cache_bytes": 0,
            "log_level": "warning",  # as the peers: they log no requests
            "model": "",
            **self.changes,
        }

    @property
    def settings(self) -> Settings:
        """Return what the server is started with, but for its data folder."""
        return replace(Settings(), data_dir=self.data, **self.given)

    @property
    def about(self) -> str:
        return "appliance serve; " + ", ".join(f"{name} = {value}" for name, value in self.given.items() if value != "")

    def with_chat(self) -> Appliance:
        """Return it with its default chat model loaded at start, and prompt lookup off."""
        return replace(self, changes={**self.changes, "model": Settings().model, "speculation": "off"})

    @asynccontextmanager
    async def running(self) -> AsyncIterator[Server]:
        with home_like(self.data) as home:
            async with running(self.settings, data_dir=home) as server:
                yield server


@dataclass(frozen=True, slots=True)
class Tuning:
    """How MLServer evaluates.

    Attributes:
        lanes: Evaluations at once, which share the threads.
        workers: Processes that evaluate; 0 is the server's own.
        rows: Most requests of a batch; 0 batches nothing.
        wait_s: Longest time that a batch waits for more.
    """

    lanes: int
    workers: int
    rows: int
    wait_s: float

    def __str__(self) -> str:
        batches = f"batches of up to {self.rows} within {self.wait_s:g} s" if self.rows else "no batches"
        return f"parallel_workers {self.workers}, {batches} of encoders, {self.lanes} evaluations at once"


BATCHINGS = {0: ((0, 0.0), (8, 0.01), (16, 0.02), (32, 0.05)), 1: ((0, 0.0), (16, 0.02))}
"""What is tried before MLServer is measured, by workers: most requests of a batch, and how long it waits for them."""


AS_IT_COMES = Tuning(lanes=1, workers=1, rows=0, wait_s=0.0)
"""MLServer's defaults: one process that evaluates, no batches; a session has all threads, as onnxruntime's defaults."""


@dataclass(frozen=True)
class MLServer(ServingPeer):
    """The package, with a runtime for ONNX files as its manual tells to write one."""

    program: Path
    tuning: Tuning = Tuning(lanes=1, workers=0, rows=8, wait_s=0.01)
    is_stock: bool = False

    @property
    def name(self) -> str:
        return STOCK if self.is_stock else MLSERVER

    def as_it_comes(self) -> MLServer:
        """Return it with its defaults, as a contestant of its own."""
        return replace(self, tuning=AS_IT_COMES, is_stock=True)

    @property
    def about(self) -> str:
        return f"mlserver start; {self.tuning}, {self.session_threads} threads each; debug off"

    @property
    def session_threads(self) -> int:
        """Return the threads of one evaluation."""
        return max(1, self.threads // self.tuning.lanes)

    @property
    def candidates(self) -> list[Tuning]:
        """Return what is tried before it is measured: one evaluation with all threads, or as many as there are."""
        return [
            Tuning(lanes, workers, rows, wait_s)
            for lanes in sorted({1, self.threads})
            for workers, batchings in BATCHINGS.items()
            for rows, wait_s in batchings
        ]

    @asynccontextmanager
    async def running(self) -> AsyncIterator[Server]:
        with new_home() as home:
            self._configure(home)
            async with running_program(
                [self.program, "start", home],
                _environment(),
                listening=r"HTTP server running on http://127\.0\.0\.1:(\d+)",
                ready="/v2/health/ready",
            ) as server:
                yield server

    def _configure(self, home: Path) -> None:
        http, grpc, metrics = free_ports(3)
        settings = {
            "host": "127.0.0.1",
            "http_port": http,
            "grpc_port": grpc,
            "metrics_port": metrics,
            "metrics_dir": str(home / "metrics"),
            "environments_dir": str(home / "environments"),
            "parallel_workers": self.tuning.workers,
            "debug": False,
        }
        (home / "settings.json").write_bytes(msgspec.json.encode(settings))
        for name in SERVED:
            folder = home / name
            folder.mkdir()
            shutil.copyfile(RUNTIME, folder / RUNTIME.name)
            extra = {"threads": self.session_threads, "lanes": self.tuning.lanes}
            batching = {"max_batch_size": self.tuning.rows, "max_batch_time": self.tuning.wait_s}
            model = {
                "name": name,
                "implementation": f"{RUNTIME.stem}.OnnxModel",
                "parameters": {"uri": str(self.models.path(name)), "extra": extra},
                **(batching if name in BATCHED else {}),
            }
            (folder / "model-settings.json").write_bytes(msgspec.json.encode(model))


def free_ports(count: int) -> list[int]:
    """Return ports of loopback on which nobody listens now, for a program that cannot choose by itself."""
    sockets = [socket.socket() for _ in range(count)]
    try:
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [int(each.getsockname()[1]) for each in sockets]
    finally:
        for each in sockets:
            each.close()


def peers(models: Models, data: Path, names: Sequence[str], threads: int, *, build: bool) -> list[Peer]:
    """Return ours and the named peers.

    Raises:
        UnavailableError: One could not be built.
    """
    found: list[Peer] = [Appliance(models, threads, data)]
    if RAW in names:
        found.append(RawSession(models, threads))
    if MLSERVER in names:
        found.append(MLServer(models, threads, program_of(MLSERVER, build=build)))
    return found


def _environment() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if not name.startswith(("MLSERVER_", "PYTHON"))}
