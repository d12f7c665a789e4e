"""Who is measured: the appliance's room of documents and chromadb, each in a process of its own on one core."""

from __future__ import annotations

import asyncio
import os
import sys
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from appliance.core.errors import UnavailableError
from tests.benchmarks.peers import OURS, program_of
from tests.benchmarks.searching.corpus import Corpus
from tests.benchmarks.searching.jobs import Job, Kind, Made, Searched

CHROMADB = "chromadb"
PEERS = (CHROMADB,)
TIMEOUT_S = 3600.0
CHECKOUT = Path(__file__).resolve().parents[3]


@dataclass(frozen=True)
class Peer(ABC):
    """Whoever searches; it works in a folder of its own below `home`, where what it made stays until the end."""

    home: Path
    made: dict[int, dict[Kind, Made]] = field(default_factory=dict)

    @property
    @abstractmethod
    def name(self) -> str:
        """Return what the tables call it."""

    @property
    @abstractmethod
    def about(self) -> str:
        """Return in a line how it is run."""

    @property
    @abstractmethod
    def steps(self) -> Sequence[Kind]:
        """Return what it takes to have a corpus searchable."""

    @property
    @abstractmethod
    def command(self) -> Sequence[str | Path]:
        """Return the program that does a job."""

    async def build(self, corpus: Corpus) -> dict[Kind, Made]:
        """Have a corpus searchable, once; return what each step took.

        Raises:
            UnavailableError: A step failed.
        """
        if corpus.count not in self.made:
            self.made[corpus.count] = {
                kind: msgspec.json.decode(await self._do(kind, corpus), type=Made) for kind in self.steps
            }
        return self.made[corpus.count]

    async def search(self, corpus: Corpus) -> Searched:
        """Ask the corpus's queries.

        Raises:
            UnavailableError: It failed.
        """
        return msgspec.json.decode(await self._do("search", corpus), type=Searched)

    async def _do(self, kind: Kind, corpus: Corpus) -> bytes:
        folder = self.home / self.name / str(corpus.count)
        folder.mkdir(parents=True, exist_ok=True)
        process = await asyncio.create_subprocess_exec(
            *self.command,
            cwd=CHECKOUT,
            env={**os.environ, "OMP_NUM_THREADS": "1", "ANONYMIZED_TELEMETRY": "False"},
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
        )
        job = Job(kind, str(corpus.folder), str(folder), corpus.count, corpus.queries)
        try:
            async with asyncio.timeout(TIMEOUT_S):
                answer, _ = await process.communicate(msgspec.json.encode(job))
        finally:
            if process.returncode is None:
                process.kill()
                await process.wait()
        if process.returncode != 0:
            raise UnavailableError(f"{self.name} failed at {kind}; the reason is above.")
        return answer


@dataclass(frozen=True)
class Appliance(Peer):
    """Ours."""

    @property
    def name(self) -> str:
        return OURS

    @property
    def about(self) -> str:
        return "the room of documents with the settings' defaults, in process, on one core"

    @property
    def steps(self) -> Sequence[Kind]:
        return ("fill", "keywords", "vectors", "merge")

    @property
    def command(self) -> Sequence[str | Path]:
        return (sys.executable, "-m", "tests.benchmarks.searching.ours")


@dataclass(frozen=True)
class Chroma(Peer):
    """The package, in process."""

    python: Path = Path()

    @property
    def name(self) -> str:
        return CHROMADB

    @property
    def about(self) -> str:
        return "a persistent client in process on one core; HNSW's defaults, the least ef_search with a recall of .99"

    @property
    def steps(self) -> Sequence[Kind]:
        return ("vectors",)

    @property
    def command(self) -> Sequence[str | Path]:
        return (self.python, "-m", "tests.benchmarks.searching.chroma")


def peers(home: Path, names: Sequence[str]) -> list[Peer]:
    """Return ours and the named peers.

    Raises:
        UnavailableError: One could not be built.
    """
    found: list[Peer] = [Appliance(home)]
    if CHROMADB in names:
        found.append(Chroma(home, python=program_of(CHROMADB, build=True)))
    return found
