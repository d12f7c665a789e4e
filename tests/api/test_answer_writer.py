from __future__ import annotations

import asyncio
from collections.abc import Iterable
from pathlib import Path
from typing import cast

import pytest

from appliance.web.answer_writer import AnswerWriter
from tests.api.boxes import scripted_box, wire

pytestmark = pytest.mark.anyio


class Socket:
    """Keeps what would be sent, one entry a system call."""

    def __init__(self) -> None:
        self.sent: list[bytes] = []
        self.closed = False

    def write(self, data: bytes) -> None:
        assert not self.closed
        self.sent.append(bytes(data))

    def writelines(self, pieces: Iterable[bytes]) -> None:
        self.write(b"".join(pieces))

    def is_closing(self) -> bool:
        return self.closed

    def close(self) -> None:
        self.closed = True


def writer(socket: Socket) -> AnswerWriter:
    return AnswerWriter(cast("asyncio.Transport", socket), asyncio.get_running_loop())


async def test_a_head_leaves_with_the_first_of_its_body() -> None:
    socket = Socket()
    subject = writer(socket)
    subject.write(b"head ")
    subject.write(memoryview(b"body"))
    subject.write(b"more")
    await asyncio.sleep(0)
    assert socket.sent == [b"head body", b"more"]


async def test_a_head_without_a_body_does_not_wait_for_one() -> None:
    socket = Socket()
    subject = writer(socket)
    subject.write(b"head")
    await asyncio.sleep(0)
    assert socket.sent == [b"head"]
    subject.write(b"token")
    assert socket.sent == [b"head", b"token"]


async def test_a_head_is_written_before_the_connection_is_closed() -> None:
    socket = Socket()
    subject = writer(socket)
    subject.write(b"head")
    assert not subject.is_closing()
    subject.close()
    await asyncio.sleep(0)
    assert socket.sent == [b"head"]
    assert subject.is_closing()


async def test_a_head_is_dropped_with_the_connection() -> None:
    socket = Socket()
    subject = writer(socket)
    subject.write(b"head")
    socket.closed = True
    await asyncio.sleep(0)
    assert socket.sent == []


async def test_pipelined_answers_come_whole_and_in_order(tmp_path: Path) -> None:
    request = b"%s /health HTTP/1.1\r\nHost: 127.0.0.1\r\nX-Request-Id: %d\r\n\r\n"
    async with scripted_box(tmp_path) as box, wire(box) as client:
        await client.send(b"".join(request % (b"GET", number) for number in range(5)))
        replies = [await client.read_reply() for _ in range(5)]
    assert [each.headers["x-request-id"] for each in replies] == ["0", "1", "2", "3", "4"]
    assert {each.status for each in replies} == {200}
