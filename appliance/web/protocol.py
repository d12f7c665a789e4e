"""One HTTP connection: uvicorn's httptools protocol with the limits that keep hostile peers cheap.

What uvicorn leaves open and this closes:

- a request head that comes too slowly or is too long (uvicorn waits and buffers for ever);
- a client that does not read its answer (its transport would keep the buffer until the peer goes away);
- more connections than the setting allows;
- answers of uvicorn's own in plain text, where a client expects our JSON.

A refusal that needs an answer is handed to the application in `scope["state"][REFUSAL]`, so that it is written, logged
and counted as every other error is.
"""

from __future__ import annotations

import asyncio
import logging
from asyncio import TimerHandle
from collections.abc import Callable
from email.utils import formatdate
from typing import TYPE_CHECKING, cast

import msgspec
from uvicorn.config import Config
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol
from uvicorn.server import ServerState

from appliance.core.errors import ApplianceError, InvalidRequestError, TooLargeError, UnavailableError
from appliance.web.answer_writer import AnswerWriter
from appliance.web.body_buffer import BODY_BUFFER, BodyBuffer
from appliance.web.errors import error_response, kind_of

if TYPE_CHECKING:
    from appliance.web.server_settings import ServerSettings

REFUSAL = "refusal"
"""Key of `scope["state"]`: the ApplianceError with which the application must answer at once."""

PEER = "peer"
"""Key of `scope["state"]`: the client's certificate as `ssl` describes it, where it has shown one that was checked."""

CONNECTIONS_ABOVE_LIMIT = 64
"""So many connections over the limit get an answer that says so; further ones are cut without a word."""

logger = logging.getLogger("appliance.api")


class ConnectionState(ServerState):
    """What the connections of one server share.

    Attributes:
        drained: Set while no connection is open.
    """

    def __init__(self) -> None:
        super().__init__()
        self.drained = asyncio.Event()
        self.drained.set()

    @property
    def default_headers(self) -> list[tuple[bytes, bytes]]:
        """Return the headers of every answer: the date, as RFC 9110 section 6.6.1 asks."""
        return [(b"date", formatdate(usegmt=True).encode())]

    @default_headers.setter
    def default_headers(self, value: list[tuple[bytes, bytes]]) -> None:
        """Accept and drop what the base class sets at first."""


