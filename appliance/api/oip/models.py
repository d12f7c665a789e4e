"""`GET /v2/models/{model}`, whether it is ready, and the statistics extension.

https://docs.nvidia.com/deeplearning/triton-inference-server/user-guide/docs/protocol/extension_statistics.html
"""

from __future__ import annotations

from collections.abc import Iterable

from starlette.requests import Request
from starlette.types import ASGIApp

from appliance.api.oip.answers import json_answer
from appliance.api.oip.wire import (
    BatchSizeStatistics,
    InferenceStatistics,
    ModelMetadata,
    ModelReady,
    ModelStatistics,
    StatisticDuration,
    StatisticsResponse,
    TensorMetadata,
)
from appliance.core.errors import InvalidRequestError
from appliance.core.tensors import Duration, TensorModels, TensorSpec, TensorStatistics


class TensorModelResource:
    """The models."""

    def __init__(self, models: TensorModels) -> None:
        self._models = models

    async def metadata(self, request: Request) -> ASGIApp:
        """Answer with inputs, outputs and what the model runs with.

        Raises:
            NotFoundError: There is no such model or version; the message names those that exist.
        """
        card = self._models.card(*_named(request))
        return json_answer(
            ModelMetadata(
                name=card.name,
                versions=list(card.versions),
                platform=card.platform,
                inputs=_tensors(card.signature.inputs),
                outputs=_tensors(card.signature.outputs),
                parameters=dict(card.properties),
            )
        )

    async def ready(self, request: Request) -> ASGIApp:
        """Answer 200 when the model is loaded and works.

        Raises:
            InvalidRequestError: It is not; the protocol says so with a status from 400 to 499, and Triton with 400.
            NotFoundError: There is no such model or version.
        """
        model, version = _named(request)
        if not self._models.is_ready(model, version):
            raise InvalidRequestError(
                f"The model {model!r} is not ready.",
                advice=f"The first request for it loads it, and so does POST /v2/repository/models/{model}/load.",
                code="not_ready",
            )
        return json_answer(ModelReady(model))

    async def statistics(self, request: Request) -> ASGIApp:
        """Answer with the figures of a model's loaded versions, or of all models.

        Raises:
            NotFoundError: There is no such model or version.
        """
        found = self._models.statistics(*_named(request))
        return json_answer(StatisticsResponse([_statistics(each) for each in found]))


def _named(request: Request) -> tuple[str, str]:
    return request.path_params.get("model", ""), request.path_params.get("version", "")


def _tensors(specs: Iterable[TensorSpec]) -> list[TensorMetadata]:
    return [TensorMetadata(each.name, each.datatype, list(each.shape)) for each in specs]


def _duration(duration: Duration) -> StatisticDuration:
    return StatisticDuration(duration.count, round(duration.total_s * 1e9))


def _statistics(given: TensorStatistics) -> ModelStatistics:
    no_cache = StatisticDuration(0, 0)
    return ModelStatistics(
        name=given.name,
        version=given.version,
        last_inference=round(given.last_inference * 1000),
        inference_count=given.inference_count,
        execution_count=given.execution_count,
        inference_stats=InferenceStatistics(
            success=_duration(given.success),
            fail=_duration(given.fail),
            queue=_duration(given.queue),
            compute_input=_duration(given.compute_input),
            compute_infer=_duration(given.compute_infer),
            compute_output=_duration(given.compute_output),
            cancel=_duration(given.cancel),
            cache_hit=no_cache,
            cache_miss=no_cache,
        ),
        batch_stats=[
            BatchSizeStatistics(
                batch_size=rows,
                compute_input=_duration(batch.compute_input),
                compute_infer=_duration(batch.compute_infer),
                compute_output=_duration(batch.compute_output),
            )
            for rows, batch in sorted(given.batches.items())
        ],
    )
