"""The measuring client against servers that misbehave."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

import pytest

from appliance.bench.client import Connection, ConnectionLostError, ask
from appliance.bench.requests import answer_text, first_token_s, incompleteness, text_times, usage

pytestmark = pytest.mark.anyio

DEADLINE_S = 10.0
HEAD = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nX-Answer: Yes\r\n\r\n"
TEXT = b'data: {"choices":[{"delta":{"content":"a"}}]}\n\n'
USAGE = b'data: {"choices":[],"usage":{"completion_tokens":2}}\n\n'
DONE = b"data: [DONE]\n\n"


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%s\r\n" % (len(data), data)


@asynccontextmanager
async def answering(pieces: Sequence[bytes], *, then_close: bool = True) -> AsyncIterator[int]:
    """Serve one canned answer a connection, its pieces apart; yields the port."""

    handlers = []

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        handlers.append(asyncio.current_task())
        await reader.readuntil(b"\r\n\r\n")
        for piece in pieces:
            writer.write(piece)
            await writer.drain()
            await asyncio.sleep(0)
        if not then_close:
            await reader.read()
        writer.close()

    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    async with asyncio.timeout(DEADLINE_S):
        yield server.sockets[0].getsockname()[1]
        server.close()
        await asyncio.gather(*(each for each in handlers if each is not None))


async def test_events_are_whole_however_the_bytes_are_cut() -> None:
    body = TEXT + b": keep-alive\n\n" + TEXT + USAGE + DONE
    stream = HEAD + b"".join(chunk(body[at : at + 5]) for at in range(0, len(body), 5)) + chunk(b"")
    async with answering([stream[at : at + 7] for at in range(0, len(stream), 7)]) as port:
        response = await ask(port, "GET", "/")
    assert response.status == 200
    assert response.headers["x-answer"] == "Yes"
    assert [data for _, data in response.events()][-1] == b"[DONE]"
    times = text_times(response)
    assert len(times) == 2
    assert response.sent_at <= times[0] <= times[1] <= response.ended_at
    assert incompleteness(response, 2) == ""
    assert "2 tokens" in incompleteness(response, 3)


async def test_lines_of_events_may_end_in_crlf() -> None:
    body = (TEXT + b": ping\n\n" + USAGE + DONE).replace(b"\n", b"\r\n")
    stream = HEAD + b"".join(chunk(body[at : at + 1]) for at in range(len(body))) + chunk(b"")
    async with answering([stream]) as port:
        response = await ask(port, "GET", "/")
    assert len(text_times(response)) == 1
    assert answer_text(response) == "a"
    assert usage(response) == {"completion_tokens": 2}
    assert incompleteness(response, 2) == ""


async def test_a_stream_without_its_end_is_not_complete() -> None:
    async with answering([HEAD + chunk(TEXT) + chunk(b"")]) as port:
        response = await ask(port, "GET", "/")
    assert "[DONE]" in incompleteness(response, 1)
    assert usage(response) == {}


async def test_an_answer_without_text_has_no_first_token() -> None:
    async with answering([HEAD + chunk(USAGE) + chunk(DONE) + chunk(b"")]) as port:
        response = await ask(port, "GET", "/")
    with pytest.raises(ConnectionLostError, match="no text"):
        first_token_s(response)


async def test_an_error_status_is_not_complete_and_is_no_json_answer() -> None:
    async with answering([b"HTTP/1.1 503 Busy\r\nContent-Length: 4\r\n\r\nbusy"]) as port:
        response = await ask(port, "GET", "/")
    assert "503: busy" in incompleteness(response, 1)
    with pytest.raises(ConnectionLostError, match="503: busy"):
        response.json()


async def test_an_answer_that_is_not_json_is_told() -> None:
    async with answering([b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\noops"]) as port:
        response = await ask(port, "GET", "/")
    with pytest.raises(ConnectionLostError, match="not JSON"):
        response.json()


@pytest.mark.parametrize("sent", [b"", b"HTTP/1.1 200 OK\r\n", HEAD + chunk(TEXT)])
async def test_a_connection_that_ends_too_early_is_told(sent: bytes) -> None:
    async with answering([sent]) as port:
        with pytest.raises(ConnectionLostError, match="closed the connection"):
            await ask(port, "GET", "/")


async def test_an_answer_that_is_not_http_is_told() -> None:
    async with answering([b"SSH-2.0-OpenSSH\r\n"]) as port:
        with pytest.raises(ConnectionLostError, match="not HTTP"):
            await ask(port, "GET", "/")


async def test_nobody_listening_is_told() -> None:
    async with answering([]) as port:
        pass
    with pytest.raises(ConnectionLostError, match="No connection"):
        await ask(port, "GET", "/")


async def test_the_beginning_of_a_stream_is_seen_before_its_end_and_the_rest_can_be_left() -> None:
    async with answering([HEAD + chunk(TEXT)], then_close=False) as port:
        with await Connection.open(port) as connection:
            response = connection.send("GET", "/")
            await connection.begin()
            assert len(text_times(response)) == 1
            assert response.ended_at == 0


async def test_waiting_for_the_beginning_ends_when_the_connection_does() -> None:
    async with answering([b"HTTP/1.1 200 OK\r\n"]) as port:
        with await Connection.open(port) as connection:
            connection.send("GET", "/")
            with pytest.raises(ConnectionLostError, match="closed the connection"):
                await connection.begin()
