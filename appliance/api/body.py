"""Reading a JSON request: media type, bytes, decoding off the loop when it would hold others up."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import anyio.to_thread
from starlette.datastructures import Headers
from starlette.requests import Request

from appliance.api.disconnect import ClientGoneError
from appliance.api.wire import decode_json
from appliance.core.errors import InvalidRequestError

T = TypeVar("T")

DECODE_IN_THREAD_BYTES = 1024 * 1024
"""Bodies over this size are decoded in a thread: a megabyte takes some milliseconds, 16 MiB a noticeable stall."""


async def read_json(request: Request, check: Callable[[Any], T]) -> T:
    """Return `check(document)` for the request's JSON document.

    Args:
        request: With a body that nobody has read.
        check: Turns the decoded document into a typed request or raises InvalidRequestError. Pure; may run in a thread.

    Raises:
        InvalidRequestError: The media type, the JSON or the document will not do.
        TooLargeError: The body is over the limit.
        ClientGoneError: The client left before the body was complete.
    """
    _check_media_type(request.headers)
    body = await _read(request)
    if len(body) > DECODE_IN_THREAD_BYTES:
        return await anyio.to_thread.run_sync(lambda: check(decode_json(body)))
    return check(decode_json(body))


async def _read(request: Request) -> bytes:
    parts: list[bytes] = []
    while True:
        message = await request.receive()
        if message["type"] == "http.disconnect":
            raise ClientGoneError
        parts.append(message.get("body", b""))
        if not message.get("more_body", False):
            return b"".join(parts)


def _check_media_type(headers: Headers) -> None:
    """Refuse a body that says it is something else than JSON; one that says nothing is taken for JSON."""
    media_type = headers.get("content-type", "").partition(";")[0].strip().lower()
    if media_type and media_type != "application/json" and not media_type.endswith("+json"):
        raise InvalidRequestError(
            f"The request body is {media_type[:100]!r}.",
            advice="Send JSON with `Content-Type: application/json`.",
            code="unsupported_media_type",
        )
    encoding = headers.get("content-encoding", "identity").lower()
    if encoding != "identity":
        raise InvalidRequestError(
            f"The request body is compressed ({encoding[:100]!r}).",
            advice="Send it as it is.",
            code="unsupported_media_type",
        )
