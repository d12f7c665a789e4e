"""What the event loop is told of sockets: everything, a reset included."""

from __future__ import annotations

import asyncio
import select
import socket
import struct

import pytest

from appliance.messaging.watcher import READABLE, WRITABLE, watcher

both_loops = pytest.mark.parametrize(
    "anyio_backend",
    [("asyncio", {"use_uvloop": True}), ("asyncio", {"use_uvloop": False})],
    ids=["uvloop", "asyncio"],
)
pytestmark = [pytest.mark.anyio, both_loops]


def connected() -> tuple[socket.socket, socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        near = socket.create_connection(server.getsockname())
        far, _ = server.accept()
    near.setblocking(False)
    return near, far


async def test_a_reset_is_told_again_and_again_and_writing_may_still_be_asked_for() -> None:
    near, far = connected()
    told: asyncio.Queue[int] = asyncio.Queue()
    with near:
        watcher().watch(near.fileno(), told.put_nowait)
        far.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        far.close()
        async with asyncio.timeout(10):
            assert (await told.get()) & select.EPOLLERR & READABLE
            watcher().want_writing(near.fileno(), True)
            while not (await told.get()) & WRITABLE:
                pass
        watcher().forget(near.fileno())


async def test_a_socket_that_is_forgotten_is_not_told_of_and_the_last_one_ends_the_watch() -> None:
    near, far = connected()
    other, far_other = connected()
    told: asyncio.Queue[str] = asyncio.Queue()
    with near, far, other, far_other:
        first = watcher()

        def forget_both(_: int) -> None:
            told.put_nowait("told")
            first.forget(near.fileno())
            first.forget(other.fileno())

        first.watch(near.fileno(), forget_both)
        first.watch(other.fileno(), forget_both)
        far.send(b"x")
        far_other.send(b"x")
        async with asyncio.timeout(10):
            assert await told.get() == "told"
        first.forget(near.fileno())
        first.want_writing(near.fileno(), True)
        assert watcher() is not first, "the next connection begins a new one"
        assert told.empty()
        watcher().watch(near.fileno(), forget_both)
        watcher().forget(near.fileno())
