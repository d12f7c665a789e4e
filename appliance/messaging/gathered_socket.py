"""A socket for a client that writes and reads many small packets: they go out, and are taken in, in large pieces.

paho sends each packet by itself, which over TLS makes a record of each, and mosquitto reads one record of a connection
a turn of its loop, however many wait. While ten thousand boxes shake hands with it, a turn takes milliseconds: what a
hub has to say, a thousand packets a second, would wait for seconds. In one record they are read in one turn.
"""

from __future__ import annotations

import contextlib
import socket
import ssl

PIECE_BYTES = 16 * 1024
"""What one TLS record holds (RFC 8446, 5.1)."""

MOST_UNSENT_BYTES = 4 * PIECE_BYTES
"""Beyond which nothing more is taken while the other end does not read."""

_WOULD_BLOCK = (BlockingIOError, ssl.SSLWantReadError, ssl.SSLWantWriteError)


class GatheredSocket:
    """A connected socket that does not block; with the methods that paho's client calls on its own."""

    def __init__(self, opened: socket.socket) -> None:
        """Take over a socket, plain or TLS."""
        self._socket = opened
        self._unsent = bytearray()
        self._unread = memoryview(b"")
        opened.setblocking(False)

    @property
    def unsent(self) -> int:
        """Return how many bytes still have to be sent."""
        return len(self._unsent)

    def pending(self) -> int:
        """Return how many bytes have come that wake no one up any more."""
        return len(self._unread) or (self._socket.pending() if isinstance(self._socket, ssl.SSLSocket) else 0)

    def send(self, data: bytes | bytearray) -> int:
        """Take all of `data`, to be sent by `flush`, or before it when a piece is full; returns its length.

        Raises:
            BlockingIOError: The other end does not read; nothing was taken.
            OSError: The connection broke.
        """
        if len(self._unsent) >= PIECE_BYTES:
            self.flush()
        if len(self._unsent) >= MOST_UNSENT_BYTES:
            raise BlockingIOError
        self._unsent += data
        return len(data)

    def flush(self) -> None:
        """Send what there is, as far as the other end takes it.

        Raises:
            OSError: The connection broke.
        """
        with contextlib.suppress(*_WOULD_BLOCK):
            while self._unsent:
                del self._unsent[: self._socket.send(self._unsent)]

    def recv(self, most: int) -> bytes:
        """Return up to `most` bytes, b"" at the end.

        Raises:
            BlockingIOError: Nothing has come.
            OSError: The connection broke.
        """
        if not self._unread:
            try:
                came = self._socket.recv(max(most, PIECE_BYTES))
            except _WOULD_BLOCK as error:
                raise BlockingIOError from error
            if len(came) <= most:
                return came
            self._unread = memoryview(came)
        taken, self._unread = bytes(self._unread[:most]), self._unread[most:]
        return taken

    def fileno(self) -> int:
        """Return the descriptor, -1 once it is closed."""
        return self._socket.fileno()

    def setblocking(self, flag: bool) -> None:
        """Do nothing: it never blocks, whatever paho asks for."""

    def close(self) -> None:
        """Send what can be sent at once, and close."""
        with contextlib.suppress(OSError):
            self.flush()
        self.abort()

    def abort(self) -> None:
        """Close, and send nothing that was not."""
        self._unsent.clear()
        self._socket.close()
