"""Limits on request bodies, as ASGI middleware: bytes, time, and what to do with the rest of a body that nobody reads.

A client that is refused while it still sends must be able to read why. Closing at once would make its kernel drop the
answer, so the answer goes out first and the rest of the body is read and forgotten for a short while
(RFC 9112 section 9.6). Then the connection is closed.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from appliance.core.errors import InvalidRequestError, TooLargeError
from appliance.web.body_buffer import BODY_BUFFER, BodyBuffer
from appliance.web.server_settings import ServerSettings

LINGER_S = 5.0
"""Longest time to read the rest of a refused body."""

_MEBIBYTE = 1024 * 1024


@dataclass(frozen=True, slots=True)
class BodyLimit:
    """What a request body may be.

    Attributes:
        name: Of the setting that says so.
        size: In bytes.
        each_mebibyte: Whether the body has its time for each MiB, as a large file needs.
    """

    name: str
    size: int
    each_mebibyte: bool = False


LimitOf = Callable[[str], BodyLimit]
"""Returns the limit that holds for a path."""


class BodyLimits:
    """ASGI middleware that holds each request body to the size of its path and to `body_timeout_s`."""

    def __init__(self, app: ASGIApp, settings: ServerSettings, limit_of: LimitOf) -> None:
        self._app = app
        self._timeout_s = settings.body_timeout_s
        self._limit_of = limit_of

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on with a `receive` that raises and a `send` that ends the connection when it must."""
        if scope["type"] != "http":
            return  # neither WebSocket nor lifespan events are switched on
        body = _Body(scope, receive, self._limit_of(scope["path"]), self._timeout_s)
        await self._app(scope, body.receive, _Sender(body, send).send)


class _Body:
    """One request body on its way in."""

    def __init__(self, scope: Scope, receive: Receive, limit: BodyLimit, limit_s: float) -> None:
        headers = Headers(scope=scope)
        length = headers.get("content-length", "")
        self.declared = int(length) if length.isdecimal() else 0
        self.complete = self.declared == 0 and "transfer-encoding" not in headers
        self.awaits_continue = headers.get("expect", "").lower() == "100-continue"
        self.started: float | None = None
        self._handed_over = 0
        self._limit_name, self._limit = limit.name, limit.size
        self._extends = limit.each_mebibyte
        self._limit_s = limit_s
        self._state = scope.setdefault("state", {})
        self._receive = receive

    @property
    def received(self) -> int:
        """Bytes that have come."""
        buffer: BodyBuffer | None = self._state.get(BODY_BUFFER)
        return self._handed_over if buffer is None else buffer.received

    async def receive(self) -> Message:
        """Return the next message.

        Raises:
            TooLargeError: The body is over the limit, or says that it will be.
            InvalidRequestError: The body took too long.
        """
        limit_s = self._limit_s
        if self.complete:
            return await self.next()
        if self.declared > self._limit:
            raise self._too_large(self.declared)
        if self.started is None:
            self.started = asyncio.get_running_loop().time()
        times = 1 + self.received // _MEBIBYTE if self._extends else 1
        try:
            async with asyncio.timeout_at(self.started + times * limit_s):
                message = await self.next()
        except TimeoutError as error:
            raise InvalidRequestError(
                f"The request body was not complete after {times * limit_s:g} s; {self.received} bytes had come.",
                advice="Send it faster, or raise body_timeout_s.",
                code="body_timeout",
            ) from error
        if self.received > self._limit:
            raise self._too_large(self.received)
        return message

    async def next(self) -> Message:
        """Return the next message without any limit."""
        message = await self._receive()
        self._handed_over += len(message.get("body", b""))
        if message["type"] != "http.request" or not message.get("more_body", False):
            self.complete = True
        return message

    async def discard(self) -> None:
        """Read and forget what still comes, for a while and up to the size that a body may have."""
        if self.awaits_continue and self.received == 0:
            return  # the client has not begun and, with its answer in hand, never will
        enough = self.received + self._limit
        try:
            async with asyncio.timeout(LINGER_S):
                while not self.complete and self.received < enough:
                    await self.next()
        except TimeoutError:
            pass  # the client had its chance to read the answer; the connection is closed now

    def _too_large(self, size: int) -> TooLargeError:
        return TooLargeError(
            f"The request body has {size} bytes or more; {self._limit} are allowed.",
            advice=f"Send less, or raise {self._limit_name}.",
        )


class _Sender:
    """Sends the answer, and sees to it that a body nobody read does not stay in the way."""

    def __init__(self, body: _Body, send: Send) -> None:
        self._body = body
        self._send = send

    def send(self, message: Message) -> Awaitable[None]:
        """Send a message on. Adds no coroutine where the body was read: each token comes by here."""
        return self._send(message) if self._body.complete else self._send_before_the_body(message)

    async def _send_before_the_body(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            message = {**message, "headers": [*message.get("headers", []), (b"connection", b"close")]}
        elif not message.get("more_body", False):
            await self._send({**message, "more_body": True})
            await self._body.discard()
            message = {"type": "http.response.body", "body": b"", "more_body": False}
        await self._send(message)
