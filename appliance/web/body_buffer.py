"""One piece of memory that a connection writes a large request body into, without a copy of its own."""

from __future__ import annotations

BODY_BUFFER = "body_buffer"
"""Key of `scope["state"]`: the BodyBuffer into which the connection writes what it has not yet handed over.

What the connection has received until then comes as messages, as ever. From then on it writes, and hands over a message
only when the body is complete or the client has gone. So a body of megabytes costs neither a message, a turn of the
event loop nor a pause in reading for each 64 KiB.
"""


class BodyBuffer:
    """Memory for a body of a known length.

    Attributes:
        received: Bytes that have come.
    """

    __slots__ = ("_memory", "received")

    def __init__(self, memory: memoryview) -> None:
        self._memory = memory
        self.received = 0

    def append(self, part: bytes) -> None:
        """Write the next part of the body."""
        end = self.received + len(part)
        self._memory[self.received : end] = part
        self.received = end
