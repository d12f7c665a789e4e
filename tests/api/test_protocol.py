"""Hostile and unlucky peers, byte by byte."""

from __future__ import annotations

import asyncio
import contextlib
from pathlib import Path

import pytest

from appliance.web import protocol
from tests.api.boxes import DEADLINE_S, Box, ScriptedBox, post, scripted_box, until, wire
from tests.api.scripted import say

pytestmark = pytest.mark.anyio

GET = b"GET /health HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n"
CHAT = {"model": "tiny", "messages": [{"role": "user", "content": "Hello"}]}


def transports(box: Box) -> list[asyncio.Transport]:
    return [each.transport for each in box.server._state.connections]


def buffered(transport: asyncio.Transport) -> int:
    return transport.get_write_buffer_size()


async def served(box: ScriptedBox) -> bool:
    """Tell whether somebody else is still answered."""
    return (await box.chat()).status == 200


async def test_a_request_head_that_stops_is_cut_off_with_a_reason(tmp_path: Path) -> None:
    async with scripted_box(tmp_path, header_timeout_s=0.2) as box, wire(box) as slow:
        await slow.send(b"GET /health HTTP/1.1\r\nX-Slow: 1\r\n")
        answer = await slow.read_to_end()
        assert await served(box)
    assert answer.startswith(b"HTTP/1.1 400 ")
    assert b"header_timeout" in answer


async def test_trickling_does_not_gain_time_for_a_request_head(tmp_path: Path) -> None:
    async with scripted_box(tmp_path, header_timeout_s=0.2) as box, wire(box) as slow:
        await slow.send(b"GET /health HTTP/1.1\r\n")
        with contextlib.suppress(ConnectionError):  # what is sent behind the end may be answered by a reset
            while not slow.reader.at_eof():
                await slow.send(b"X-Slow: 1\r\n")
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(slow.reader.read(1000), 0.02)
        assert await served(box)


@pytest.mark.parametrize("silence", [b"", b"\r\n\r\n"])
async def test_a_connection_that_says_nothing_is_closed(tmp_path: Path, silence: bytes) -> None:
    async with scripted_box(tmp_path, header_timeout_s=0.1) as box, wire(box) as silent:
        await silent.send(silence)
        assert await silent.read_to_end() == b""


async def test_the_clock_runs_for_the_second_head_of_a_connection_too(tmp_path: Path) -> None:
    async with scripted_box(tmp_path, header_timeout_s=0.1) as box, wire(box) as slow:
        await slow.send(GET)
        assert (await slow.read_reply()).status == 200
        await slow.send(b"GET /hea")
        assert b"header_timeout" in await slow.read_to_end()


async def test_the_clock_runs_for_a_head_that_began_during_the_answer_before(tmp_path: Path) -> None:
    async with scripted_box(tmp_path, header_timeout_s=0.1) as box, wire(box) as slow:
        await slow.send(GET + b"GET /hea")
        assert (await slow.read_reply()).status == 200
        assert b"header_timeout" in await slow.read_to_end()


async def test_line_breaks_between_requests_do_not_keep_a_connection(tmp_path: Path) -> None:
    async with scripted_box(tmp_path, header_timeout_s=0.1) as box, wire(box) as slow:
        await slow.send(GET)
        await slow.read_reply()
        await slow.send(b"\r\n")
        assert await slow.read_to_end() == b""


async def test_an_idle_connection_is_kept_for_a_while_and_then_closed(tmp_path: Path) -> None:
    async with scripted_box(tmp_path, keep_alive_timeout_s=0.2) as box, wire(box) as idle:
        for _ in range(3):
            await idle.send(GET)
            assert (await idle.read_reply()).status == 200
        assert await idle.read_to_end() == b""


async def test_a_header_that_never_ends_is_refused(tmp_path: Path) -> None:
    async with scripted_box(tmp_path, max_header_bytes=4096) as box, wire(box) as bomb:
        await bomb.send(b"GET /health HTTP/1.1\r\nX-Bomb: ")
        assert await served(box)
        await bomb.send(b"x" * 5000)
        assert (await bomb.read_to_end()).startswith(b"HTTP/1.1 431 ")
        assert await served(box)


@pytest.mark.parametrize(
    "head",
    [
        b"GET /health HTTP/1.1\r\nX-Long: " + b"x" * 5000,
        b"GET /health HTTP/1.1\r\n" + b"\r\n".join(b"X-%d: y" % each for each in range(1000)),
        b"GET /health?" + b"x" * 5000 + b" HTTP/1.1",
    ],
    ids=["one long header", "many headers", "a long address"],
)
async def test_a_whole_head_that_is_too_long_is_refused_in_our_shape(tmp_path: Path, head: bytes) -> None:
    async with scripted_box(tmp_path, max_header_bytes=4096) as box, wire(box) as bomb:
        await bomb.send(head + b"\r\n\r\n")
        reply = await bomb.read_reply()
        assert reply.status == 431
        assert reply.error["code"] == "request_head_too_large"
        assert reply.headers["x-request-id"]
        assert await bomb.read_to_end() == b""
        assert await served(box)


