"""`GET /health`, `GET /health/live` and `GET /metrics`: answered from memory, never by asking an engine."""

from __future__ import annotations

from typing import Literal

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp

from appliance.core.types import HealthSource
from appliance.observe.metrics import CONTENT_TYPE, Metrics


class HealthResponse(msgspec.Struct, frozen=True, omit_defaults=True):
    """Whether requests can be answered now, and the reason why not."""

    status: Literal["ok", "unavailable"]
    reason: str = ""


class Observation:
    """What monitors ask."""

    def __init__(self, health: HealthSource, metrics: Metrics) -> None:
        self._health = health
        self._metrics = metrics

    async def ready(self, _: Request) -> ASGIApp:
        """Answer 200 when ready, 503 with the reason while loading, draining or when an engine's heartbeat is old."""
        health = self._health.health()
        if health.ready:
            return _json(HealthResponse("ok"), 200)
        return _json(HealthResponse("unavailable", health.reason or "not ready"), 503)

    async def live(self, _: Request) -> ASGIApp:
        """Answer 200: the process runs and its event loop turns."""
        return _json(HealthResponse("ok"), 200)

    async def metrics(self, _: Request) -> ASGIApp:
        """Answer with every series in Prometheus' text format."""
        return Response(self._metrics.render(), headers={"content-type": CONTENT_TYPE})


def _json(value: msgspec.Struct, status: int) -> Response:
    return Response(
        msgspec.json.encode(value), status, headers={"cache-control": "no-store"}, media_type="application/json"
    )
