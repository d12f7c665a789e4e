"""What clients feel while a model's name comes to mean another version, and what memory that takes.

    python -m tests.benchmarks.update_switch [--streams N] [--seconds S] [--json FILE]

Needs the default model in the folder that APPLIANCE_TEST_MODEL_DATA names. The new version is a copy of it that
differs in a letter of its header, so that it is another file to the kernel. N clients stream one answer after the
other; after S seconds the new version is activated, and S seconds after it answers the measurement ends. Counted are
failed requests; the longest silence within any answer, before the wish and from the wish to the end of the last answer
of the old version; and the server's memory: with the old version alone, at its peak, and once the old one is gone.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import sys
import tempfile
import time
from contextlib import closing
from pathlib import Path

import msgspec

from appliance.bench.client import Connection, Response
from appliance.bench.requests import CHAT, chat, incompleteness, text_times
from appliance.bench.server import Server, running
from appliance.bench.streams import longest_gaps
from appliance.core.settings import Settings
from appliance.core.wishes import Soak
from appliance.registry.install import import_model
from appliance.registry.versions import open_registry
from appliance.registry.wishes import Wishes
from appliance.store.database import Database

MODEL = "smollm2-135m-instruct"
ANSWER_TOKENS = 200
TIMEOUT_S = 500.0
LOOK_S = 0.02
HEADER_BYTES = 4096
SOAK = Soak(seconds=86_400)


class Result(msgspec.Struct):
    """What was measured; times in milliseconds, memory in MiB."""

    streams: int
    requests: int
    failed: list[str]
    normal_gap_ms: float
    switch_gap_ms: float
    gap_ratio: float
    switch_s: float
    old_memory: float
    peak_memory: float
    new_memory: float


class Load:
    """Clients that stream one answer after the other."""

    def __init__(self, port: int) -> None:
        self._port = port
        self.answers: list[Response] = []
        self.failed: list[str] = []
        self.ended = False

    async def client(self, number: int) -> None:
        """Ask until the end."""
        connection = await Connection.open(self._port)
        try:
            while not self.ended:
                response = connection.send("POST", CHAT, chat(MODEL, number, ANSWER_TOKENS))
                self.answers.append(response)
                await connection.wait()
                if problem := incompleteness(response, ANSWER_TOKENS):
                    self.failed.append(problem)
        finally:
            connection.close()


def two_versions(source: Path, target: Settings) -> None:
    """Register the default model, and a copy of another digest, in a folder."""
    with closing(Database(source / "appliance.db", read_only=True)) as database:
        original = open_registry(Settings(data_dir=source), database).resolve(MODEL)
    with closing(Database(target.database_path)) as database:
        registry = open_registry(target, database)
        import_model(original.files[0].path, registry, name=MODEL, version="1", licence=original.licence)
        Wishes(database, registry).activate(f"{MODEL}:1", origin="benchmark", soak=None)
        content = bytearray(original.files[0].path.read_bytes())
        at = content.index(b"general.name", 0, HEADER_BYTES) + len(b"general.name") + 4 + 8
        content[at] ^= 0x20  # the other case of its first letter
        copy = target.data_dir / "copy.gguf"
        copy.write_bytes(content)
        import_model(copy, registry, name=MODEL, version="2", licence=original.licence)
        copy.unlink()


async def measure(settings: Settings, streams: int, seconds: float) -> Result:
    """Measure one switch."""
    with closing(Database(settings.database_path)) as database:
        wishes = Wishes(database, open_registry(settings, database))
        async with running(settings) as server, asyncio.timeout(TIMEOUT_S):
            load = Load(server.port)
            memory: list[tuple[float, int]] = []
            async with asyncio.TaskGroup() as tasks:
                clients = [tasks.create_task(load.client(number), name=f"client {number}") for number in range(streams)]
                watch = tasks.create_task(_watch(server, memory), name="memory")
                await asyncio.sleep(seconds)
                begun = time.perf_counter()
                wishes.activate(f"{MODEL}:2", origin="benchmark", soak=SOAK)
                while (wish := wishes.find(MODEL)) is None or wish.serving != "2":  # noqa: ASYNC110
                    await asyncio.sleep(LOOK_S)
                answered = time.perf_counter()
                await asyncio.sleep(seconds)
                load.ended = True
                await asyncio.wait(clients)
                wishes.confirm(MODEL, "2")
                await asyncio.sleep(seconds)
                watch.cancel()
    last_of_old = max(each.ended_at for each in load.answers if each.sent_at < answered)
    normal = 1000 * max(longest_gaps(load.answers, _first(load), begun))
    switch = 1000 * max(longest_gaps(load.answers, begun, last_of_old))
    return Result(
        streams=streams,
        requests=len(load.answers),
        failed=load.failed,
        normal_gap_ms=normal,
        switch_gap_ms=switch,
        gap_ratio=switch / normal,
        switch_s=answered - begun,
        old_memory=max(size for at, size in memory if at < begun) / 2**20,
        peak_memory=max(size for _, size in memory) / 2**20,
        new_memory=memory[-1][1] / 2**20,
    )


def _first(load: Load) -> float:
    return max(text_times(each)[0] for each in load.answers[:1])


async def _watch(server: Server, memory: list[tuple[float, int]]) -> None:
    while True:
        memory.append((time.perf_counter(), server.memory().server))
        await asyncio.sleep(5 * LOOK_S)


def main() -> None:
    """Measure, and print a line a figure."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.update_switch")
    parser.add_argument("--streams", type=int, default=4)
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    source = os.environ.get("APPLIANCE_TEST_MODEL_DATA")
    if not source:
        sys.exit("APPLIANCE_TEST_MODEL_DATA is not set: tests/check pulls the model and sets it")
    with tempfile.TemporaryDirectory() as folder:
        settings = Settings(data_dir=Path(folder), model=MODEL)
        two_versions(Path(source), settings)
        result = asyncio.run(measure(settings, arguments.streams, arguments.seconds))
    for name, value in msgspec.structs.asdict(result).items():
        print(f"{name:16} {value:.2f}" if isinstance(value, float) else f"{name:16} {value}")
    if arguments.json:
        arguments.json.write_bytes(msgspec.json.format(msgspec.json.encode(result)))


if __name__ == "__main__":
    main()
