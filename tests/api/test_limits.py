"""Limits of request bodies, and that who is refused can read why."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from appliance.web import limits
from tests.api.boxes import post, scripted_box, wire

pytestmark = pytest.mark.anyio

CHAT = {"model": "tiny", "messages": [{"role": "user", "content": "Hello"}]}
HEAD = "POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%s\r\n" % (len(data), data)


async def test_a_body_that_says_it_is_too_large_is_refused_before_it_is_read(tmp_path: Path) -> None:
    async with scripted_box(tmp_path, max_body_bytes=1000) as box:
        reply = await box.chat("x" * 1000)
        assert reply.status == 413
        assert "1000 are allowed" in reply.error["message"]
        assert reply.headers["connection"] == "close"
        assert box.models.generations == []
        assert (await box.chat("x" * 800)).status == 200


async def test_a_body_without_length_is_counted(tmp_path: Path) -> None:
    async with scripted_box(tmp_path, max_body_bytes=1000) as box, wire(box) as sly:
        await sly.send(f"{HEAD}Transfer-Encoding: chunked\r\n\r\n".encode())
        for _ in range(3):
            await sly.send(chunk(b" " * 400))
        reply = await sly.read_reply()
        assert (reply.status, reply.error["code"]) == (413, "too_large")
        await sly.send(chunk(b" " * 400) + chunk(b""))
        assert await sly.read_to_end() == b""
        assert box.models.generations == []


async def test_a_body_in_chunks_is_read_whole(tmp_path: Path) -> None:
    async with scripted_box(tmp_path) as box, wire(box) as steady:
        await steady.send(f"{HEAD}Transfer-Encoding: chunked\r\n\r\n".encode())
        body = json.dumps(CHAT).encode()
        for place in range(0, len(body), 10):
            await steady.send(chunk(body[place : place + 10]))
        await steady.send(chunk(b""))
        assert (await steady.read_reply()).status == 200
        await steady.send(post("/v1/chat/completions", CHAT))
        assert (await steady.read_reply()).status == 200


async def test_a_body_that_trickles_in_is_a_400_so_that_no_client_retries_it(tmp_path: Path) -> None:
    async with scripted_box(tmp_path, body_timeout_s=0.2) as box, wire(box) as slow:
        await slow.send(f'{HEAD}Content-Length: 100\r\n\r\n{{"model"'.encode())
        reply = await slow.read_reply()
        assert (reply.status, reply.error["code"]) == (400, "body_timeout")
        assert "8 bytes had come" in reply.error["message"]
        assert reply.headers["connection"] == "close"
        assert box.models.generations == []


async def test_the_rest_of_a_refused_body_is_not_read_for_ever(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "LINGER_S", 0.2)
    async with scripted_box(tmp_path, max_body_bytes=1000) as box, wire(box) as stuck:
        await stuck.send(f"{HEAD}Content-Length: 100000\r\n\r\n".encode() + b" " * 500)
        assert (await stuck.read_reply()).status == 413
        assert await stuck.read_to_end() == b""


async def test_the_rest_of_a_refused_body_is_not_read_without_end(tmp_path: Path) -> None:
    async with scripted_box(tmp_path, max_body_bytes=1000) as box, wire(box) as flood:
        await flood.send(f"{HEAD}Content-Length: 100000000\r\n\r\n".encode())
        assert (await flood.read_reply()).status == 413

        async def send_all() -> None:
            for _ in range(1000):
                await flood.send(b" " * 65536)

        with pytest.raises(ConnectionError):
            await send_all()


async def test_a_client_that_asks_before_it_sends_is_refused_at_once(tmp_path: Path) -> None:
    async with scripted_box(tmp_path, max_body_bytes=1000) as box, wire(box) as polite:
        await polite.send(f"{HEAD}Expect: 100-continue\r\nContent-Length: 100000\r\n\r\n".encode())
        assert (await polite.read_reply()).status == 413
        assert await polite.read_to_end() == b""


async def test_a_client_that_asks_before_it_sends_is_told_to_go_on(tmp_path: Path) -> None:
    async with scripted_box(tmp_path) as box, wire(box) as polite:
        request = post("/v1/chat/completions", CHAT, "Expect: 100-continue")
        head, _, body = request.partition(b"\r\n\r\n")
        await polite.send(head + b"\r\n\r\n")
        assert await polite.read_until(b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"
        await polite.send(body)
        assert (await polite.read_reply()).status == 200


async def test_a_body_that_nobody_wants_ends_the_connection(tmp_path: Path) -> None:
    async with scripted_box(tmp_path) as box, wire(box) as odd:
        await odd.send(b"GET /health HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 5\r\n\r\nhe")
        reply = await odd.read_reply()
        assert (reply.status, reply.headers["connection"]) == (200, "close")
        await odd.send(b"llo")
        assert await odd.read_to_end() == b""


async def test_a_prompt_over_the_limit_is_a_400_with_both_figures(tmp_path: Path) -> None:
    async with scripted_box(tmp_path, max_prompt_characters=10) as box:
        for reply, param in (
            (await box.chat("热" * 11), "messages"),
            (await box.complete(["abcdef", "ghijkl"]), "prompt"),
            (await box.complete(list(range(12))), "prompt"),
            (await box.ask("POST", "/v1/tokenize", {"model": "tiny", "prompt": "x" * 11}), "prompt"),
        ):
            assert (reply.status, reply.error["code"], reply.error["param"]) == (400, "prompt_too_long", param)
            assert "10 are allowed" in reply.error["message"]
        assert box.models.generations == []
        assert (await box.chat("热" * 10)).status == 200
