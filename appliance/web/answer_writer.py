"""The way from uvicorn's answers to the socket: a head and the body behind it leave in one piece.

uvicorn writes a head as soon as it has one, and uvloop sends each write at once: two system calls, two packets, and a
client that wakes up twice. Of a small answer that is a tenth of all its cost.
"""

from __future__ import annotations

import asyncio


class AnswerWriter:
    """Stands for a connection's transport during one request.

    The first write waits for the next one, but only as long as the loop is in the same round: the head of a stream
    that has nothing to say yet is not kept from the client.
    """

    def __init__(self, transport: asyncio.Transport, loop: asyncio.AbstractEventLoop) -> None:
        self._transport = transport
        self._loop = loop
        self._begun = False
        self._held = b""

    def write(self, data: bytes | memoryview) -> None:
        """Write, behind what is held."""
        if not self._begun:
            self._begun = True
            self._held = bytes(data)
            self._loop.call_soon(self._flush)
        elif self._held:
            held, self._held = self._held, b""
            self._transport.writelines([held, data])
        else:
            self._transport.write(data)

    def is_closing(self) -> bool:
        """Return True if the connection is closed or about to be."""
        return self._transport.is_closing()

    def close(self) -> None:
        """Close the connection once everything is written."""
        self._flush()
        self._transport.close()

    def _flush(self) -> None:
        held, self._held = self._held, b""
        if held and not self._transport.is_closing():
            self._transport.write(held)
