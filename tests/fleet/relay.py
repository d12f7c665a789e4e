"""A TCP relay between a client and the broker that cuts, stalls and goes on as the test wishes."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
from collections.abc import AsyncIterator


class Relay:
    """Listens on `port` on the loopback and passes on what comes, both ways.

    Attributes:
        port: Where the client connects.
        connections: How many it has accepted.
        upward: Cleared, nothing goes from the client to the broker.
        downward: Cleared, nothing goes from the broker to the client.
    """

    def __init__(self, target: int) -> None:
        self.port = 0
        self.connections = 0
        self.upward = asyncio.Event()
        self.downward = asyncio.Event()
        self.upward.set()
        self.downward.set()
        self._target = target
        self._writers: set[asyncio.StreamWriter] = set()

    def cut(self) -> None:
        """Break every connection without a word."""
        for writer in self._writers:
            writer.transport.abort()

    def reset(self) -> None:
        """Break every connection with a reset, as a peer does that was killed with unread data."""
        for writer in self._writers:
            taken: socket.socket = writer.get_extra_info("socket")
            taken.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.cut()

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        self._writers.add(writer)
        try:
            with contextlib.suppress(OSError):
                await self._pass(reader, writer)
        finally:
            self._writers.discard(writer)
            writer.transport.abort()

    async def _pass(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        far_reader, far_writer = await asyncio.open_connection("127.0.0.1", self._target)
        self._writers.add(far_writer)
        try:
            async with asyncio.TaskGroup() as group:
                ways = [
                    group.create_task(_pump(reader, far_writer, self.upward)),
                    group.create_task(_pump(far_reader, writer, self.downward)),
                ]
                await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
                for way in ways:
                    way.cancel()
        finally:
            self._writers.discard(far_writer)
            far_writer.transport.abort()


async def _pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, open_: asyncio.Event) -> None:
    with contextlib.suppress(OSError):
        while data := await reader.read(65_536):
            await open_.wait()
            if writer.transport.is_closing():  # it was cut meanwhile, and uvloop takes no more
                return
            writer.write(data)
            await writer.drain()


@contextlib.asynccontextmanager
async def relay(target: int) -> AsyncIterator[Relay]:
    """Run a relay to a port on the loopback."""
    found = Relay(target)
    server = await asyncio.start_server(found.serve, "127.0.0.1", 0)
    found.port = server.sockets[0].getsockname()[1]
    try:
        yield found
    finally:
        server.close()
        for _ in range(5):  # asyncio forgets a connection that it has accepted, and whose handler has not begun
            await asyncio.sleep(0)
        found.cut()
        await server.wait_closed()
