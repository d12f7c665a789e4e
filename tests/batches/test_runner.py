"""The work on batches, over real databases and files: time that runs out, overloads, restarts, and disks that fail."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from appliance.batches.room import open_batches
from appliance.batches.runner import BatchRunner
from appliance.core.batches import Batch, BatchEndpoint, Caller, LineAnswer, NewBatch
from appliance.core.errors import StorageError
from appliance.core.settings import Settings
from appliance.observe.metrics import Metrics
from appliance.web.disconnect import task_group
from tests.api.scripted_retrieval import ScriptedFiles

pytestmark = pytest.mark.anyio

CHAT: BatchEndpoint = "/v1/chat/completions"
DEADLINE_S = 60.0
ENDED = ("completed", "failed", "expired", "cancelled")


class Hands:
    """A clock that stands still, and a door that answers as it is told to.

    Attributes:
        asked: How often each line was asked for.
        script: Answers to come before the usual one.
        hold: When set, the door waits for it.
    """

    def __init__(self) -> None:
        self.now = 1_800_000_000.0
        self.asked: Counter[str] = Counter()
        self.script: list[LineAnswer] = []
        self.hold: asyncio.Event | None = None
        self.begun = asyncio.Event()

    def monotonic(self) -> float:
        return self.now

    def unix(self) -> float:
        return self.now

    def find(self, tenant: str) -> Caller | None:
        return Caller(tenant)

    async def answer(self, endpoint: BatchEndpoint, body: bytes, *, caller: Caller, request_id: str) -> LineAnswer:
        self.asked[json.loads(body)["n"]] += 1
        self.begun.set()
        if self.hold is not None:
            await self.hold.wait()
        return self.script.pop(0) if self.script else LineAnswer(200, b"{}")


@asynccontextmanager
async def running(folder: Path, hands: Hands, files: Any, **changes: Any) -> AsyncIterator[BatchRunner]:
    settings = replace(Settings(), data_dir=folder, batch_concurrency=1, **changes)
    metrics = Metrics().batches
    async with (
        asyncio.timeout(DEADLINE_S),
        open_batches(settings, hands, files=files, door=hands, callers=hands, metrics=metrics) as batches,
        task_group() as tasks,
    ):
        assert isinstance(batches, BatchRunner), "nobody else has the folder"
        work = tasks.create_task(batches.run())
        await asyncio.sleep(0)
        try:
            yield batches
        finally:
            work.cancel()


async def once(*pieces: bytes) -> AsyncIterator[bytes]:
    for each in pieces:
        yield each


async def begin(batches: BatchRunner, files: ScriptedFiles, count: int = 3, window_s: int = 3600) -> Batch:
    lines = [
        json.dumps({"custom_id": f"{n}", "method": "POST", "url": CHAT, "body": {"n": f"{n}"}}) for n in range(count)
    ]
    file = await files.create("a.jsonl", "batch", once("\n".join(lines).encode()), tenant="")
    return await batches.create(NewBatch(endpoint=CHAT, input_file=file.id, window_s=window_s), tenant="")


async def ended(batches: BatchRunner, name: str) -> Batch:
    while (batch := batches.get(name, tenant="")).status not in ENDED:  # noqa: ASYNC110  (no event of ours tells it)
        await asyncio.sleep(0.001)
    return batch


def read(files: ScriptedFiles, name: str | None) -> Sequence[Any]:
    return [] if name is None else [json.loads(each) for each in files.contents[name].splitlines()]


async def test_what_is_not_answered_in_time_expires_and_is_told_line_by_line(tmp_path: Path) -> None:
    hands, files = Hands(), ScriptedFiles()
    async with running(tmp_path, hands, files) as batches:
        begun = await begin(batches, files)
        batch = await ended(batches, begun.id)
        assert batch.status == "completed"
        hands.hold = asyncio.Event()
        hands.begun.clear()
        late = await begin(batches, files)
        await hands.begun.wait()
    hands.now += 3601
    async with running(tmp_path, hands, files) as batches:  # it ran out while the box was off
        batch = await ended(batches, late.id)
        assert (batch.status, batch.output_file) == ("expired", None)
        assert set(batch.reached) == {"validating", "in_progress", "finalizing", "expired"}
        errors = read(files, batch.error_file)
        assert [each["custom_id"] for each in errors] == ["0", "1", "2"]
        assert {each["error"]["code"] for each in errors} == {"batch_expired"}


async def test_a_batch_expires_while_a_line_is_answered(tmp_path: Path) -> None:
    hands, files = Hands(), ScriptedFiles()
    hands.hold = asyncio.Event()
    async with running(tmp_path, hands, files) as batches:
        batch = await ended(batches, (await begin(batches, files, window_s=1)).id)
        assert (batch.status, sum(hands.asked.values())) == ("expired", 1)
        hands.hold = None
        assert (await ended(batches, (await begin(batches, files)).id)).status == "completed", "no slot was lost"


async def test_an_overload_is_waited_out(tmp_path: Path) -> None:
    hands, files = Hands(), ScriptedFiles()
    hands.script = [LineAnswer(429, b"{}", retry_after_s=0.1)]
    async with running(tmp_path, hands, files) as batches:
        batch = await ended(batches, (await begin(batches, files, 2)).id)
        assert (batch.counts.completed, batch.counts.failed) == (2, 0)
        assert hands.asked == {"0": 2, "1": 1}


async def test_a_line_that_ends_the_process_again_and_again_is_given_up(tmp_path: Path) -> None:
    hands, files = Hands(), ScriptedFiles()
    hands.hold = asyncio.Event()
    name = ""
    for _ in range(4):
        hands.begun.clear()
        async with running(tmp_path, hands, files) as batches:
            name = name or (await begin(batches, files, 2)).id
            await hands.begun.wait()
    hands.hold = None
    async with running(tmp_path, hands, files) as batches:
        batch = await ended(batches, name)
    assert (batch.status, batch.counts.completed, batch.counts.failed) == ("completed", 1, 1)
    [error] = read(files, batch.error_file)
    assert (error["custom_id"], error["error"]["code"]) == ("0", "line_interrupted")


async def test_draining_begins_no_line_and_the_next_process_goes_on(tmp_path: Path) -> None:
    hands, files = Hands(), ScriptedFiles()
    hands.hold = asyncio.Event()
    async with running(tmp_path, hands, files) as batches:
        name = (await begin(batches, files)).id
        await hands.begun.wait()
        batches.drain()
        hands.hold.set()
        while batches.get(name, tenant="").counts.completed < 1:  # noqa: ASYNC110  (no event of ours tells it)
            await asyncio.sleep(0.001)
    assert hands.asked == {"0": 1}
    hands.hold = None
    async with running(tmp_path, hands, files) as batches:
        assert (await ended(batches, name)).counts.completed == 3
    assert hands.asked == {"0": 1, "1": 1, "2": 1}


async def test_an_output_that_no_file_may_hold_fails_the_batch(tmp_path: Path) -> None:
    hands, files = Hands(), ScriptedFiles(2000)
    hands.script = [LineAnswer(200, json.dumps("x" * 3000).encode())]
    async with running(tmp_path, hands, files) as batches:
        batch = await ended(batches, (await begin(batches, files)).id)
    assert (batch.status, [each.code for each in batch.errors]) == ("failed", ["output_too_large"])


class FailingFiles(ScriptedFiles):
    """Its disk fails once when an output is written."""

    failures = 1

    async def create(self, filename: str, purpose: str, content: Any, **named: Any) -> Any:
        if purpose == "batch_output" and self.failures:
            self.failures -= 1
            raise StorageError("The disk failed.")
        return await super().create(filename, purpose, content, **named)


async def test_a_disk_that_fails_is_waited_out(tmp_path: Path) -> None:
    hands, files = Hands(), FailingFiles()
    async with running(tmp_path, hands, files) as batches:
        batch = await ended(batches, (await begin(batches, files)).id)
    assert (batch.status, len(read(files, batch.output_file))) == ("completed", 3)
    assert set(hands.asked.values()) == {1}


async def test_answers_are_in_the_output_alone_once_it_is_written(tmp_path: Path) -> None:
    hands, files = Hands(), ScriptedFiles()
    hands.script = [LineAnswer(200, b'"a secret answer"')]
    async with running(tmp_path, hands, files) as batches:
        await ended(batches, (await begin(batches, files)).id)
    assert b"a secret answer" not in left_in(tmp_path)


def left_in(folder: Path) -> bytes:
    return b"".join(each.read_bytes() for each in folder.glob("batches.db*"))
