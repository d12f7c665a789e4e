"""`GET /v2`, `GET /v2/health/live` and `GET /v2/health/ready`."""

from __future__ import annotations

from starlette.requests import Request
from starlette.types import ASGIApp

from appliance import __version__
from appliance.api.oip.answers import json_answer
from appliance.api.oip.wire import ServerLive, ServerMetadata, ServerReady
from appliance.core.errors import InvalidRequestError
from appliance.core.types import HealthSource

EXTENSIONS = ("binary_tensor_data", "classification", "model_repository", "schedule_policy", "statistics")
"""The extensions of the protocol that are here, by Triton's names."""


class InferenceServer:
    """The server as a whole."""

    def __init__(self, health: HealthSource) -> None:
        self._health = health

    async def metadata(self, _: Request) -> ASGIApp:
        """Answer with name, version and extensions."""
        return json_answer(ServerMetadata("appliance", __version__, list(EXTENSIONS)))

    async def live(self, _: Request) -> ASGIApp:
        """Answer 200: the process runs and its event loop turns."""
        return json_answer(ServerLive())

    async def ready(self, _: Request) -> ASGIApp:
        """Answer 200 when ready.

        Raises:
            InvalidRequestError: It is not; the protocol says so with a status from 400 to 499, and Triton with 400.
        """
        health = self._health.health()
        if not health.ready:
            raise InvalidRequestError(f"Not ready: {health.reason or 'starting'}.", code="not_ready")
        return json_answer(ServerReady())
