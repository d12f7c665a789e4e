"""What a monitor is answered, at the box's door and at the hub's."""

from __future__ import annotations

from typing import Literal

import msgspec
from starlette.requests import Request
from starlette.responses import Response


class HealthResponse(msgspec.Struct, frozen=True, omit_defaults=True):
    """Whether requests can be answered now, and the reason why not."""

    status: Literal["ok", "unavailable"]
    reason: str = ""


async def answer_live(_: Request) -> Response:
    """Answer 200: the process runs and its event loop turns."""
    return answer_ready("")


def answer_ready(problem: str) -> Response:
    """Return 200, or 503 with the reason why nothing can be answered now."""
    return uncached(
        HealthResponse("unavailable", problem) if problem else HealthResponse("ok"), 503 if problem else 200
    )


def uncached(value: msgspec.Struct, status: int = 200) -> Response:
    """Return JSON that nobody on the way may keep."""
    return Response(
        msgspec.json.encode(value), status, headers={"cache-control": "no-store"}, media_type="application/json"
    )
