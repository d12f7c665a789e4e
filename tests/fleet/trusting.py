"""A rightful hub, an intruder who has taken it over, and a device, for tests of what a device believes."""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec

from appliance.core.errors import UnavailableError
from appliance.core.fleet import PIECE_BYTES, Answer, Job, Question
from appliance.core.releases import JOB_TYPE, Release, ReleaseFile, pieces_target, release_target
from appliance.fleet.schema import MIGRATIONS
from appliance.fleet.trust import Trust
from appliance.fleet.trust_record import TrustRecord
from appliance.hub.authority import Authority
from appliance.hub.director import Director
from appliance.hub.metadata import load_roles
from appliance.security.envelopes import seal
from appliance.security.repository_files import read_slice
from appliance.security.signing import list_keys, load_key
from appliance.security.trust_rules import Mark
from appliance.store.database import Database

START = 1_800_000_000.0
DAY = 86_400.0
DEVICE = "box-1"


class HandClock:
    """A clock that the test sets by hand."""

    def __init__(self, now: float = START) -> None:
        self.now = now

    def monotonic(self) -> float:
        return self.now

    def unix(self) -> float:
        return self.now


Lie = Callable[[Question, Answer], Answer]


class Hub:
    """Answers questions for files, as the hub does; an intruder makes it lie.

    Attributes:
        lies: By the beginning of a path: gets the question and the honest answer, and returns another.
        silent: Whether there is no hub at all.
        asked: Every path that was asked for.
    """

    def __init__(self, folder: Path, clock: HandClock) -> None:
        self.clock = clock
        self.folder = folder
        self.authority = Authority(folder, clock)
        if not (folder / "repository").exists():  # a site that is visited again
            self.authority.create()
        self.director = Director(self.authority)
        self.lies: dict[str, Lie] = {}
        self.silent = False
        self.asked: list[str] = []
        self.time: float | None = None
        self.delay_s = 0.0

    async def ask(self, question: Question, *, timeout_s: float = 10.0) -> Answer:
        if self.silent:
            raise UnavailableError("There is no connection.")
        await asyncio.sleep(self.delay_s)
        return self.answer(question)

    def answer(self, question: Question) -> Answer:
        self.asked.append(question.path)
        now = self.clock.now if self.time is None else self.time
        answer = read_slice(self.authority.repository.folder, question.path, question.offset, now=now)
        for start, lie in self.lies.items():
            if question.path.startswith(start):
                return lie(question, answer)
        return answer

    def serve(self, path: str, data: bytes) -> None:
        """Lie about a whole file."""
        self.lies[path] = lambda question, answer: Answer(
            ok=True, data=data[question.offset : question.offset + 65536], total=len(data), now=answer.now
        )

    def hide(self, path: str) -> None:
        self.lies[path] = lambda question, answer: Answer(ok=False, now=answer.now, code="not_found")

    def metadata(self) -> dict[str, bytes]:
        return self.authority.repository.metadata()

    def replay(self, files: dict[str, bytes]) -> None:
        """Serve the metadata of another day, and nothing else of it."""
        self.lies["metadata/"] = lambda question, answer: Answer(ok=False, now=answer.now, code="not_found")
        lies = {}
        for name, data in files.items():
            self.serve(f"metadata/{name}", data)
            lies[f"metadata/{name}"] = self.lies[f"metadata/{name}"]
        self.lies = {**lies, "metadata/": self.lies["metadata/"]}

    def release(self, model: str = "chat", content: bytes = b"weights", **fields: Any) -> Release:
        """Sign a release of one file, as `hub releases add` does."""
        counter = self.authority.roles().counters().get(model, 0) + 1
        digest = hashlib.sha256(content).hexdigest()
        file = ReleaseFile("model", len(content), digest)
        release = Release(
            model, f"v{counter}", counter, "gguf", "chat", "Apache-2.0", (file,), created=self.clock.now, **fields
        )
        pieces = [content[at : at + PIECE_BYTES] for at in range(0, len(content), PIECE_BYTES)]
        self.authority.change_targets(
            {
                release_target(model, counter): msgspec.json.encode(release),
                pieces_target(model, counter, digest): b"".join(hashlib.sha256(each).digest() for each in pieces),
            },
            counters={model: counter},
        )
        return release

    def job(self, release: Release, version: int = 1, **fields: Any) -> Job:
        data = msgspec.json.encode(release)
        values: dict[str, Any] = {
            "target": release_target(release.model, release.counter),
            "length": len(data),
            "digest": hashlib.sha256(data).hexdigest(),
            "counter": release.counter,
        }
        return Job(DEVICE, f"job-{version}", version, "install", **{**values, **fields})

    def signed(self, job: Job) -> bytes:
        return self.director.sign(msgspec.json.encode(job), JOB_TYPE)


