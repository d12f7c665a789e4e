"""A link of a given bandwidth, delay and loss between a device and its broker: a TCP proxy that forwards late.

The model, per direction, shared by all connections through it:

- segments of 1,448 bytes leave one after the other at the link's bandwidth, and arrive half a round trip later;
- a lost segment costs its time on the link twice and arrives a whole round trip late, and what came after it waits for
  it, as under TCP with selective repetition; the sender is not slowed down beyond that. (The congestion control of a
  real TCP would fall to 0.13 MB/s at 2 % and 100 ms, whatever the program does: Mathis et al., 1997. This is a radio
  link whose own repetitions TCP does not see as congestion.)
- the queue before the link is the sender's own and holds `buffer_bytes`; then the sender has to wait. When an end dies,
  the other hears of it half a round trip later, and what has not been put on the link by then is not sent any more.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from types import TracebackType
from typing import Self

SEGMENT_BYTES = 1448
READ_BYTES = 4 * SEGMENT_BYTES


@dataclass
class Direction:
    """One way through the link.

    Attributes:
        bytes_passed: What was put on the link, repetitions of the link's own not counted.
        stalls: Segments that were lost.
        idle_s: Time since the first byte in which nothing was on the link.
        ended_at: When the last byte left it, by the loop's clock.
    """

    bytes_per_s: float
    round_trip_s: float
    loss: float
    buffer_bytes: int
    chance: random.Random
    bytes_passed: int = 0
    stalls: int = 0
    idle_s: float = 0.0
    free_at: float = 0.0
    arrived_at: float = 0.0

    async def forward(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Forward a connection until it ends."""
        now = asyncio.get_running_loop().time
        arriving: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue()
        try:
            async with asyncio.TaskGroup() as group:
                delivering = group.create_task(self._deliver(arriving, writer))
                with suppress(OSError):
                    while data := await reader.read(READ_BYTES):
                        arriving.put_nowait((self._send(len(data), now()), data))
                        waiting_s = self.free_at - now() - self.buffer_bytes / self.bytes_per_s
                        if waiting_s > 0:
                            await asyncio.sleep(waiting_s)
                arriving.put_nowait((now() + self.round_trip_s / 2, b""))
                await delivering
        finally:
            self._drop_unsent(now())

    def _send(self, size: int, now: float) -> float:
        """Return when bytes arrive that are sent now."""
        lost = sum(self.chance.random() < self.loss for _ in range(-(-size // SEGMENT_BYTES)))
        self.bytes_passed += size
        self.stalls += lost
        if self.free_at:
            self.idle_s += max(0.0, now - self.free_at)
        self.free_at = max(self.free_at, now) + (size + lost * SEGMENT_BYTES) / self.bytes_per_s
        late = self.round_trip_s if lost else 0.0
        self.arrived_at = max(self.arrived_at, self.free_at + self.round_trip_s / 2 + late)
        return self.arrived_at

    def _drop_unsent(self, now: float) -> None:
        unsent = max(0.0, self.free_at - now)
        self.free_at -= unsent
        self.bytes_passed -= int(unsent * self.bytes_per_s)

    async def _deliver(self, arriving: asyncio.Queue[tuple[float, bytes]], writer: asyncio.StreamWriter) -> None:
        now = asyncio.get_running_loop().time
        with suppress(OSError):
            while True:
                at, data = await arriving.get()
                if at > now():
                    await asyncio.sleep(at - now())
                if not data:
                    break
                writer.write(data)
                await writer.drain()
        with suppress(OSError):
            writer.close()


@dataclass
class Link:
    """Listens on loopback and forwards to a port there. Use it as `async with`.

    Attributes:
        up: From the device.
        down: To the device.
        port: Where the device connects.
        connections: How many there were.
    """

    target: int
    bytes_per_s: float = 2e6
    round_trip_s: float = 0.1
    loss: float = 0.0
    buffer_bytes: int = 64 * 1024
    seed: int = 0
    port: int = 0
    connections: int = 0
    up: Direction = field(init=False)
    down: Direction = field(init=False)

    def __post_init__(self) -> None:
        self.up, self.down = (
            Direction(self.bytes_per_s, self.round_trip_s, self.loss, self.buffer_bytes, random.Random(self.seed + way))
            for way in range(2)
        )
        self._breaks: set[Callable[[], None]] = set()

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._server.close()
        self.cut()

    def cut(self) -> None:
        """Break every connection."""
        for each in list(self._breaks):
            each()

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        try:
            far_reader, far_writer = await asyncio.open_connection("127.0.0.1", self.target)
        except OSError:
            writer.close()
            return

        def cut() -> None:
            for each in (writer, far_writer):
                each.transport.abort()

        self._breaks.add(cut)
        try:
            async with asyncio.TaskGroup() as group:
                ways = [
                    group.create_task(self.up.forward(reader, far_writer)),
                    group.create_task(self.down.forward(far_reader, writer)),
                ]
                await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
                cut()
                for each in ways:
                    each.cancel()  # what was read from the sender and is not on the link yet is not sent any more
        except asyncio.CancelledError:
            return  # the test is over, and asyncio would log it
        finally:
            self._breaks.discard(cut)
