"""Limits on request bodies, as ASGI middleware: bytes, time, and what to do with the rest of a body that nobody reads.

A client that is refused while it still sends must be able to read why. Closing at once would make its kernel drop the
answer, so the answer goes out first and the rest of the body is read and forgotten for a short while
(RFC 9112 section 9.6). Then the connection is closed.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from appliance.core.errors import InvalidRequestError, TooLargeError
from appliance.core.settings import Settings

LINGER_S = 5.0
"""Longest time to read the rest of a refused body."""


class BodyLimits:
    """ASGI middleware that holds each request body to `max_body_bytes` and `body_timeout_s`."""

    def __init__(self, app: ASGIApp, settings: Settings) -> None:
        self._app = app
        self._settings = settings

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on with a `receive` that raises and a `send` that ends the connection when it must."""
        if scope["type"] != "http":
            return  # neither WebSocket nor lifespan events are switched on
        body = _Body(Headers(scope=scope), receive, self._settings)
        await self._app(scope, body.receive, _Sender(body, send).send)


class _Body:
    """One request body on its way in."""

    def __init__(self, headers: Headers, receive: Receive, settings: Settings) -> None:
        length = headers.get("content-length", "")
        self.declared = int(length) if length.isdecimal() else 0
        self.complete = self.declared == 0 and "transfer-encoding" not in headers
        self.awaits_continue = headers.get("expect", "").lower() == "100-continue"
        self.received = 0
        self.deadline: float | None = None
        self._receive = receive
        self._settings = settings

    async def receive(self) -> Message:
        """Return the next message.

        Raises:
            TooLargeError: The body is over the limit, or says that it will be.
            InvalidRequestError: The body took too long.
        """
        limit, limit_s = self._settings.max_body_bytes, self._settings.body_timeout_s
        if self.complete:
            return await self.next()
        if self.declared > limit:
            raise _too_large(self.declared, limit)
        if self.deadline is None:
            self.deadline = asyncio.get_running_loop().time() + limit_s
        try:
            async with asyncio.timeout_at(self.deadline):
                message = await self.next()
        except TimeoutError as error:
            raise InvalidRequestError(
                f"The request body was not complete after {limit_s:g} s; {self.received} bytes had come.",
                advice="Send it faster, or raise body_timeout_s.",
                code="body_timeout",
            ) from error
        if self.received > limit:
            raise _too_large(self.received, limit)
        return message

    async def next(self) -> Message:
        """Return the next message without any limit."""
        message = await self._receive()
        self.received += len(message.get("body", b""))
        if message["type"] != "http.request" or not message.get("more_body", False):
            self.complete = True
        return message

    async def discard(self) -> None:
        """Read and forget what still comes, for a while and up to the size that a body may have."""
        if self.awaits_continue and self.received == 0:
            return  # the client has not begun and, with its answer in hand, never will
        enough = self.received + self._settings.max_body_bytes
        try:
            async with asyncio.timeout(LINGER_S):
                while not self.complete and self.received < enough:
                    await self.next()
        except TimeoutError:
            pass  # the client had its chance to read the answer; the connection is closed now


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


def _too_large(size: int, limit: int) -> TooLargeError:
    return TooLargeError(
        f"The request body has {size} bytes or more; {limit} are allowed.",
        advice="Send less, or raise max_body_bytes.",
    )
