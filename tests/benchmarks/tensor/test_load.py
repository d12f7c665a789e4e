"""The load driver and the blocking client against a server that answers what the test says."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import cast

import pytest

from appliance.bench.client import ConnectionLostError
from appliance.bench.server import Server
from appliance.bench.suite import ungrouped
from tests.benchmarks.tensor.load import Load, offer, once
from tests.benchmarks.tensor.wire import HEAD_BYTES, Wire

pytestmark = pytest.mark.anyio

Answer = Callable[[bytes], bytes]


def echoed(body: bytes, status: str = "200 OK") -> bytes:
    return f"HTTP/1.1 {status}\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body


@asynccontextmanager
async def server(answer: Answer = echoed) -> AsyncIterator[int]:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).lower()
                length = int(head.partition(b"content-length: ")[2].partition(b"\r\n")[0])
                writer.write(answer(await reader.readexactly(length)))
        except (asyncio.IncompleteReadError, ConnectionResetError):
            writer.close()

    listener = await asyncio.start_server(serve, "127.0.0.1", 0, limit=2**20)
    try:
        yield listener.sockets[0].getsockname()[1]
    finally:
        listener.close()


def this_process(port: int) -> Server:
    """Return a server whose CPU time is that of this process."""

    class Process:
        pid = os.getpid()

    return Server(cast("asyncio.subprocess.Process", Process()), port)


async def test_clients_are_kept_busy_and_what_they_saw_is_counted() -> None:
    async with server() as port:
        load = await offer(this_process(port), "/", [b"[1]", b"[2]"], clients=3, warm_s=0.01, steady_s=0.05)
    assert load.rate > 0
    assert load.cpu_s >= 0
    assert all(0 < each < 5 for each in load.times)


async def test_an_answer_that_is_an_error_ends_the_measurement() -> None:
    async with server(lambda body: echoed(b"broken", "500 Oops")) as port:
        with pytest.raises(ConnectionLostError, match="500: broken"), ungrouped():
            await offer(this_process(port), "/", [b"{}"], clients=2, warm_s=0.01, steady_s=5.0)
        with pytest.raises(ConnectionLostError, match="500: broken"):
            await once(port, "/", b"{}")


def test_only_answers_within_the_time_count() -> None:
    load = Load(answers=[(0.5, 9.0), (1.0, 0.1), (1.9, 0.2), (2.0, 9.0)])
    assert load.times(1.0, 2.0) == [0.1, 0.2]
    assert load.rate(1.0, 2.0) == 2.0
    with pytest.raises(ConnectionLostError, match="No answer came within 1"):
        load.times(5.0, 6.0)


@pytest.mark.parametrize("size", [0, 10, HEAD_BYTES - 1, HEAD_BYTES, 300_000])
async def test_a_blocking_client_gets_whole_answers_one_after_another(size: int) -> None:
    body = bytes(range(256)) * (size // 256) + b"x" * (size % 256)

    def ask_twice(port: int) -> list[bytes]:
        with Wire(port) as wire:
            return [bytes(wire.post("/", [body[:7], memoryview(body)[7:]], "X-More: 1\r\n")[1]) for _ in range(2)]

    async with server() as port:
        assert await asyncio.to_thread(ask_twice, port) == [body, body]


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (echoed(b"no", "404 Not Found"), "404.*no"),
        (b"HTTP/1.1 200 OK\r\n\r\n", "does not say how long"),
        (echoed(b"x" * 50_000), "there is room for"),
    ],
)
async def test_a_blocking_client_refuses_answers_that_it_cannot_count(answer: bytes, message: str) -> None:
    def post(port: int) -> None:
        with Wire(port, most_bytes=100) as wire:
            wire.post("/", [b"{}"])

    async with server(lambda _: answer) as port:
        with pytest.raises(ConnectionLostError, match=message):
            await asyncio.to_thread(post, port)


async def test_nobody_listens() -> None:
    async with server() as port:
        pass
    with pytest.raises(ConnectionLostError, match="No connection"):
        Wire(port)
