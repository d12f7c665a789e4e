"""The servers that are measured, each started with the same model, KV cells, sequences and threads."""

from __future__ import annotations

import os
import shlex
import sqlite3
import subprocess
import tempfile
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from appliance.bench.client import ConnectionLostError, Response, ask
from appliance.bench.requests import CHAT, answer_text, check_complete, exactly, incompleteness
from appliance.bench.server import Server, running, running_program
from appliance.core.errors import UnavailableError
from appliance.core.settings import Settings, setting_fields
from appliance.registry.known import RegisteredModel

HERE = Path(__file__).resolve().parent
CELLS = 32_768
SEQUENCES = 8
THREADS = 2
OURS = "appliance"
PEERS = ("llama-server", "llama-cpp-python")

Messages = list[dict[str, str]]


@dataclass(frozen=True, slots=True)
class Model:
    """What is served, and by how many threads.

    Attributes:
        data: The appliance's data folder in which it is registered; only read.
        end_tokens: Ids that end an answer.
    """

    registered: RegisteredModel
    data: Path
    end_tokens: tuple[int, ...]
    threads: int = THREADS

    @property
    def path(self) -> Path:
        """Return the GGUF file."""
        return self.registered.files[0].path


@dataclass(frozen=True)
class Peer(ABC):
    """A server that can be started, and how to ask it."""

    model: Model

    @property
    @abstractmethod
    def name(self) -> str:
        """Return what the tables call it."""

    @property
    @abstractmethod
    def about(self) -> str:
        """Return in a line how it is run."""

    @abstractmethod
    def running(self, home: Path) -> AbstractAsyncContextManager[Server]:
        """Start the server, and stop it in the end by SIGTERM.

        Args:
            home: From `new_home`; what it keeps from one start to the next is there.

        Raises:
            UnavailableError: It did not become ready.
        """

    @contextmanager
    def new_home(self) -> Iterator[Path]:
        """Make a folder for one server and its successors."""
        with new_home() as home:
            yield home

    @asynccontextmanager
    async def fresh(self) -> AsyncIterator[Server]:
        """Start a server that remembers nothing, and let it answer once, so that whatever is lazy is done.

        Raises:
            UnavailableError: It did not become ready.
            ConnectionLostError: It did not answer.
        """
        with self.new_home() as home:
            async with self.running(home) as server:
                response = await ask(server.port, "POST", CHAT, self.request([user("Hello!")], 2))
                self.check(response, 2)
                yield server

    def request(self, messages: Messages, tokens: int) -> dict[str, Any]:
        """Return a streamed chat request for an answer of exactly `tokens` tokens."""
        return {"messages": messages, **exactly(self.model.registered.full_name, tokens)}

    def free_request(self, messages: Messages, tokens: int) -> dict[str, Any]:
        """Return the same for an answer that may end by itself, of at most `tokens` tokens."""
        return {**self.request(messages, tokens), "ignore_eos": False}

    def check(self, response: Response, tokens: int) -> None:
        """Make sure that an answer is whole and has exactly `tokens` tokens.

        Raises:
            ConnectionLostError: It is not; the message says how it ended.
        """
        check_complete(response, tokens)


@dataclass(frozen=True)
class Appliance(Peer):
    """Ours; `changes` are settings that differ from their defaults."""

    changes: Mapping[str, Any] = field(default_factory=dict)
    label: str = OURS

    @property
    def name(self) -> str:
        return self.label

    @property
    def given(self) -> dict[str, Any]:
        """Return the settings that are not their defaults, but for data folder and model."""
        return {
            "context_cells": CELLS,
            "max_sequences": SEQUENCES,
            "threads": self.model.threads,
            **self.changes,
        }

    @property
    def settings(self) -> Settings:
        """Return what the server is started with, but for its data folder."""
        return replace(Settings(), data_dir=self.model.data, model=self.model.registered.full_name, **self.given)

    @property
    def about(self) -> str:
        return "appliance serve; " + ", ".join(f"{name} = {value}" for name, value in self.given.items())

    def with_speculation(self, *, on: bool, label: str = OURS) -> Appliance:
        """Return it with prompt lookup as it is by default, or off; unchanged while there is no such setting."""
        if on or not has_speculation():
            return replace(self, label=label)
        return replace(self, changes={**self.changes, "speculation": "off"}, label=label)

    @contextmanager
    def new_home(self) -> Iterator[Path]:
        with home_like(self.model.data) as home:
            yield home

    def running(self, home: Path) -> AbstractAsyncContextManager[Server]:
        return running(self.settings, data_dir=home, parking_disk_bytes=self.settings.parking_disk_bytes)


