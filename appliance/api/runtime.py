"""`GET` and `PATCH /v1/models/{model}/runtime`: what a loaded model runs with, changed without a restart."""

from __future__ import annotations

from typing import Annotated, ClassVar

import msgspec
from msgspec import Meta
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp

from appliance.core.types import ModelRuntime, RuntimeChange, TunableModels
from appliance.web.body import read_json
from appliance.web.wire import convert, meaning


class RuntimeChangeRequest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """New values; what is left out or null stays. They hold until the model is unloaded or the server ends."""

    threads: Annotated[
        Annotated[int, Meta(ge=0, le=1024)] | None, meaning("CPU threads; 0 is one per physical core")
    ] = None
    batch_tokens: Annotated[
        Annotated[int, Meta(ge=1, le=8192)] | None, meaning("Most tokens of one engine step, up to `most_batch_tokens`")
    ] = None
    target_inter_token_latency_s: Annotated[
        Annotated[float, Meta(gt=0, le=86_400 * 366)] | None,
        meaning("Engine steps are cut to this length while anyone is streaming"),
    ] = None

    schema_limits: ClassVar[dict[str, tuple[str, str]]] = {"batch_tokens": ("max_sequences", "batch_tokens")}
    """Settings that bound a field on this box, which the type cannot know."""


class RuntimeResponse(msgspec.Struct, frozen=True, kw_only=True):
    """What a loaded model runs with; see the settings of the same names.

    Attributes:
        most_batch_tokens: What its context was made for.
    """

    model: str
    threads: int
    batch_tokens: int
    most_batch_tokens: int
    target_inter_token_latency_s: float


class Runtime:
    """The resource."""

    def __init__(self, models: TunableModels) -> None:
        self._models = models

    async def show(self, request: Request) -> ASGIApp:
        """Answer with what a loaded model runs with.

        Raises:
            NotFoundError: There is no such model, or it is not loaded.
        """
        return _json(self._models.runtime(request.path_params["model"]))

    async def change(self, request: Request) -> ASGIApp:
        """Change what a loaded model runs with, all values or none, and answer with what it then runs with.

        Raises:
            InvalidRequestError: A value will not do.
            NotFoundError: There is no such model, or it is not loaded.
        """
        fields = await read_json(request, lambda document: convert(document, RuntimeChangeRequest))
        change = RuntimeChange(**msgspec.structs.asdict(fields))
        return _json(self._models.tune(request.path_params["model"], change))


def _json(runtime: ModelRuntime) -> Response:
    response = msgspec.convert(runtime, RuntimeResponse, from_attributes=True)
    return Response(msgspec.json.encode(response), media_type="application/json")
