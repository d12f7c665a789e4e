"""`/v1/batches`: created over an uploaded file, looked at and cancelled; each API key sees its own."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp

from appliance.api.openai.batch_wire import (
    WINDOW_S,
    BatchesQuery,
    BatchList,
    BatchObject,
    CreateBatchRequest,
    batch_object,
)
from appliance.api.openai.files import tenant_of
from appliance.api.openai.paging import ends, query_of
from appliance.core.batches import Batches, NewBatch
from appliance.web.body import read_json
from appliance.web.routes import Operation
from appliance.web.wire import convert

BATCHES = "/v1/batches"
BATCH = f"{BATCHES}/{{batch_id}}"

_PARAMETERS = {"batch_id": "Id of a batch, `batch_…`"}


class BatchResource:
    """The resource."""

    def __init__(self, batches: Batches) -> None:
        self._batches = batches

    async def create(self, request: Request) -> ASGIApp:
        """Begin a batch. Raises as `Batches.create`."""
        fields = await read_json(request, lambda document: convert(document, CreateBatchRequest))
        kept = fields.output_expires_after
        new = NewBatch(
            endpoint=fields.endpoint,
            input_file=fields.input_file_id,
            window_s=WINDOW_S,
            metadata=fields.metadata,
            output_expires_after_s=None if kept is None else kept.seconds,
        )
        return _json(batch_object(await self._batches.create(new, tenant=tenant_of(request))))

    async def list(self, request: Request) -> ASGIApp:
        """Answer with a page of batches."""
        query = query_of(request, BatchesQuery)
        found, more = self._batches.list(tenant=tenant_of(request), limit=query.limit, after=query.after)
        first, last = ends(found)
        return _json(
            BatchList(data=[batch_object(each) for each in found], first_id=first, last_id=last, has_more=more)
        )

    async def retrieve(self, request: Request) -> ASGIApp:
        """Answer with one batch. Raises NotFoundError."""
        return _json(batch_object(self._batches.get(_name(request), tenant=tenant_of(request))))

    async def cancel(self, request: Request) -> ASGIApp:
        """Stop a batch, and answer with it. Raises NotFoundError, or ConflictError once it has ended."""
        return _json(batch_object(await self._batches.cancel(_name(request), tenant=tenant_of(request))))


def batch_operations(batches: Batches) -> Sequence[Operation]:
    """Return the routes of batches."""
    resource = BatchResource(batches)
    return (
        Operation(
            method="GET",
            path=BATCHES,
            operation_id="listBatches",
            summary="List one's own batches",
            handler=resource.list,
            access="inference",
            query=BatchesQuery,
            response=BatchList,
            errors=(404,),
        ),
        Operation(
            method="POST",
            path=BATCHES,
            operation_id="createBatch",
            summary="Work off a file of requests when nobody else needs the box",
            handler=resource.create,
            access="inference",
            request=(CreateBatchRequest,),
            examples={
                "chat": {
                    "input_file_id": "file-abc123",
                    "endpoint": "/v1/chat/completions",
                    "completion_window": "24h",
                    "metadata": {"job": "night"},
                }
            },
            response=BatchObject,
            errors=(404, 429),
        ),
        Operation(
            method="GET",
            path=BATCH,
            operation_id="retrieveBatch",
            summary="Show one batch",
            handler=resource.retrieve,
            access="inference",
            parameters=_PARAMETERS,
            response=BatchObject,
            errors=(404,),
        ),
        Operation(
            method="POST",
            path=f"{BATCH}/cancel",
            operation_id="cancelBatch",
            summary="Stop a batch; what it has answered so far is written to its files",
            handler=resource.cancel,
            access="inference",
            parameters=_PARAMETERS,
            response=BatchObject,
            errors=(404, 409),
        ),
    )


def _name(request: Request) -> str:
    name: str = request.path_params["batch_id"]
    return name


def _json(value: msgspec.Struct) -> Response:
    return Response(msgspec.json.encode(value), media_type="application/json")