@dataclass(frozen=True)
class LlamaServer(Peer):
    """llama.cpp's own server, of the same version and compiler flags as our library."""

    program: Path

    @property
    def name(self) -> str:
        return "llama-server"

    @property
    def arguments(self) -> list[str]:
        """Return the arguments that are not its defaults, but for file and port."""
        threads = str(self.model.threads)
        sizes = ["-c", str(CELLS), "-np", str(SEQUENCES), "--kv-unified"]
        return [*sizes, "--threads", threads, "--threads-batch", threads]

    @property
    def about(self) -> str:
        return f"llama-server {shlex.join(self.arguments)}; flash attention, prompt cache and the rest its defaults"

    def running(self, home: Path) -> AbstractAsyncContextManager[Server]:
        command: list[str | Path] = [
            self.program,
            "-m",
            self.model.path,
            "--host",
            "127.0.0.1",
            "--port",
            "0",
            *self.arguments,
        ]
        return running_program(command, _environment("LLAMA_", *OPENMP))


@dataclass(frozen=True)
class PackagedServer(Peer):
    """`llama_cpp.server`, which comes with llama-cpp-python: one request after another."""

    python: Path

    @property
    def name(self) -> str:
        return "llama-cpp-python"

    @property
    def arguments(self) -> list[str]:
        """Return the arguments that are not its defaults, but for file and port."""
        threads = str(self.model.threads)
        return [
            *("--n_ctx", str(CELLS), "--n_threads", threads, "--n_threads_batch", threads),
            *("--n_gpu_layers", "-1", "--interrupt_requests", "False", "--verbose", "False"),
        ]

    @property
    def about(self) -> str:
        return f"python -m llama_cpp.server {shlex.join(self.arguments)}; the rest its defaults"

    def running(self, home: Path) -> AbstractAsyncContextManager[Server]:
        command: list[str | Path] = [
            self.python,
            "-m",
            "llama_cpp.server",
            "--model",
            self.model.path,
            "--host",
            "127.0.0.1",
        ]
        return running_program(
            [*command, "--port", "0", *self.arguments],
            _environment("PYTHON", "HOST", "PORT", "CONFIG_FILE", *OPENMP),
            listening=r"running on http://127\.0\.0\.1:(\d+)",
            ready="/v1/models",
        )

    def request(self, messages: Messages, tokens: int) -> dict[str, Any]:
        bias = {str(token): -100.0 for token in self.model.end_tokens}
        return {**super().request(messages, tokens), "logit_bias": bias}

    def free_request(self, messages: Messages, tokens: int) -> dict[str, Any]:
        return super().request(messages, tokens)

    def check(self, response: Response, tokens: int) -> None:
        """See the base class; its streams do not count tokens, so the reason why they ended stands in."""
        whole = any(b'"finish_reason": "length"' in data for _, data in response.events())
        if not whole or not answer_text(response):
            fault = incompleteness(response, tokens)
            raise ConnectionLostError(f"An answer of {tokens} tokens was expected: {fault}.")


def user(content: str) -> dict[str, str]:
    """Return a message of a user."""
    return {"role": "user", "content": content}


def has_speculation() -> bool:
    """Return True if the appliance can look up its next tokens in the prompt."""
    return "speculation" in setting_fields()


def cache_folder() -> Path:
    """Return where the peers and what they work in are kept."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "appliance" / "peers"


@contextmanager
def new_home() -> Iterator[Path]:
    """Make a folder for a server to work in."""
    cache = cache_folder()
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="home.", dir=cache) as folder:
        yield Path(folder)


@contextmanager
def home_like(data: Path) -> Iterator[Path]:
    """Make a data folder for an appliance that has the models of another, which is only read."""
    with new_home() as home:
        source, target = sqlite3.connect(data / "appliance.db"), sqlite3.connect(home / "appliance.db")
        try:
            source.backup(target)
        finally:
            source.close()
            target.close()
        (home / "models").symlink_to((data / "models").resolve())
        yield home


def program_of(name: str, *, build: bool) -> Path:
    """Return the path of a peer's program.

    Args:
        name: One that `build_peer` knows.
        build: Build it if it is not there, which takes minutes; its progress goes to standard error.

    Raises:
        UnavailableError: It could not be built; standard error has the reason.
    """
    command: list[str | Path] = [HERE / "build_peer", name, *([] if build else ["--print"])]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode != 0:
        raise UnavailableError(f"{name} could not be built; the reason is above.")
    return Path(done.stdout.strip())


def peers(model: Model, names: Sequence[str], *, build: bool) -> list[Peer]:
    """Return ours and the named peers.

    Raises:
        UnavailableError: One could not be built.
    """
    found: list[Peer] = [Appliance(model)]
    for name in names:
        program = program_of(name, build=build)
        found.append(LlamaServer(model, program) if name == "llama-server" else PackagedServer(model, program))
    return found


OPENMP = ("GOMP_", "OMP_")
"""Our engine sets these as it is loaded, here too; the peers come as they are."""


def _environment(*without: str) -> dict[str, str]:
    """Return this process's environment without the variables that would change what a peer does."""
    return {name: value for name, value in os.environ.items() if not name.startswith(without)}
