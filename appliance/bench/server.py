"""A server under measurement, as a process of its own on a free port of loopback."""

from __future__ import annotations

import asyncio
import os
import re
import sys
import time
from collections import deque
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import psutil

from appliance.bench.client import Connection, ConnectionLostError
from appliance.core.errors import UnavailableError
from appliance.core.settings import ENVIRONMENT_PREFIX, Settings, setting_fields

READY_TIMEOUT_S = 300.0
STOP_TIMEOUT_S = 60.0
POLL_S = 0.01
LISTENING = r"listening on http://127\.0\.0\.1:(\d+)"
"""How the appliance tells its port."""
_OURS: dict[str, Any] = {
    "host": "127.0.0.1",
    "port": 0,
    "tls_certificate": None,
    "tls_key": None,
    "insecure": False,
    "require_api_key": False,
    "shutdown_grace_s": 1.0,
    "log_level": "info",
    "log_format": "json",
    "parking_disk_bytes": 0,
}
"""Settings that a measurement decides by itself: it needs no keys and no certificates, ends soon and leaves nothing."""


class ResidentMemory(msgspec.Struct, frozen=True):
    """Resident bytes of the server's process, and of the processes that it started."""

    server: int
    children: int


@dataclass(slots=True)
class Server:
    """A server that runs.

    Attributes:
        port: Where it listens.
        ready_s: Seconds from starting the program until it was ready.
    """

    process: asyncio.subprocess.Process
    port: int = 0
    ready_s: float = 0.0

    def memory(self) -> ResidentMemory:
        """Return the memory that it occupies now; shared pages, such as the model file's, count."""
        process = psutil.Process(self.process.pid)
        return ResidentMemory(process.memory_info().rss, sum(_resident(each) for each in process.children(True)))

    def proportional_memory(self) -> int:
        """Return the bytes that server and children occupy now; a page that several processes share counts once.

        This is Linux's PSS: unlike the sum of what each of them has resident, it is what the machine is short of.
        """
        process = psutil.Process(self.process.pid)
        return sum(int(each.memory_full_info().pss) for each in (process, *process.children(True)))

    def cpu_s(self) -> float:
        """Return the CPU seconds that the server and its children have used."""
        process = psutil.Process(self.process.pid)
        times = [process.cpu_times(), *(each.cpu_times() for each in process.children(True))]
        return float(sum(each.user + each.system for each in times))


def environment_for(settings: Settings, inherited: Mapping[str, str], **changes: Any) -> dict[str, str]:
    """Return the environment in which a server has the given settings, whatever is inherited.

    Args:
        settings: Taken over, but for those about where to listen and whom to let in.
        inherited: This process's environment; its settings are left out.
        changes: Settings that differ in this measurement.
    """
    values = {name: getattr(settings, name) for name in setting_fields()} | _OURS | changes
    environment = {name: value for name, value in inherited.items() if not name.startswith(ENVIRONMENT_PREFIX)}
    for name, value in values.items():
        environment[ENVIRONMENT_PREFIX + name.upper()] = _as_text(value)
    return environment


@asynccontextmanager
async def running(settings: Settings, **changes: Any) -> AsyncIterator[Server]:
    """Start `appliance serve`, wait until it is ready, and stop it in the end.

    Args:
        settings: See `environment_for`.
        changes: Settings that differ in this measurement.

    Raises:
        UnavailableError: It ended or did not become ready; the message has its last log lines.
    """
    command = [sys.executable, "-m", "appliance", "serve"]
    async with running_program(command, environment_for(settings, os.environ, **changes)) as server:
        yield server


@asynccontextmanager
async def running_program(
    command: Sequence[str | Path],
    environment: Mapping[str, str],
    *,
    listening: str = LISTENING,
    ready: str = "/health",
) -> AsyncIterator[Server]:
    """Start a program that serves HTTP on loopback, wait until it is ready, and stop it in the end.

    Args:
        command: The program and its arguments.
        environment: All of its environment.
        listening: Regular expression of the log line that tells the port, its first group.
        ready: Path that answers 200 when requests can be answered.

    Raises:
        UnavailableError: It ended or did not become ready; the message has its last log lines.
    """
    started = time.perf_counter()
    process = await asyncio.create_subprocess_exec(
        *command,
        env=environment,
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    server = Server(process)
    log = _Log(process, re.compile(listening))
    async with asyncio.TaskGroup() as tasks:
        reading = tasks.create_task(log.read(), name="log of the server")
        try:
            await _become_ready(server, log, ready, started)
            yield server
        finally:
            await _stop(process)
            await reading


class _Log:
    """Reads what the server logs, so that it never waits for us, and keeps the port and the last lines."""

    def __init__(self, process: asyncio.subprocess.Process, listening: re.Pattern[str]) -> None:
        self._process = process
        self._listening = listening
        self._last: deque[str] = deque(maxlen=5)
        self.port: int | None = None

    async def read(self) -> None:
        assert self._process.stdout is not None
        async for line in self._process.stdout:
            text = line.decode(errors="replace").strip()
            self._last.append(text)
            found = self._listening.search(text)
            if found:
                self.port = int(found[1])

    @property
    def last_words(self) -> str:
        return " | ".join(self._last) or "(nothing)"


async def _become_ready(server: Server, log: _Log, ready: str, started: float) -> None:
    try:
        async with asyncio.timeout(READY_TIMEOUT_S):
            while not await _is_ready(log.port, ready):
                if server.process.returncode is not None:
                    raise UnavailableError(
                        f"The server ended with exit code {server.process.returncode} before it was ready. "
                        f"It logged: {log.last_words}"
                    )
                await asyncio.sleep(POLL_S)
    except TimeoutError as error:
        raise UnavailableError(
            f"The server was not ready after {READY_TIMEOUT_S:g} s. It logged: {log.last_words}"
        ) from error
    server.ready_s = time.perf_counter() - started
    assert log.port is not None
    server.port = log.port


async def _is_ready(port: int | None, path: str) -> bool:
    if port is None:
        return False
    try:
        with await Connection.open(port) as connection:
            return (await connection.request("GET", path)).status == 200
    except ConnectionLostError:
        return False  # it may be about to end; its exit code says so next


async def _stop(process: asyncio.subprocess.Process) -> None:
    if process.returncode is None:
        process.terminate()
    try:
        async with asyncio.timeout(STOP_TIMEOUT_S):
            await process.wait()
    except TimeoutError:
        process.kill()
        await process.wait()


def _as_text(value: Any) -> str:
    if value is None:
        return ""
    return str(value).lower() if isinstance(value, bool) else str(value)


def _resident(process: psutil.Process) -> int:
    try:
        return int(process.memory_info().rss)
    except psutil.NoSuchProcess:
        return 0
