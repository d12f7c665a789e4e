"""`GET /health`, `GET /health/live` and `GET /metrics`: answered from memory, never by asking an engine."""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp

from appliance.core.types import HealthSource
from appliance.observe.metrics import CONTENT_TYPE, Metrics
from appliance.web.health import answer_ready


class Observation:
    """What monitors ask."""

    def __init__(self, health: HealthSource, metrics: Metrics) -> None:
        self._health = health
        self._metrics = metrics

    async def ready(self, _: Request) -> ASGIApp:
        """Answer 200 when ready, 503 with the reason while loading, draining or when an engine's heartbeat is old."""
        health = self._health.health()
        return answer_ready("" if health.ready else health.reason or "not ready")

    async def metrics(self, _: Request) -> ASGIApp:
        """Answer with every series in Prometheus' text format."""
        return Response(self._metrics.render(), headers={"content-type": CONTENT_TYPE})
