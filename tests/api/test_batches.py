"""`/v1/batches` by the official client, on a scripted floor and on a real engine."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any, Literal

import anyio
import openai
import pytest
from openai.types import Batch

from appliance.core.types import GenerationRequest, Priority
from tests.api.boxes import DEADLINE_S, Box, ScriptedBox, scripted_box, until
from tests.api.scripted import ScriptedGeneration

pytestmark = pytest.mark.anyio

CHAT: Literal["/v1/chat/completions"] = "/v1/chat/completions"
ENDED = ("completed", "failed", "expired", "cancelled")


@pytest.fixture
async def client(any_box: Box) -> AsyncIterator[openai.AsyncOpenAI]:
    async with client_of(any_box) as each:
        yield each


def client_of(box: Box, key: str = "any") -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(base_url=f"{box.url}/v1", api_key=key, max_retries=0, timeout=60)


def line(number: int, url: str = CHAT, **changes: Any) -> dict[str, Any]:
    body = {"model": "tiny", "messages": [{"role": "user", "content": f"Say {number}"}], "max_tokens": 2}
    return {"custom_id": f"line-{number}", "method": "POST", "url": url, "body": body, **changes}


def jsonl(lines: Sequence[Any]) -> bytes:
    return b"".join((each if isinstance(each, bytes) else json.dumps(each).encode()) + b"\n" for each in lines)


async def begin(client: openai.AsyncOpenAI, lines: Sequence[Any], endpoint: Any = CHAT, **fields: Any) -> Batch:
    file = await client.files.create(file=("lines.jsonl", jsonl(lines)), purpose="batch")
    return await client.batches.create(input_file_id=file.id, endpoint=endpoint, completion_window="24h", **fields)


async def ended(client: openai.AsyncOpenAI, batch: Batch) -> Batch:
    with anyio.fail_after(DEADLINE_S):
        while batch.status not in ENDED:
            batch = await client.batches.retrieve(batch.id)
    Batch.model_validate(batch.to_dict(mode="json"), strict=False)
    return batch


async def read(client: openai.AsyncOpenAI, file: str | None) -> list[Any]:
    assert file is not None
    return [json.loads(each) for each in (await client.files.content(file)).text.splitlines()]


class Held:
    """Holds every generation at its beginning until `release` is set.

    Attributes:
        begun: How many have begun.
    """

    def __init__(self, box: ScriptedBox) -> None:
        self.begun = 0
        self.release = asyncio.Event()
        self._generate = box.models.generate
        box.models.generate = self.generate  # type: ignore[method-assign]

    async def generate(self, request: GenerationRequest) -> ScriptedGeneration:
        self.begun += 1
        await self.release.wait()
        return await self._generate(request)


async def test_every_line_has_its_answer_in_the_output_file(client: openai.AsyncOpenAI) -> None:
    begun = await begin(client, [line(each) for each in range(5)], metadata={"job": "night"})
    assert (begun.status, begun.object, begun.expires_at) == ("validating", "batch", begun.created_at + 86_400)
    batch = await ended(client, begun)
    assert batch.status == "completed"
    assert batch.request_counts is not None
    assert batch.request_counts.to_dict() == {"total": 5, "completed": 5, "failed": 0}
    assert (batch.error_file_id, batch.errors, batch.metadata) == (None, None, {"job": "night"})
    assert batch.in_progress_at
    assert batch.finalizing_at
    assert batch.completed_at
    answers = await read(client, batch.output_file_id)
    assert [each["custom_id"] for each in answers] == [f"line-{each}" for each in range(5)]
    for each in answers:
        assert each["error"] is None
        assert each["response"]["status_code"] == 200
        assert each["response"]["request_id"]
        assert each["response"]["body"]["object"] == "chat.completion"
        assert each["response"]["body"]["service_tier"] == "flex"
    assert len({each["id"] for each in answers}) == 5
    file = await client.files.retrieve(batch.output_file_id or "")
    assert file.purpose == "batch_output"


@pytest.mark.parametrize(
    ("endpoint", "body"),
    [
        ("/v1/completions", {"prompt": "Hello", "max_tokens": 2}),
        ("/v1/embeddings", {"input": "Hello"}),
        ("/v1/responses", {"input": "Hello", "max_output_tokens": 2}),
    ],
)
async def test_every_endpoint_can_be_asked(client: openai.AsyncOpenAI, endpoint: str, body: dict[str, Any]) -> None:
    wanted = line(1, endpoint, body={"model": "tiny", **body})
    batch = await ended(client, await begin(client, [wanted], endpoint))
    [answer] = await read(client, batch.output_file_id)
    assert answer["response"]["status_code"] == 200


async def test_a_line_passes_the_checks_of_the_door_and_its_error_is_in_the_error_file(
    client: openai.AsyncOpenAI,
) -> None:
    def changed(number: int, **fields: Any) -> dict[str, Any]:
        return line(number, body={**line(number)["body"], **fields})

    lines = [
        line(0),
        changed(1, model="missing"),
        changed(2, temperature=9),
        changed(3, stream=True),
        changed(4, colour="red"),
        line(5, body={}),
    ]
    batch = await ended(client, await begin(client, lines))
    assert batch.request_counts is not None
    assert (batch.status, batch.request_counts.completed, batch.request_counts.failed) == ("completed", 1, 5)
    assert [each["custom_id"] for each in await read(client, batch.output_file_id)] == ["line-0"]
    errors = {each["custom_id"]: each["response"] for each in await read(client, batch.error_file_id)}
    told = {name: (each["status_code"], each["body"]["error"]["param"]) for name, each in errors.items()}
    assert told.pop("line-1")[0] == 404
    assert told == {
        "line-2": (400, "temperature"),
        "line-3": (400, "stream"),
        "line-4": (400, "colour"),
        "line-5": (400, None),
    }


BAD_FILES = {
    "no JSON": ([line(0), b"{nonsense"], "invalid_json_line", 2),
    "no UTF-8": ([b'{"custom_id": "\xff"}'], "invalid_json_line", 1),
    "a lone surrogate": ([b'{"custom_id": "\\ud800", "method": "POST", "url": "", "body": {}}'], None, 1),
    "nested too deeply": ([b'{"custom_id": "a", "method": "POST", "url": "", "body": ' + b"[" * 100_000], None, 1),
    "no object": ([[1, 2]], "invalid_request_line", 1),
    "an id twice": ([line(0), b"", line(0)], "duplicate_custom_id", 3),
    "no id": ([{**line(0), "custom_id": ""}], "invalid_request_line", 1),
    "another url": ([line(0, "/v1/embeddings")], "mismatched_url", 1),
    "an unknown url": ([line(0, "/v1/files")], "mismatched_url", 1),
    "another method": ([{**line(0), "method": "GET"}], "invalid_request_line", 1),
    "a field too many": ([{**line(0), "colour": "red"}], "invalid_request_line", 1),
    "a body that is no object": ([line(0, body=[1])], "invalid_request_line", 1),
    "blank lines alone": ([b"", b"  "], "empty_batch", None),
    "too many lines": ([line(each) for each in range(12)], "too_many_lines", 11),
    "a line too long": ([line(0, body={"model": "x" * 5000})], "line_too_long", 1),
}


@pytest.mark.parametrize(("lines", "code", "number"), BAD_FILES.values(), ids=BAD_FILES)
async def test_a_file_that_will_not_do_fails_as_a_whole_and_nothing_is_answered(
    tmp_path: Path, lines: Sequence[Any], code: str | None, number: int | None
) -> None:
    async with scripted_box(tmp_path, max_batch_lines=10, max_body_bytes=4000) as box, client_of(box) as client:
        batch = await ended(client, await begin(client, lines))
        assert batch.status == "failed"
        assert (batch.output_file_id, batch.error_file_id) == (None, None)
        assert batch.failed_at
        assert batch.errors is not None
        assert batch.errors.data
        assert batch.errors.data[0].line == number
        assert batch.errors.data[0].code == code or code is None
        assert batch.errors.data[0].message
        assert box.models.requests == []


async def test_what_cannot_be_a_batch_is_refused_at_the_door(box: ScriptedBox) -> None:
    async with client_of(box) as client:
        other = await client.files.create(file=("a.txt", b"text"), purpose="assistants")
        file = await client.files.create(file=("a.jsonl", jsonl([line(0)])), purpose="batch")
        good = {"input_file_id": file.id, "endpoint": CHAT, "completion_window": "24h"}
        for changes, status, code in (
            ({"input_file_id": other.id}, 400, "invalid_purpose"),
            ({"input_file_id": "file-none"}, 404, "not_found"),
            ({"endpoint": "/v1/files"}, 400, "invalid_value"),
            ({"completion_window": "1h"}, 400, "invalid_value"),
            ({"metadata": {"a": 1}}, 400, "invalid_value"),
            ({"output_expires_after": {"anchor": "created_at", "seconds": 1}}, 400, "invalid_value"),
            ({"colour": "red"}, 400, "unknown_parameter"),
        ):
            reply = await box.ask("POST", "/v1/batches", {**good, **changes})
            assert (reply.status, reply.error["code"]) == (status, code), changes
        assert (await client.batches.list()).data == []


async def test_batches_and_files_belong_to_their_key(tmp_path: Path) -> None:
    async with scripted_box(tmp_path, require_api_key=True) as box:
        assert box.keys is not None
        mine, my_secret = box.keys.create("mine", ["inference"], weight=2.0, highest_tier=Priority.PRIORITY)
        _, other_secret = box.keys.create("other", ["inference"])
        async with client_of(box, my_secret) as client, client_of(box, other_secret) as other:
            batch = await ended(client, await begin(client, [line(0)]))
            assert batch.status == "completed"
            [request] = box.models.requests
            assert (request.tenant, request.weight, request.priority) == (mine.id, 2.0, Priority.FLEX)
            for ask in (other.batches.retrieve, other.batches.cancel):
                with pytest.raises(openai.NotFoundError):
                    await ask(batch.id)
            with pytest.raises(openai.NotFoundError):
                await other.batches.create(input_file_id=batch.input_file_id, endpoint=CHAT, completion_window="24h")
            with pytest.raises(openai.NotFoundError):
                await other.files.content(batch.output_file_id or "")
            assert (await other.batches.list()).data == []
            assert [each.id for each in (await client.batches.list()).data] == [batch.id]


async def test_batches_are_listed_in_pages_newest_first(box: ScriptedBox) -> None:
    async with client_of(box) as client:
        begun = [await begin(client, [line(0)]) for _ in range(5)]
        listed = [each.id async for each in client.batches.list(limit=2)]
        assert listed == [each.id for each in reversed(begun)]
        with pytest.raises(openai.NotFoundError):
            await client.batches.list(after="batch_none")


async def test_a_batch_is_cancelled_while_it_runs_and_keeps_what_it_has(tmp_path: Path) -> None:
    async with scripted_box(tmp_path, batch_concurrency=1) as box, client_of(box) as client:
        first = await ended(client, await begin(client, [line(0)]))
        with pytest.raises(openai.ConflictError) as refused:
            await client.batches.cancel(first.id)
        assert refused.value.code == "batch_ended"
        held = Held(box)
        begun = await begin(client, [line(each) for each in range(3)])
        await until(lambda: held.begun == 1)
        assert (await client.batches.retrieve(begun.id)).status == "in_progress"
        cancelled = await client.batches.cancel(begun.id)
        assert cancelled.status in ("cancelling", "cancelled")
        batch = await ended(client, cancelled)
        assert batch.status == "cancelled"
        assert batch.cancelling_at
        assert batch.cancelled_at
        assert batch.output_file_id is None
        errors = await read(client, batch.error_file_id)
        assert {each["error"]["code"] for each in errors} == {"batch_cancelled"}
        assert [each["custom_id"] for each in errors] == ["line-0", "line-1", "line-2"]
        held.release.set()
        assert held.begun == 1
        assert (await ended(client, await begin(client, [line(0)]))).status == "completed", "no slot was lost"


async def test_a_batch_whose_input_is_deleted_fails_and_keeps_what_it_has(tmp_path: Path) -> None:
    async with scripted_box(tmp_path, batch_concurrency=1) as box, client_of(box) as client:
        held = Held(box)
        begun = await begin(client, [line(each) for each in range(3)])
        await until(lambda: held.begun == 1)
        await client.files.delete(begun.input_file_id)
        held.release.set()
        batch = await ended(client, begun)
        assert batch.status == "failed"
        assert batch.errors is not None
        assert batch.errors.data is not None
        assert [each.code for each in batch.errors.data] == ["input_file_deleted"]
        assert len(await read(client, batch.output_file_id)) < 3


async def test_a_batch_whose_key_is_revoked_stops(tmp_path: Path) -> None:
    async with scripted_box(tmp_path, batch_concurrency=1, require_api_key=True) as box:
        assert box.keys is not None
        key, secret = box.keys.create("mine", ["inference"])
        async with client_of(box, secret) as client:
            held = Held(box)
            await begin(client, [line(each) for each in range(3)])
            await until(lambda: held.begun == 1)
            box.keys.revoke(key.id)
            held.release.set()
            await until(lambda: b'appliance_batches_total{status="failed"} 1.0' in box.metrics.render())
            assert held.begun == 1


async def test_only_so_many_lines_are_answered_at_once_and_batches_take_turns(tmp_path: Path) -> None:
    async with scripted_box(tmp_path, batch_concurrency=2) as box, client_of(box) as client:
        held = Held(box)
        begun = [await begin(client, [line(10 * each + number) for number in range(4)]) for each in range(2)]
        await until(lambda: held.begun == 2)
        reply = await box.ask("GET", "/health/live")  # the loop has had its turns
        assert reply.status == 200
        assert held.begun == 2
        held.release.set()
        assert [(await ended(client, each)).status for each in begun] == ["completed"] * 2


async def test_a_key_has_a_bounded_number_of_unfinished_batches(tmp_path: Path) -> None:
    async with scripted_box(tmp_path, max_batches=1) as box, client_of(box) as client:
        held = Held(box)
        begun = await begin(client, [line(0)])
        with pytest.raises(openai.RateLimitError):
            await begin(client, [line(0)])
        held.release.set()
        await ended(client, begun)
        assert (await ended(client, await begin(client, [line(0)]))).status == "completed"


async def test_output_files_expire_as_asked(client: openai.AsyncOpenAI) -> None:
    kept = {"anchor": "created_at", "seconds": 3600}
    batch = await ended(client, await begin(client, [line(0)], output_expires_after=kept))
    file = await client.files.retrieve(batch.output_file_id or "")
    assert file.expires_at == file.created_at + 3600


async def test_lines_and_batches_are_counted(box: ScriptedBox) -> None:
    async with client_of(box) as client:
        await ended(client, await begin(client, [line(0), line(1, body={})]))
        await until(lambda: b'appliance_batches_total{status="completed"} 1.0' in box.metrics.render())
        shown = box.metrics.render()
        assert b'appliance_batch_lines_total{outcome="completed"} 1.0' in shown
        assert b'appliance_batch_lines_total{outcome="failed"} 1.0' in shown
