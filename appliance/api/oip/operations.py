"""The routes of the Open Inference Protocol."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from appliance.api.oip.infer import Inference
from appliance.api.oip.models import TensorModelResource
from appliance.api.oip.repository import Repository
from appliance.api.oip.server import InferenceServer
from appliance.api.oip.wire import (
    InferRequest,
    InferResponse,
    LoadRequest,
    ModelMetadata,
    ModelReady,
    RepositoryChanged,
    RepositoryIndexRequest,
    RepositoryModel,
    ServerLive,
    ServerMetadata,
    ServerReady,
    StatisticsResponse,
    UnloadRequest,
)
from appliance.core.settings import Settings
from appliance.core.tensors import TensorModels
from appliance.core.types import HealthSource
from appliance.web.routes import Operation

_MODEL = {"model": "The name of a registered ONNX model"}
_VERSION = {**_MODEL, "version": "One of its versions"}
_EXAMPLES: Mapping[str, Mapping[str, Any]] = {
    "json": {
        "id": "42",
        "inputs": [{"name": "x", "shape": [2, 2], "datatype": "FP32", "data": [[1.0, 2.0], [3.0, 4.5]]}],
    },
    "first classes": {
        "inputs": [{"name": "x", "shape": [1, 3], "datatype": "FP32", "data": [0.1, 0.7, 0.2]}],
        "outputs": [{"name": "y", "parameters": {"classification": 2}}],
        "parameters": {"priority": 1, "timeout": 2_000_000},
    },
}


def inference_operations(settings: Settings, models: TensorModels, health: HealthSource) -> Sequence[Operation]:
    """Return the routes under /v2."""
    return (*_server(health), *_models(models), *_inference(settings, models), *_repository(settings, models))


def _server(health: HealthSource) -> Sequence[Operation]:
    server = InferenceServer(health)
    return (
        Operation(
            method="GET",
            path="/v2",
            operation_id="inferenceServer",
            summary="Name, version and extensions of the inference protocol",
            handler=server.metadata,
            access="inference",
            response=ServerMetadata,
        ),
        Operation(
            method="GET",
            path="/v2/health/live",
            operation_id="inferenceLive",
            summary="Whether the process runs",
            handler=server.live,
            access=None,
            response=ServerLive,
        ),
        Operation(
            method="GET",
            path="/v2/health/ready",
            operation_id="inferenceReady",
            summary="Whether requests can be answered now; 400 if not",
            handler=server.ready,
            access=None,
            response=ServerReady,
        ),
    )


def _models(models: TensorModels) -> Sequence[Operation]:
    resource = TensorModelResource(models)
    every = Operation(
        method="GET",
        path="/v2/models/stats",
        operation_id="allTensorModelStatistics",
        summary="Show what the loaded tensor models have done",
        handler=resource.statistics,
        access="inference",
        response=StatisticsResponse,
    )
    metadata = Operation(
        method="GET",
        path="/v2/models/{model}",
        operation_id="tensorModel",
        summary="Show inputs, outputs and execution providers of a tensor model",
        handler=resource.metadata,
        access="inference",
        parameters=_MODEL,
        response=ModelMetadata,
        errors=(404,),
    )
    ready = Operation(
        method="GET",
        path="/v2/models/{model}/ready",
        operation_id="tensorModelReady",
        summary="Whether a tensor model is loaded and works; 400 if not",
        handler=resource.ready,
        access="inference",
        parameters=_MODEL,
        response=ModelReady,
        errors=(404,),
    )
    statistics = replace(
        every,
        path="/v2/models/{model}/stats",
        operation_id="tensorModelStatistics",
        summary="Show what a loaded tensor model has done",
        parameters=_MODEL,
        errors=(404,),
    )
    return (every, *(each for one in (metadata, ready, statistics) for each in (one, _versioned(one))))


def _inference(settings: Settings, models: TensorModels) -> Sequence[Operation]:
    infer = Operation(
        method="POST",
        path="/v2/models/{model}/infer",
        operation_id="infer",
        summary="Turn tensors into tensors; they may be binary data behind the JSON",
        handler=Inference(models, settings).infer,
        access="inference",
        parameters=_MODEL,
        request=(InferRequest,),
        examples=_EXAMPLES,
        response=InferResponse,
        errors=(404, 429),
    )
    return (infer, _versioned(infer))


def _repository(settings: Settings, models: TensorModels) -> Sequence[Operation]:
    repository = Repository(models, settings)
    load = Operation(
        method="POST",
        path="/v2/repository/models/{model}/load",
        operation_id="loadTensorModel",
        summary="Load the version of a tensor model that was registered last",
        handler=repository.load,
        access="admin",
        parameters=_MODEL,
        request=(LoadRequest,),
        request_optional=True,
        response=RepositoryChanged,
        errors=(404, 429),
    )
    return (
        Operation(
            method="POST",
            path="/v2/repository/index",
            operation_id="tensorModelIndex",
            summary="List every version of every tensor model",
            handler=repository.index,
            access="inference",
            request=(RepositoryIndexRequest,),
            request_optional=True,
            response=RepositoryModel,
            response_is_list=True,
        ),
        load,
        replace(
            load,
            path="/v2/repository/models/{model}/unload",
            operation_id="unloadTensorModel",
            summary="Unload a tensor model; the next request for it loads it again",
            handler=repository.unload,
            request=(UnloadRequest,),
            errors=(404,),
        ),
    )


def _versioned(operation: Operation) -> Operation:
    """Return the same for a version that the path names."""
    return replace(
        operation,
        path=operation.path.replace("/{model}", "/{model}/versions/{version}"),
        operation_id=f"{operation.operation_id}Version",
        parameters=_VERSION,
    )
