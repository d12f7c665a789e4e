"""Clients that leave, at every stage of their request."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path

import pytest

from appliance.web.disconnect import ClientGoneError, task_group, until_disconnected
from tests.api.boxes import DEADLINE_S, Box, ScriptedBox, Wire, post, scripted_box, until, wire
from tests.api.scripted import ScriptedGeneration, say

pytestmark = pytest.mark.anyio

CHAT = {"model": "tiny", "messages": [{"role": "user", "content": "Hello"}]}
STREAM = {**CHAT, "stream": True}


async def cancelled(generation: ScriptedGeneration) -> None:
    async with asyncio.timeout(DEADLINE_S):
        await generation.cancelled.wait()


async def accepted(box: ScriptedBox) -> ScriptedGeneration:
    async with asyncio.timeout(DEADLINE_S):
        await box.models.accepted.wait()
    return box.models.generations[0]


async def leave(client: Wire, *, abruptly: bool) -> None:
    if abruptly:
        client.writer.transport.abort()
    else:
        client.close()


def gone(box: ScriptedBox) -> float | None:
    labels = {"route": "/v1/chat/completions", "status": "499"}
    return box.metrics.registry.get_sample_value("appliance_http_requests_total", labels)


@pytest.mark.parametrize("abruptly", [True, False])
async def test_leaving_in_the_middle_of_a_stream_cancels_the_work(box: ScriptedBox, abruptly: bool) -> None:
    box.models.script = lambda _: [*say("Hello")[:-1], asyncio.Event()]
    async with wire(box) as client:
        await client.send(post("/v1/chat/completions", STREAM))
        await client.read_until(b'"content":"Hello"')
        await leave(client, abruptly=abruptly)
        await cancelled(await accepted(box))
    assert (await box.ask("GET", "/health")).status == 200
    assert gone(box) == 1


@pytest.mark.parametrize("document", [CHAT, STREAM])
async def test_leaving_before_the_first_token_cancels_the_work(box: ScriptedBox, document: object) -> None:
    box.models.script = lambda _: [asyncio.Event()]
    async with wire(box) as client:
        await client.send(post("/v1/chat/completions", document))
        generation = await accepted(box)
        await leave(client, abruptly=True)
        await cancelled(generation)


async def test_leaving_while_the_model_loads_submits_nothing(box: ScriptedBox) -> None:
    box.models.gate = asyncio.Event()
    async with wire(box) as client:
        await client.send(post("/v1/chat/completions", CHAT))
        await box.models.waiting.wait()
        await leave(client, abruptly=True)
        await until(lambda: gone(box) == 1)
    box.models.gate.set()
    assert box.models.generations == []


async def test_leaving_in_the_middle_of_the_body_submits_nothing(box: ScriptedBox) -> None:
    async with wire(box) as client:
        await client.send(post("/v1/chat/completions", CHAT)[:-5])
        await until(lambda: bool(box.server._state.tasks))
        await leave(client, abruptly=True)
        await until(lambda: gone(box) == 1)
    assert box.models.generations == []


async def test_one_who_leaves_does_not_hurt_another(box: ScriptedBox) -> None:
    go = asyncio.Event()
    box.models.script = lambda _: [*say("Hello")[:-1], go, *say(" again")]
    async with wire(box) as leaver, wire(box) as stayer:
        for client in (leaver, stayer):
            await client.send(post("/v1/chat/completions", STREAM))
            await client.read_until(b'"content":"Hello"')
        await leave(leaver, abruptly=True)
        await cancelled(box.models.generations[0])
        go.set()
        await stayer.read_until(b"data: [DONE]")
    assert not box.models.generations[1].cancelled.is_set()


async def test_all_prompts_of_a_request_are_cancelled_together(box: ScriptedBox) -> None:
    box.models.script = lambda _: [asyncio.Event()]
    async with wire(box) as client:
        await client.send(post("/v1/completions", {"model": "tiny", "prompt": ["One", "Two", "Three"]}))
        await until(lambda: len(box.models.generations) == 3)
        await leave(client, abruptly=True)
        for generation in box.models.generations:
            await cancelled(generation)


async def test_leaving_a_real_engine_frees_it(any_box: Box) -> None:
    if isinstance(any_box, ScriptedBox):
        any_box.models.script = lambda request: [asyncio.Event()] if request.sampling.ignore_eos else say("Hello")
    endless = {**STREAM, "max_tokens": 400, "ignore_eos": True}
    for _ in range(8):  # twice as many as there are sequences
        async with wire(any_box) as client:
            await client.send(post("/v1/chat/completions", endless))
            await client.read_until(b"\r\n\r\n")
            await leave(client, abruptly=True)
    assert (await any_box.chat(max_tokens=3)).status == 200


async def test_work_that_ends_as_its_client_leaves_still_gives_its_result() -> None:
    left = asyncio.Event()

    async def receive() -> dict[str, str]:
        await left.wait()
        return {"type": "http.disconnect"}

    async def work() -> str:
        left.set()
        await asyncio.sleep(0)  # the watcher sees it now, but nobody has been told yet
        return "owned"

    assert await until_disconnected(receive, work()) == "owned"


async def test_a_model_that_does_not_load_in_time_is_a_503(tmp_path: Path) -> None:
    async with scripted_box(tmp_path, request_timeout_s=0.1) as box:
        box.models.gate = asyncio.Event()
        for reply in (await box.chat(), await box.complete(), await box.chat(stream=True)):
            assert (reply.status, reply.error["code"]) == (503, "deadline_exceeded")
            assert reply.headers["retry-after"]
        assert box.models.generations == []


async def test_a_time_limit_of_the_work_itself_is_its_own_error() -> None:
    async def receive() -> dict[str, str]:
        await asyncio.Event().wait()
        return {}

    async def work() -> None:
        raise TimeoutError("mine")

    with pytest.raises(TimeoutError, match="mine"):
        await until_disconnected(receive, work(), limit_s=10)


async def test_the_error_of_the_work_is_raised_as_itself() -> None:
    async def receive() -> dict[str, str]:
        await asyncio.Event().wait()
        return {}

    async def work() -> None:
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        await until_disconnected(receive, work())


@pytest.mark.parametrize("left_already", [False, True])
async def test_a_clients_leaving_cancels_the_work_and_waits_for_its_end(left_already: bool) -> None:
    ended: list[str] = []
    messages = iter(({"type": "http.request"}, {"type": "http.disconnect"}))

    async def receive() -> dict[str, str]:
        if not left_already:
            await asyncio.sleep(0)
        return next(messages)

    async def work() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            ended.append("cleaned up")

    with pytest.raises(ClientGoneError):
        await until_disconnected(receive, work())
    assert ended == ["cleaned up"]


async def test_work_that_is_cancelled_from_within_is_not_waited_for() -> None:
    async def receive() -> dict[str, str]:
        await asyncio.Event().wait()
        return {}

    async def work() -> None:
        raise asyncio.CancelledError

    with pytest.raises(asyncio.CancelledError):
        async with asyncio.timeout(DEADLINE_S):
            await until_disconnected(receive, work())


async def test_a_task_groups_first_error_is_raised_as_itself() -> None:
    async def fail() -> None:
        raise KeyError("in a task")

    run: Callable[[], object]
    with pytest.raises(KeyError, match="in a task"):
        async with task_group() as group:
            run = group.create_task(fail()).done
    assert run()