class Intruder:
    """Has taken the hub over: knows the keys that lie there, and lets the hub answer with what he signs."""

    def __init__(self, hub: Hub) -> None:
        self.hub = hub
        self.keys = {each.role: load_key(each.path) for each in list_keys([hub.authority.online_folder])}
        self.roles = load_roles(hub.metadata())

    def sign(self, *, snapshot: int | None = None, timestamp: int | None = None) -> None:
        """Sign snapshot and timestamp, with versions of his choice, and serve them."""
        now = self.hub.clock.now
        roles = self.roles
        roles.snapshot.signed.version = snapshot - 1 if snapshot else roles.snapshot.signed.version
        roles.timestamp.signed.version = timestamp - 1 if timestamp else roles.timestamp.signed.version
        roles.sign_snapshot(now, [self.keys["snapshot"]])
        roles.sign_timestamp(now, [self.keys["timestamp"]])
        for name, data in roles.written.items():
            self.hub.serve(f"metadata/{name}", data)

    def order(self, job: Job) -> bytes:
        """Sign a job as the director."""
        return seal(msgspec.json.encode(job), JOB_TYPE, [self.keys["director"]])


class Device:
    """A device that trusts a hub; `restart` opens its record anew."""

    def __init__(self, folder: Path, hub: Hub, asking: Any = None) -> None:
        self.path = folder / "fleet.db"
        self.hub = hub
        self.asking = asking or hub
        self.floors: dict[str, int] = {}
        self.built = hub.clock.now - DAY
        self.file_timeout_s = 20.0
        self._open()

    def _open(self) -> None:
        self.database = Database(self.path, migrations=MIGRATIONS)
        self.record = TrustRecord(self.database)
        self.trust = Trust(
            DEVICE,
            self.record,
            self.asking,
            release_floor=lambda model: self.floors.get(model, 0),
            built=self.built,
            file_timeout_s=self.file_timeout_s,
        )

    async def enrol(self) -> None:
        await self.record.anchor(self.hub.authority.root())

    def restart(self) -> None:
        self.database.close()
        self._open()

    def marks(self) -> dict[str, Mark]:
        return dict(self.record.kept().marks)

    def state(self) -> dict[str, list[tuple[Any, ...]]]:
        """Return every row of the record: what must not have changed after a refusal."""
        tables = ("trust_anchor", "trust_documents", "trust_marks", "trust_files", "trust_seen")
        return self.database.read(
            lambda each: {
                table: sorted(tuple(row) for row in each.execute(f"SELECT * FROM {table}")) for table in tables
            }
        )

    def spoil(self, sql: str) -> None:
        """Damage the record, as a torn page or a bit flip would."""
        self.database.write_blocking(lambda each: each.execute(sql).rowcount)


def changed(data: bytes, change: Callable[[dict[str, Any]], object]) -> bytes:
    """Return a JSON document after a change."""
    document = json.loads(data)
    change(document)
    return json.dumps(document, separators=(",", ":")).encode()
