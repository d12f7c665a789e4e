"""A small HTTP client for measuring: many connections on one loop, little work for each byte.

It shares the CPU with the server that it measures, so while an answer arrives its pieces are only kept with their
times; they are looked into afterwards. HTTP is parsed by httptools, as in the server.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Self, cast

import httptools
import msgspec

from appliance.core.errors import UnavailableError

HOST = "127.0.0.1"
_EVENT_END = b"\n\n"
_DATA = b"data: "


class ConnectionLostError(UnavailableError):
    """The server could not be reached, or closed the connection before its answer was whole."""

    default_code = "connection_lost"


@dataclass(slots=True)
class Response:
    """What the server answered.

    Attributes:
        sent_at: `time.perf_counter()` when the request was written.
        ended_at: The same when the answer was whole; 0 until then.
        headers: By lower-case name.
        pieces: The body as it came, each piece with its time.
    """

    sent_at: float
    ended_at: float = 0.0
    status: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    pieces: list[tuple[float, bytes]] = field(default_factory=list)

    @property
    def seconds(self) -> float:
        """Return how long the whole answer took."""
        return self.ended_at - self.sent_at

    @property
    def body(self) -> bytes:
        """Return the body so far."""
        return b"".join(piece for _, piece in self.pieces)

    def json(self) -> Any:
        """Return the body as JSON.

        Raises:
            ConnectionLostError: It is not JSON, or the status is not 200.
        """
        if self.status != 200:
            raise ConnectionLostError(f"The server answered {self.status}: {self.body[:300].decode(errors='replace')}")
        try:
            return msgspec.json.decode(self.body)
        except msgspec.DecodeError as error:
            raise ConnectionLostError(f"The server's answer is not JSON: {error}.") from error

    def events(self) -> list[tuple[float, bytes]]:
        """Return the data of each whole server-sent event, with the time at which its last byte came.

        Lines may end in LF or CRLF, as the standard leaves to the server.
        """
        events: list[tuple[float, bytes]] = []
        rest = b""
        for at, piece in self.pieces:
            *whole, rest = (rest + piece).replace(b"\r\n", b"\n").split(_EVENT_END)
            events += [(at, event.removeprefix(_DATA)) for event in whole if event.startswith(_DATA)]
        return events


class Connection(asyncio.Protocol):
    """One keep-alive connection, for one request after another. A context manager that closes it.

    Attributes:
        patient: After each reading, read no more until `look`; what the server sends waits in the kernel.
        headers: Sent with every request, besides what HTTP needs.
    """

    def __init__(self) -> None:
        """Use `open`."""
        self.patient = False
        self.headers: Mapping[str, str] = {}
        self._transport: asyncio.Transport | None = None
        self._parser: Any = None
        self._response: Response | None = None
        self._answered: asyncio.Future[None] | None = None
        self._begun = asyncio.Event()

    @classmethod
    async def open(cls, port: int) -> Self:
        """Connect to a server of this machine.

        Raises:
            ConnectionLostError: Nobody listens there.
        """
        try:
            _, connection = await asyncio.get_running_loop().create_connection(cls, HOST, port)
        except OSError as error:
            raise ConnectionLostError(f"No connection to {HOST}:{port}: {error}.") from error
        return connection

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the connection; an answer that is not whole yet is given up. Idempotent."""
        if self._answered is not None:
            self._answered.cancel()
        if self._transport is not None:
            self._transport.abort()

    def send(
        self,
        method: str,
        path: str,
        document: Mapping[str, Any] | bytes | None = None,
        content_type: str = "application/json",
    ) -> Response:
        """Write a request and return its answer, which grows from now on; `wait` for its end.

        Args:
            method: GET, POST or DELETE.
            path: With leading slash.
            document: Sent as JSON; bytes are sent as they are.
            content_type: What the document is.
        """
        assert self._transport is not None, "the connection is open"
        assert self._answered is None or self._answered.done(), "one request after another"
        body = document or b"" if isinstance(document, bytes | None) else msgspec.json.encode(document)
        head = f"{method} {path} HTTP/1.1\r\nHost: {HOST}\r\nContent-Type: {content_type}\r\n"
        head += "".join(f"{name}: {value}\r\n" for name, value in self.headers.items())
        head += f"Content-Length: {len(body)}\r\n\r\n"
        self._parser = httptools.HttpResponseParser(self)
        self._answered = asyncio.get_running_loop().create_future()
        self._begun.clear()
        self._response = response = Response(time.perf_counter())
        self._transport.write(head.encode() + body)
        return response

    async def begin(self) -> None:
        """Wait until something of the answer's body has come, or all of an empty one.

        Raises:
            ConnectionLostError: The connection ended before.
        """
        assert self._answered is not None, "a request was sent"
        await self._begun.wait()
        if self._answered.done():
            self._answered.result()

    def look(self) -> None:
        """Read, when the loop goes round, what has come since the last reading of a patient connection."""
        if self._transport is not None and not self._transport.is_closing():
            self._transport.resume_reading()

    @property
    def answered(self) -> bool:
        """Return True once the answer is whole or the connection has ended."""
        return self._answered is None or self._answered.done()

    async def wait(self) -> None:
        """Wait until the answer is whole.

        Raises:
            ConnectionLostError: The connection ended before it was.
        """
        assert self._answered is not None, "a request was sent"
        await self._answered

    async def request(
        self,
        method: str,
        path: str,
        document: Mapping[str, Any] | bytes | None = None,
        content_type: str = "application/json",
    ) -> Response:
        """Send a request and return its whole answer; see `send`.

        Raises:
            ConnectionLostError: The connection ended before the answer was whole.
        """
        response = self.send(method, path, document, content_type)
        await self.wait()
        return response

    # Called by the loop

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Keep the transport."""
        self._transport = cast("asyncio.Transport", transport)

    def data_received(self, data: bytes) -> None:
        """Parse what came."""
        if self.patient and self._transport is not None:
            self._transport.pause_reading()
        if self._answered is None or self._answered.done():
            return
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError as error:
            self._answered.set_exception(ConnectionLostError(f"The server's answer is not HTTP: {error}."))
            self.close()

    def connection_lost(self, exc: Exception | None) -> None:
        """Tell whoever waits for an answer."""
        if self._answered is not None and not self._answered.done():
            reason = f": {exc}" if exc else ""
            self._answered.set_exception(ConnectionLostError(f"The server closed the connection{reason}."))
        self._begun.set()

    # Called by the parser

    def on_header(self, name: bytes, value: bytes) -> None:
        """Keep a header."""
        assert self._response is not None
        self._response.headers[name.decode("latin-1").lower()] = value.decode("latin-1")

    def on_headers_complete(self) -> None:
        """Keep the status."""
        assert self._response is not None
        self._response.status = self._parser.get_status_code()

    def on_body(self, body: bytes) -> None:
        """Keep a piece of the body with its time."""
        assert self._response is not None
        self._response.pieces.append((time.perf_counter(), body))
        self._begun.set()

    def on_message_complete(self) -> None:
        """Note the end."""
        assert self._response is not None
        assert self._answered is not None
        self._response.ended_at = time.perf_counter()
        self._answered.set_result(None)
        self._begun.set()


async def ask(port: int, method: str, path: str, document: Mapping[str, Any] | None = None) -> Response:
    """Send one request on a connection of its own.

    Raises:
        ConnectionLostError: The server could not be reached or closed the connection too early.
    """
    with await Connection.open(port) as connection:
        return await connection.request(method, path, document)