class LimitedHttpProtocol(HttpToolsProtocol):
    """A connection with limits. Times are seconds."""

    def __init__(self, config: Config, state: ConnectionState, settings: ServerSettings) -> None:
        super().__init__(config=config, server_state=state, app_state={})
        self.access_log = False  # it would write raw paths, which may hold secrets; the boundary logs the route
        self._state = state
        self._settings = settings
        self._head_bytes = 0
        self._head_begun = False
        self._heads = 0
        self._head_timer: TimerHandle | None = None
        self._write_timer: TimerHandle | None = None
        self._refusal: ApplianceError | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Start the clock for the first request head."""
        super().connection_made(transport)
        self._state.drained.clear()
        limit, connections = self._settings.max_connections, len(self.connections)
        if connections > limit + CONNECTIONS_ABOVE_LIMIT:
            transport.abort()
            return
        if connections > limit:
            self._refusal = UnavailableError(
                f"All {limit} connections are in use.",
                advice="Try again later, or raise max_connections.",
                code="too_many_connections",
            )
        self._start_head_timer()

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop every clock of the connection."""
        self._stop_head_timer()
        self._stop_write_timer()
        self._unset_keepalive_if_required()
        super().connection_lost(exc)
        if not self.connections:
            self._state.drained.set()

    def data_received(self, data: bytes) -> None:
        """Parse what came, and hold the head to its limits."""
        within_head, heads = self._head_begun, self._heads
        super().data_received(data)
        if self.transport.is_closing():
            return
        # The parser is quiet about a header until its last byte, so what it swallows within a head is counted here.
        if within_head and self._heads == heads:
            self._head_bytes += len(data)
            if self._head_bytes > self._settings.max_header_bytes:
                self._answer_and_close(self._head_too_large(self._head_bytes))
                return
        if self._between_requests() and self._head_timer is None:
            self._start_head_timer()

    def on_message_begin(self) -> None:
        """Note that a request head has begun."""
        super().on_message_begin()
        self._head_begun = True

    def on_headers_complete(self) -> None:
        """Start the request; over a limit it carries the refusal that the application will write."""
        self._stop_head_timer()
        self._head_begun = False
        self._head_bytes = 0
        self._heads += 1
        refusal = self._refusal
        size = len(self.url) + sum(len(name) + len(value) + 4 for name, value in self.headers)
        if size > self._settings.max_header_bytes:
            refusal = self._head_too_large(size)
        state = cast("dict[str, object]", self.scope["state"])
        if refusal is not None:
            state[REFUSAL] = refusal
        if peer := self.transport.get_extra_info("peercert"):
            state[PEER] = peer
        before = self.cycle
        super().on_headers_complete()
        if self.cycle is not before:
            self.cycle.transport = cast("asyncio.Transport", AnswerWriter(self.transport, self.loop))

    def on_body(self, body: bytes) -> None:
        """Keep a part of the body, or write it where the application wants it."""
        buffer = cast("dict[str, BodyBuffer]", self.scope["state"]).get(BODY_BUFFER)
        if buffer is None or self.cycle.response_complete:
            super().on_body(body)
        else:
            buffer.append(body)

    def on_response_complete(self) -> None:
        """Go on to the next request of the connection, or give the peer time to read the last answer."""
        super().on_response_complete()
        if self.transport.is_closing():
            self._start_write_timer()
        elif self._head_begun and self._between_requests():
            self._unset_keepalive_if_required()
            self._start_head_timer()

    def pause_writing(self) -> None:
        """Stop producing, and start the clock for the peer to read."""
        super().pause_writing()
        self._start_write_timer()

    def resume_writing(self) -> None:
        """Go on producing."""
        super().resume_writing()
        if not self.transport.is_closing():
            self._stop_write_timer()

    def send_400_response(self, msg: str) -> None:
        """Answer what is not HTTP, in our shape."""
        self._answer_and_close(
            InvalidRequestError(msg, advice="Send HTTP/1.1; https needs tls_certificate and tls_key.", code="bad_http")
        )

    def timeout_keep_alive_handler(self) -> None:
        """Close an idle connection, also when the peer never read its last answer."""
        super().timeout_keep_alive_handler()
        self._start_write_timer()

    def _unsupported_upgrade_warning(self) -> None:
        """Answer a request for WebSocket or HTTP/2 as plain HTTP/1.1, which RFC 9110 section 7.8 allows."""

    def _between_requests(self) -> bool:
        return self.cycle is None or self.cycle.response_complete

    def _start_head_timer(self) -> None:
        self._head_timer = self.loop.call_later(self._settings.header_timeout_s, self._head_timed_out)

    def _stop_head_timer(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _head_timed_out(self) -> None:
        if not self._head_begun:
            self.transport.close()
            self._start_write_timer()
            return
        limit = self._settings.header_timeout_s
        self._answer_and_close(
            InvalidRequestError(f"The request head was not complete after {limit:g} s.", code="header_timeout")
        )

    def _start_write_timer(self) -> None:
        if self._write_timer is None:
            self._write_timer = self.loop.call_later(self._settings.write_timeout_s, self.transport.abort)

    def _stop_write_timer(self) -> None:
        if self._write_timer is not None:
            self._write_timer.cancel()
            self._write_timer = None

    def _head_too_large(self, size: int) -> TooLargeError:
        limit = self._settings.max_header_bytes
        return TooLargeError(
            f"The request head has {size} bytes or more; {limit} are allowed.",
            advice="Send fewer or shorter headers, or raise max_header_bytes.",
            code="request_head_too_large",
        )

    def _answer_and_close(self, error: ApplianceError) -> None:
        """Answer a request that never became one. While another answer is under way there is only the cut."""
        logger.info("A connection was refused: %s", error.message, extra={"code": error.code, "client": self.client})
        if not self._between_requests():
            self.transport.abort()
            return
        body = msgspec.json.encode(error_response(error, ""))
        head = [
            STATUS_LINE[kind_of(error).status],
            *(b"%s: %s\r\n" % header for header in self._state.default_headers),
            b"content-type: application/json\r\n",
            b"content-length: %d\r\nconnection: close\r\n\r\n" % len(body),
        ]
        self.transport.write(b"".join(head) + body)
        self.transport.close()
        self._start_write_timer()


ProtocolFactory = Callable[[], LimitedHttpProtocol]
"""What `loop.create_server` calls for each connection."""
