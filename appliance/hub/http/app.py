"""The application: the table of routes, and the layers that every request passes, as at the box's door.

What a further part of the hub offers to operators is one more sequence of operations.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Router
from starlette.types import ASGIApp

from appliance.core.hub_settings import HubSettings
from appliance.hub.http.wire import FleetResponse
from appliance.hub.operators import MAKE_KEY
from appliance.hub.overview import Overview
from appliance.observe.hub_metrics import HubMetrics
from appliance.observe.metrics import CONTENT_TYPE
from appliance.web.auth import Authenticator, Keys
from appliance.web.boundary import RequestBoundary
from appliance.web.browsers import BrowserGuard
from appliance.web.health import HealthResponse, answer_live, answer_ready, uncached
from appliance.web.limits import BodyLimit, BodyLimits
from appliance.web.openapi import About, Document, openapi_document
from appliance.web.routes import Operation, no_such_path, starlette_routes

__all__ = ["Router", "create_hub_app"]

_ABOUT = About(
    title="appliance hub",
    description="Many boxes from one place: who they are, what they should be, what they are told to do.",
    make_key=MAKE_KEY,
)


def create_hub_app(
    settings: HubSettings, overview: Overview, operations: Sequence[Operation], *, keys: Keys, metrics: HubMetrics
) -> Router:
    """Return the ASGI application.

    Args:
        settings: Limits, and whether API keys are required.
        overview: What monitors ask.
        operations: Of the hub's parts; those of one path stand together.
        keys: The operators' API keys.
        metrics: Counts requests and is read by `/metrics`.
    """
    authenticator = Authenticator(settings, keys, make_key=MAKE_KEY)
    document = Document(lambda: openapi_document(table, _ABOUT, keys_required=authenticator.required))
    table = (*operations, *_hub_operations(_Observation(overview, metrics), document))
    limit = BodyLimit("max_body_bytes", settings.max_body_bytes)
    return Router(
        routes=starlette_routes(table, authenticator),
        redirect_slashes=False,
        default=no_such_path,
        middleware=[
            Middleware(BodyLimits, settings, lambda _: limit),
            Middleware(RequestBoundary, metrics),
            Middleware(BrowserGuard, settings, authenticator),
        ],
    )


def _hub_operations(observation: _Observation, document: Document) -> Sequence[Operation]:
    return (
        Operation(
            method="GET",
            path="/v1/fleet",
            operation_id="fleet",
            summary="The fleet at a glance",
            handler=observation.fleet,
            access="read",
            response=FleetResponse,
        ),
        Operation(
            method="GET",
            path="/healthz",
            operation_id="live",
            summary="Whether the process runs",
            handler=answer_live,
            access=None,
            response=HealthResponse,
        ),
        Operation(
            method="GET",
            path="/readyz",
            operation_id="ready",
            summary="Whether the hub reaches its broker and its database",
            handler=observation.ready,
            access=None,
            response=HealthResponse,
            other_responses={503: HealthResponse},
        ),
        Operation(
            method="GET",
            path="/metrics",
            operation_id="metrics",
            summary="Figures for Prometheus",
            handler=observation.metrics,
            access="metrics",
            media_type="text/plain",
        ),
        Operation(
            method="GET",
            path="/openapi.json",
            operation_id="openapi",
            summary="This document",
            handler=document.get,
            access="read",
        ),
    )


class _Observation:
    """What monitors ask."""

    def __init__(self, overview: Overview, metrics: HubMetrics) -> None:
        self._overview = overview
        self._metrics = metrics

    async def fleet(self, _: Request) -> ASGIApp:
        """Answer with the fleet at a glance."""
        return uncached(msgspec.convert(self._overview.fleet(), FleetResponse, from_attributes=True))

    async def ready(self, _: Request) -> ASGIApp:
        """Answer 200 when devices can be reached, otherwise 503 with the reason."""
        return answer_ready(self._overview.unready())

    async def metrics(self, _: Request) -> ASGIApp:
        """Answer with every series in Prometheus' text format."""
        self._metrics.show_devices(self._overview.counts())
        return Response(self._metrics.render(), headers={"content-type": CONTENT_TYPE})
