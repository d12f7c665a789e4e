"""The model repository extension: what there is, load and unload.

https://docs.nvidia.com/deeplearning/triton-inference-server/user-guide/docs/protocol/extension_model_repository.html
"""

from __future__ import annotations

from functools import partial

from starlette.requests import Request
from starlette.types import ASGIApp

from appliance.api.oip.answers import json_answer
from appliance.api.oip.wire import (
    LoadRequest,
    RepositoryChanged,
    RepositoryIndexRequest,
    RepositoryModel,
    UnloadRequest,
)
from appliance.core.settings import Settings
from appliance.core.tensors import TensorModels
from appliance.web.body import read_json
from appliance.web.disconnect import until_disconnected
from appliance.web.wire import convert

NO_BODY = b"{}"
"""What an empty body stands for: clients send none where there is nothing to say."""


class Repository:
    """The registered tensor models."""

    def __init__(self, models: TensorModels, settings: Settings) -> None:
        self._models = models
        self._settings = settings

    async def index(self, request: Request) -> ASGIApp:
        """Answer with every version of every model, or with those that are ready."""
        fields = await read_json(request, partial(convert, request_type=RepositoryIndexRequest), empty=NO_BODY)
        found = [each for each in self._models.index() if each.state == "READY" or not fields.ready]
        return json_answer([RepositoryModel(each.name, each.version, each.state, each.reason) for each in found])

    async def load(self, request: Request) -> ASGIApp:
        """Load the version registered last, and answer when it is ready.

        Raises:
            ApplianceError: As by `TensorModels.load`.
        """
        await read_json(request, partial(convert, request_type=LoadRequest), empty=NO_BODY)
        work = self._models.load(_model(request))
        await until_disconnected(request.receive, work, limit_s=self._settings.request_timeout_s)
        return json_answer(RepositoryChanged())

    async def unload(self, request: Request) -> ASGIApp:
        """Unload every version, and answer when it is done.

        Raises:
            NotFoundError: There is no such model.
        """
        await read_json(request, partial(convert, request_type=UnloadRequest), empty=NO_BODY)
        await self._models.unload(_model(request))
        return json_answer(RepositoryChanged())


def _model(request: Request) -> str:
    name: str = request.path_params["model"]
    request.scope["state"]["model"] = name
    return name
