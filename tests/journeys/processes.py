"""A real server process, started and ended as a person or systemd would."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import openai
import urllib3

DEADLINE_S = 60.0


class ServerProcess:
    """`appliance serve` on a free port, with what it logged."""

    def __init__(self, command: Sequence[str], environment: Mapping[str, str], log: Path) -> None:
        self._log = log
        with log.open("wb") as output:
            self.process = subprocess.Popen(command, env=environment, stdout=output, stderr=subprocess.STDOUT)
        self.pool = urllib3.PoolManager(retries=False, timeout=DEADLINE_S)
        self.port = 0
        self._clients = ExitStack()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def log(self) -> str:
        return self._log.read_text()

    def client(self, key: str = "none") -> openai.OpenAI:
        """Return a client of the official library, which is closed when the process is gone."""
        client = openai.OpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=0, timeout=DEADLINE_S)
        return self._clients.enter_context(client)

    def close(self) -> None:
        """Kill what still runs, and let go of every connection to it."""
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait(DEADLINE_S)
        self._clients.close()
        self.pool.clear()

    def get(self, path: str, **headers: str) -> tuple[int, bytes]:
        response = self.pool.request("GET", f"{self.url}{path}", headers=headers)
        return response.status, response.data

    def metric(self, name: str) -> float:
        """Return the sum of a metric's series."""
        _, text = self.get("/metrics")
        lines = [line for line in text.decode().splitlines() if line.startswith((f"{name}{{", f"{name} "))]
        return sum(float(line.rsplit(" ", 1)[1]) for line in lines)

    def wait_until_listening(self) -> None:
        def listening() -> bool:
            for line in self.log.splitlines():
                if "listening on" in line:
                    self.port = int(json.loads(line)["message"].rsplit(":", 1)[1])
                    return True
            assert self.process.poll() is None, f"the server ended: {self.log}"
            return False

        wait_until(listening, lambda: self.log)

    def wait_until_ready(self) -> None:
        self.wait_until_listening()
        wait_until(lambda: self.get("/health")[0] == 200, lambda: self.log)

    def end(self, number: int = signal.SIGTERM) -> int:
        """Send a signal and return the exit code."""
        self.process.send_signal(number)
        return self.process.wait(DEADLINE_S)


def wait_until(true: Any, tell: Any = lambda: "") -> None:
    """Ask again until something outside this process is true; fails after the deadline."""
    end = time.monotonic() + DEADLINE_S
    while not true():
        assert time.monotonic() < end, f"waited {DEADLINE_S:g} s in vain: {tell()}"
        time.sleep(0.01)  # the state is another process's: there is nothing to be woken by


@contextmanager
def server_process(
    data: Path,
    tmp_path: Path,
    *flags: str,
    script: Path | None = None,
    environment: Mapping[str, str] | None = None,
) -> Iterator[ServerProcess]:
    """Start a server; whatever happens, it is gone afterwards."""
    command = [sys.executable, *([str(script)] if script else ["-m", "appliance", "serve"])]
    flags = ("--data", str(data), "--port", "0", "--log-format", "json", *flags)
    settings = {"APPLIANCE_THREADS": "1", **(environment or {})}
    server = ServerProcess([*command, *flags], {**os.environ, **settings}, tmp_path / "server.log")
    try:
        yield server
    finally:
        server.close()


def appliance(*arguments: str, data: Path) -> subprocess.CompletedProcess[str]:
    """Run a verb of the command line to its end."""
    return subprocess.run(
        [sys.executable, "-m", "appliance", *arguments, "--data", str(data)],
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
        check=False,
    )


@contextmanager
def notify_socket(folder: Path) -> Iterator[socket.socket]:
    """Listen as systemd does for what a service tells of itself."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listener:
        listener.bind(str(folder / "notify"))
        listener.settimeout(DEADLINE_S)
        yield listener
