"""Reading a request body: media type, bytes, decoding JSON off the loop when it would hold others up."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any, TypeVar

import anyio.to_thread
from starlette.datastructures import Headers
from starlette.requests import Request

from appliance.core.errors import InvalidRequestError
from appliance.web.body_buffer import BODY_BUFFER, BodyBuffer
from appliance.web.disconnect import ClientGoneError
from appliance.web.wire import decode_json

T = TypeVar("T")

DECODE_IN_THREAD_BYTES = 1024 * 1024
"""Bodies over this size are decoded in a thread: a megabyte takes some milliseconds, 16 MiB a noticeable stall."""


async def read_json(request: Request, check: Callable[[Any], T], *, empty: bytes = b"") -> T:
    """Return `check(document)` for the request's JSON document.

    Args:
        request: With a body that nobody has read.
        check: Turns the decoded document into a typed request or raises InvalidRequestError. Pure; may run in a thread.
        empty: The JSON that no body at all stands for.

    Raises:
        InvalidRequestError: The media type, the JSON or the document will not do.
        TooLargeError: The body is over the limit.
        ClientGoneError: The client left before the body was complete.
    """
    check_media_type(request.headers)
    body = await read_bytes(request) or empty
    if len(body) > DECODE_IN_THREAD_BYTES:
        return await anyio.to_thread.run_sync(lambda: check(decode_json(body)))
    return check(decode_json(body))


async def read_bytes(request: Request) -> bytes:
    """Return the body.

    Raises:
        TooLargeError: The body is over the limit.
        ClientGoneError: The client left before the body was complete.
    """
    parts: list[bytes] = []
    while True:
        message = await request.receive()
        if message["type"] == "http.disconnect":
            raise ClientGoneError
        parts.append(message.get("body", b""))
        if not message.get("more_body", False):
            return b"".join(parts)


async def read_into(request: Request, allocate: Callable[[], memoryview]) -> memoryview:
    """Return a body that announces its length, in memory of the caller's, where the connection writes it.

    Args:
        request: With a body that nobody has read.
        allocate: Returns memory of that length; called when the first part has come within the limits.

    Raises:
        TooLargeError: The body is over the limit.
        ClientGoneError: The client left before the body was complete.
    """
    message = await request.receive()
    memory = allocate()
    buffer = BodyBuffer(memory)
    while True:
        if message["type"] == "http.disconnect":
            raise ClientGoneError
        buffer.append(message.get("body", b""))
        if not message.get("more_body", False):
            return memory
        request.scope["state"][BODY_BUFFER] = buffer
        message = await request.receive()


def check_media_type(headers: Headers, *others: str, encodings: Collection[str] = ()) -> str:
    """Refuse a body that says it is something else than JSON; one that says nothing is taken for JSON.

    Args:
        headers: Of the request.
        others: Media types that will do as well.
        encodings: Compressions that will do.

    Returns:
        The compression, or `identity`.

    Raises:
        InvalidRequestError: The media type or the compression will not do.
    """
    media_type = headers.get("content-type", "").partition(";")[0].strip().lower()
    if media_type and media_type not in ("application/json", *others) and not media_type.endswith("+json"):
        raise InvalidRequestError(
            f"The request body is {media_type[:100]!r}.",
            advice="Send JSON with `Content-Type: application/json`.",
            code="unsupported_media_type",
        )
    encoding = headers.get("content-encoding", "identity").lower()
    if encoding != "identity" and encoding not in encodings:
        raise InvalidRequestError(
            f"The request body is compressed ({encoding[:100]!r}).",
            advice=f"Send it as it is{''.join(f', or {each}' for each in sorted(encodings))}.",
            code="unsupported_media_type",
        )
    return encoding