@pytest.mark.parametrize(
    "noise", [b"\x16\x03\x01\x02\x00\x01\x00", b"hello\r\n\r\n", b"GET / HTTP/9.9\r\n\r\n", b"\x00" * 64]
)
async def test_what_is_not_http_gets_a_400(box: ScriptedBox, noise: bytes) -> None:
    async with wire(box) as other:
        await other.send(noise)
        reply = await other.read_reply()
        assert (reply.status, reply.error["code"]) == (400, "bad_http")
        assert await other.read_to_end() == b""
    assert await served(box)


async def test_noise_behind_a_running_request_does_not_garble_its_answer(box: ScriptedBox) -> None:
    go = asyncio.Event()
    box.models.script = lambda _: [go, *say("Hello")]
    async with wire(box) as other:
        await other.send(post("/v1/chat/completions", CHAT))
        await box.models.accepted.wait()
        await other.send(b"\x00\x01\x02 noise\r\n\r\n")
        assert await other.read_to_end() == b""
    async with asyncio.timeout(10):
        await box.models.generations[0].cancelled.wait()


async def test_requests_sent_ahead_are_answered_in_order(box: ScriptedBox) -> None:
    async with wire(box) as eager:
        await eager.send(GET + post("/v1/chat/completions", CHAT) + GET)
        replies = [await eager.read_reply() for _ in range(3)]
    assert [each.status for each in replies] == [200, 200, 200]
    assert replies[1].json()["object"] == "chat.completion"


async def test_an_upgrade_to_websocket_is_answered_as_plain_http(box: ScriptedBox) -> None:
    async with wire(box) as other:
        await other.send(GET[:-2] + b"Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Key: eA==\r\n\r\n")
        assert (await other.read_reply()).status == 200


async def test_one_connection_too_many_is_told_so_and_the_others_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(protocol, "CONNECTIONS_ABOVE_LIMIT", 1)
    async with scripted_box(tmp_path, max_connections=1) as box, wire(box) as first:
        await first.send(GET)
        await first.read_reply()
        async with wire(box) as second:
            await second.send(post("/v1/chat/completions", CHAT))
            reply = await second.read_reply()
            assert (reply.status, reply.error["code"]) == (503, "too_many_connections")
            assert int(reply.headers["retry-after"]) >= 1
            assert box.models.generations == []
            async with wire(box) as third, wire(box) as fourth:
                await third.send(GET)
                await fourth.send(GET)
                ends = [await each.reader.read() for each in (third, fourth)]
            assert b"" in ends
        await first.send(GET)
        assert (await first.read_reply()).status == 200


async def test_a_reader_that_stops_costs_its_text_alone_and_holds_up_nobody(box: ScriptedBox) -> None:
    more, never = asyncio.Event(), asyncio.Event()
    huge = say(*["x" * 100_000] * 200)[:-1]
    box.models.script = lambda request: say("other") if request.sampling.seed else [*huge, more, *huge, never]
    async with wire(box) as lazy:
        await lazy.send(post("/v1/chat/completions", {**CHAT, "stream": True}))
        await box.models.accepted.wait()
        generation = box.models.generations[0]
        await until(lambda: generation.delivered == 200 and max(map(buffered, transports(box))) > 0)
        held = buffered(transports(box)[0])
        more.set()
        await until(lambda: generation.delivered == 400)  # the engine is not held up by a reader that takes nothing
        assert buffered(transports(box)[0]) == held
        assert (await box.chat(seed=1)).status == 200


async def test_a_reader_that_stops_is_cut_off_and_its_work_cancelled(tmp_path: Path) -> None:
    huge = say(*["x" * 100_000] * 200)[:-1]
    async with scripted_box(tmp_path, write_timeout_s=0.2) as box, wire(box) as lazy:
        box.models.script = lambda _: [*huge, asyncio.Event()]
        await lazy.send(post("/v1/chat/completions", {**CHAT, "stream": True}))
        await box.models.accepted.wait()
        async with asyncio.timeout(DEADLINE_S):
            await box.models.generations[0].cancelled.wait()
        await until(lambda: not transports(box))


async def test_a_slow_reader_still_gets_everything(box: ScriptedBox) -> None:
    texts = [f"{number:05d}" * 20_000 for number in range(200)]
    box.models.script = lambda _: say(*texts)
    async with wire(box) as slow:
        await slow.send(post("/v1/completions", {"model": "tiny", "prompt": "x", "stream": True}, "Connection: close"))
        body = b""
        while piece := await slow.reader.read(65536):
            body += piece
            await asyncio.sleep(0)
    assert b"data: [DONE]" in body
    assert all(text.encode() in body for text in texts)
