"""Server-sent events as OpenAI's clients read them.

Each event is `data: {json}` and an empty line; a comment line keeps an idle connection alive; `data: [DONE]` says
that the answer is whole. An error is an event of its own, after which the stream ends without `[DONE]`.
Format: https://html.spec.whatwg.org/multipage/server-sent-events.html
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence

import msgspec
from starlette.types import Receive, Scope, Send

from appliance.api.choices import Choices
from appliance.core.errors import ApplianceError
from appliance.core.types import Delta
from appliance.web.disconnect import until_disconnected
from appliance.web.errors import error_response, internal_error

MEDIA_TYPE = "text/event-stream"
DONE = b"data: [DONE]\n\n"
KEEP_ALIVE = b": keep-alive\n\n"

logger = logging.getLogger("appliance.api")

HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),  # a proxy in between must not collect the stream
]


class ChunkPattern:
    """What all chunks of a stream have in common, encoded once: everything but their one choice."""

    def __init__(self, chunk: msgspec.Struct) -> None:
        """Take it from a chunk whose `choices` are empty."""
        # Within a JSON string the quotes would be escaped, so no field's value can be taken for the mark.
        before, mark, after = _event(chunk).partition(b'"choices":[]')
        assert mark, "the chunk has choices"
        self._before, self._after = before + mark[:-1], mark[-1:] + after

    def event(self, choice: msgspec.Struct) -> bytes:
        """Return the event of the chunk with this choice."""
        return self._before + msgspec.json.encode(choice) + self._after


class ChunkStream:
    """An ASGI response that writes the choices as chunks while they grow. The client's leaving cancels them."""

    def __init__(
        self,
        choices: Choices,
        *,
        events: Callable[[Delta], bytes],
        closing: Callable[[], Iterable[msgspec.Struct]],
        keep_alive_s: float,
    ) -> None:
        """Describe the stream.

        Args:
            choices: What to write; owned from here on.
            events: Makes the events for one delta, none to several in a row.
            closing: Makes the chunks after the last delta, when usage and timings are known.
            keep_alive_s: Silence after which a comment line is written.
        """
        self._choices = choices
        self._events = events
        self._closing = closing
        self._keep_alive_s = keep_alive_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Write the stream to its end.

        Raises:
            ClientGoneError: The client left.
        """
        try:
            await until_disconnected(receive, self._write(scope, send))
        finally:
            self._choices.cancel()

    async def _write(self, scope: Scope, send: Send) -> None:
        async def take(deltas: Sequence[Delta]) -> None:
            events = b"".join(map(self._events, deltas))
            if events or not deltas:
                await send({"type": "http.response.body", "body": events or KEEP_ALIVE, "more_body": True})

        await send({"type": "http.response.start", "status": 200, "headers": HEADERS})
        try:
            await self._choices.run(take, idle_s=self._keep_alive_s)
            last = b"".join(_event(chunk) for chunk in self._closing()) + DONE
        except ApplianceError as error:
            logger.warning("A stream ended with an error: %s", error)
            last = _error_event(error, scope)
        except Exception:
            logger.exception("A stream failed on a mistake of ours.")
            last = _error_event(internal_error(), scope)
        await send({"type": "http.response.body", "body": last, "more_body": False})


def _event(chunk: msgspec.Struct) -> bytes:
    return b"data: " + msgspec.json.encode(chunk) + b"\n\n"


def _error_event(error: ApplianceError, scope: Scope) -> bytes:
    scope["state"]["code"] = error.code
    return _event(error_response(error, _request_id(scope)))


def _request_id(scope: Scope) -> str:
    request_id: str = scope["state"]["request_id"]
    return request_id
