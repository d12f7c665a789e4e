"""What the two completion resources do alike: name an answer, and send it whole or as a stream."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Sequence
from typing import Any

import anyio.to_thread
import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp

from appliance.api.choices import Choices
from appliance.api.openai.sampling import (
    SamplingFields,
    service_tier,
    system_fingerprint,
    timings_response,
    usage_response,
)
from appliance.api.openai.stream import ChunkStream
from appliance.core.types import Delta, GenerationRequest
from appliance.web.disconnect import until_disconnected


class Heading(msgspec.Struct, frozen=True, kw_only=True):
    """The fields that are the same in an answer and in each of its chunks."""

    id: str
    created: int
    model: str
    service_tier: str
    system_fingerprint: str

    def fields(self) -> dict[str, Any]:
        """Return them as keyword arguments of a wire type."""
        return msgspec.structs.asdict(self)


def heading(prefix: str, work: GenerationRequest, choices: Choices) -> Heading:
    """Return the heading of the answer to the work; `prefix` is what OpenAI's ids begin with."""
    return Heading(
        id=f"{prefix}-{secrets.token_hex(12)}",
        created=int(time.time()),
        model=choices.model,
        service_tier=service_tier(work.priority),
        system_fingerprint=system_fingerprint(choices.model),
    )


def ending(choices: Choices) -> dict[str, Any]:
    """Return usage and timings, which are complete once every choice has ended."""
    return {"usage": usage_response(choices.usage), "timings": timings_response(choices.timings)}


async def send_whole(
    request: Request, choices: Choices, render: Callable[[Sequence[Delta]], msgspec.Struct]
) -> Response:
    """Wait for every choice and return the answer; the client's leaving cancels them.

    Raises:
        ClientGoneError: The client left.
        ApplianceError: What ended the work.
    """
    deltas = await until_disconnected(request.receive, choices.collect())
    if any(delta.logprobs for delta in deltas):  # may be a hundred thousand entries
        body = await anyio.to_thread.run_sync(lambda: msgspec.json.encode(render(deltas)))
    else:
        body = msgspec.json.encode(render(deltas))
    return Response(body, media_type="application/json")


def send_stream(
    choices: Choices,
    fields: SamplingFields,
    keep_alive_s: float,
    events: Callable[[Delta], bytes],
    usage_chunk: Callable[[], msgspec.Struct],
) -> ASGIApp:
    """Return the stream of an answer, with a last chunk for the usage if the client asked for it."""
    wanted = includes_usage(fields)
    return ChunkStream(
        choices, events=events, closing=lambda: [usage_chunk()] if wanted else [], keep_alive_s=keep_alive_s
    )


def includes_usage(fields: SamplingFields) -> bool:
    """Tell whether the client asked for usage in the stream."""
    return fields.stream_options is not None and bool(fields.stream_options.include_usage)
