"""A client for one request after another, on a blocking socket: no loop, no copies, as little as a client can cost."""

from __future__ import annotations

import re
import socket
import time
from collections.abc import Sequence
from typing import Self

from appliance.bench.client import HOST, ConnectionLostError

TIMEOUT_S = 300.0
HEAD_BYTES = 16_384
_LENGTH = re.compile(rb"\r\ncontent-length: *(\d+)", re.IGNORECASE)


class Wire:
    """One keep-alive connection. A context manager that closes it."""

    def __init__(self, port: int, *, most_bytes: int = 2**20) -> None:
        """Connect.

        Args:
            port: Of the server.
            most_bytes: Of an answer with its head; memory for it is taken once.

        Raises:
            ConnectionLostError: Nobody listens there.
        """
        self._buffer = memoryview(bytearray(most_bytes + HEAD_BYTES))
        try:
            self._socket = socket.create_connection((HOST, port), timeout=TIMEOUT_S)
        except OSError as error:
            raise ConnectionLostError(f"No connection to {HOST}:{port}: {error}.") from error
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.close()

    def post(self, path: str, parts: Sequence[bytes | memoryview], headers: str = "") -> tuple[float, memoryview]:
        """Send a request; return the seconds until its answer was whole, and the answer's body until the next request.

        Args:
            path: Where to POST.
            parts: Of the body, one after another.
            headers: Further ones, each ended by CR LF.

        Raises:
            ConnectionLostError: The answer is not whole, or its status is not 200.
        """
        length = sum(memoryview(part).nbytes for part in parts)
        head = f"POST {path} HTTP/1.1\r\nHost: {HOST}\r\nContent-Type: application/json\r\n"
        first = f"{head}{headers}Content-Length: {length}\r\n\r\n".encode()
        if length < HEAD_BYTES:
            first, parts = first + b"".join(parts), ()
        began = time.perf_counter()
        try:
            self._socket.sendall(first)
            for part in parts:
                self._socket.sendall(part)
            body = self._answer()
        except OSError as error:
            raise ConnectionLostError(f"The connection was lost: {error!r}.") from error
        return time.perf_counter() - began, body

    def _answer(self) -> memoryview:
        end, got = self._head()
        total = end + _length(bytes(self._buffer[:end]))
        if total > len(self._buffer):
            raise ConnectionLostError(f"The answer has {total} bytes; there is room for {len(self._buffer)}.")
        while got < total:
            got += self._receive(got, total)
        status, body = bytes(self._buffer[:12]), self._buffer[end:got]
        if not status.endswith(b" 200"):
            raise ConnectionLostError(f"The server answered {status!r}: {bytes(body[:300])!r}")
        return body

    def _head(self) -> tuple[int, int]:
        """Return where the head ends, and how much there is by then."""
        got = 0
        while True:
            got += self._receive(got, HEAD_BYTES)
            end = bytes(self._buffer[:got]).find(b"\r\n\r\n")
            if end >= 0:
                return end + 4, got

    def _receive(self, at: int, limit: int) -> int:
        received = self._socket.recv_into(self._buffer[at:limit])
        if not received:
            raise ConnectionLostError("The server closed the connection before its answer was whole.")
        return received


def _length(head: bytes) -> int:
    found = _LENGTH.search(head)
    if found is None:
        raise ConnectionLostError(f"The answer does not say how long it is: {head[:300]!r}.")
    return int(found[1])
