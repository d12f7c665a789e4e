"""The boundary of the application: every request that comes in here leaves with exactly one answer.

It gives the request its id, turns every error into JSON, counts the answer and writes one line to the log.
"""

from __future__ import annotations

import logging
import re
import secrets
import time
from collections.abc import Awaitable
from typing import Protocol

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from appliance.core.errors import ApplianceError
from appliance.observe.logs import request_id as logged_request_id
from appliance.web.disconnect import ClientGoneError
from appliance.web.errors import error_body, error_headers, internal_error, kind_of
from appliance.web.protocol import REFUSAL

logger = logging.getLogger("appliance.api")

CLIENT_GONE = 499
"""The status that is logged and counted for a client that left; it is never sent."""

UNMATCHED = "unmatched"
"""The route that is logged and counted when there is none."""

PROBES = ("/health", "/health/live", "/v2/health/live", "/v2/health/ready", "/metrics", "/healthz", "/readyz")
"""Routes that monitors ask every few seconds; their answers, "not ready" included, would fill the log."""

_REQUEST_ID = re.compile(r"[A-Za-z0-9._:/+=@-]{1,128}")


class HttpMetrics(Protocol):
    """What is counted of requests."""

    def http_started(self) -> None:
        """Count a request that came in."""
        ...

    def http_finished(self, route: str, status: int) -> None:
        """Count a request that was answered, by its route's template and its status."""
        ...


class RequestBoundary:
    """ASGI middleware around everything that can fail."""

    def __init__(self, app: ASGIApp, metrics: HttpMetrics) -> None:
        self._app = app
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request, whatever happens."""
        state = scope.setdefault("state", {})
        request_id = state["request_id"] = request_id_of(Headers(scope=scope))
        in_log = logged_request_id.set(request_id)
        answer = _Answer(send, request_id)
        started = time.monotonic()
        self._metrics.http_started()
        try:
            if REFUSAL in state:
                answer.close = True
                raise state[REFUSAL]  # noqa: TRY301  (the connection's refusal joins the path of all others)
            await self._app(scope, receive, answer.send)
        except ClientGoneError:
            answer.status = CLIENT_GONE
        except ApplianceError as error:
            if kind_of(error).status == 500:
                logger.exception("A request failed.")
            await self._refuse(error, answer, scope["path"])
        except Exception:
            logger.exception("A request failed on a mistake of ours.")
            await self._refuse(internal_error(), answer, scope["path"])
        finally:
            route = state.get("route", UNMATCHED)
            self._metrics.http_finished(route, answer.status)
            _log(scope["method"], route, answer, time.monotonic() - started, state)
            logged_request_id.reset(in_log)

    async def _refuse(self, error: ApplianceError, answer: _Answer, path: str) -> None:
        kind = kind_of(error)
        answer.code = error.code
        if answer.started:
            logger.error("An answer broke off: %s", error)
            return  # the server closes the connection, which tells the client that the answer is not whole
        body = error_body(error, answer.request_id, path)
        headers = [
            (b"content-type", b"application/json"),
            (b"content-length", str(len(body)).encode()),
            *error_headers(error),
        ]
        await answer.send({"type": "http.response.start", "status": kind.status, "headers": headers})
        await answer.send({"type": "http.response.body", "body": body})


class _Answer:
    """The answer to one request as it goes out.

    Attributes:
        status: As sent; 499 until then.
        code: The error's slug, or "".
        close: Whether the connection ends with this answer.
    """

    def __init__(self, send: Send, request_id: str) -> None:
        self._send = send
        self.request_id = request_id
        self.status = CLIENT_GONE
        self.started = False
        self.code = ""
        self.close = False

    def send(self, message: Message) -> Awaitable[None]:
        """Send a message on, with the headers that every answer has. Adds no coroutine: each token comes by here."""
        if message["type"] == "http.response.start":
            self.started = True
            self.status = message["status"]
            headers = [
                *message.get("headers", []),
                (b"x-request-id", self.request_id.encode()),
                (b"x-content-type-options", b"nosniff"),
            ]
            if self.close:
                headers.append((b"connection", b"close"))
            message = {**message, "headers": headers}
        return self._send(message)


def request_id_of(headers: Headers) -> str:
    """Return the client's `X-Request-Id` if it is fit for a log line, or a new one."""
    given = headers.get("x-request-id", "")
    return given if _REQUEST_ID.fullmatch(given) else f"req-{secrets.token_hex(12)}"


def _level(route: str, status: int) -> int:
    if route in PROBES and status != 500:
        return logging.DEBUG
    return logging.WARNING if status >= 500 else logging.INFO


def _log(method: str, route: str, answer: _Answer, duration_s: float, state: dict[str, object]) -> None:
    fields = {
        "request_id": answer.request_id,
        "method": method,
        "route": route,
        "status": answer.status,
        "duration_s": round(duration_s, 6),
        "model": state.get("model", ""),
        "tenant": state.get("tenant", ""),
        "code": answer.code or state.get("code", ""),
    }
    logger.log(
        _level(route, answer.status), "%s %s %d in %.3f s", method, route, answer.status, duration_s, extra=fields
    )
