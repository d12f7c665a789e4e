"""What batches look like on the wire."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from appliance.api.openai.paging import Id
from appliance.api.openai.vector_store_wire import FileId, Pairs
from appliance.core.batches import Batch, BatchEndpoint, BatchStatus
from appliance.web.wire import meaning

WINDOW_S = 86_400
"""Of the one completion window that there is, `24h`."""


class OutputExpiry(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How long output files are kept."""

    anchor: Annotated[Literal["created_at"], meaning("Since when they age: their own creation")]
    seconds: Annotated[Annotated[int, Meta(ge=3600, le=30 * 86_400)], meaning("Seconds until they are erased")]


class CreateBatchRequest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A batch that is to be worked off."""

    input_file_id: Annotated[FileId, meaning("A file of the purpose `batch`, a request a line")]
    endpoint: Annotated[BatchEndpoint, meaning("What every line asks for")]
    completion_window: Annotated[Literal["24h"], meaning("When it expires")]
    metadata: Annotated[Pairs | None, meaning("Up to 16 pairs of texts, kept with the batch")] = None
    output_expires_after: Annotated[OutputExpiry | None, meaning("How long its output files are kept")] = None


class BatchesQuery(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Which batches, newest first."""

    limit: Annotated[Annotated[int, Meta(ge=1, le=100)], meaning("Most entries of the page")] = 20
    after: Annotated[Id, meaning("Id of the last entry of the page before")] = ""


class BatchErrorObject(msgspec.Struct, frozen=True, kw_only=True):
    """Why a batch failed; `line` counts from 1."""

    code: str
    message: str
    line: int | None
    param: str | None


class BatchErrorList(msgspec.Struct, frozen=True, kw_only=True):
    """All that is wrong with a batch, up to 100."""

    object: Literal["list"] = "list"
    data: list[BatchErrorObject]


class RequestCounts(msgspec.Struct, frozen=True, kw_only=True):
    """Lines of a batch: all, answered with a success, answered with an error."""

    total: int
    completed: int
    failed: int


class BatchObject(msgspec.Struct, frozen=True, kw_only=True):
    """A batch."""

    id: str
    object: Literal["batch"] = "batch"
    endpoint: BatchEndpoint
    errors: BatchErrorList | None
    input_file_id: str
    completion_window: Literal["24h"] = "24h"
    status: BatchStatus
    output_file_id: str | None
    error_file_id: str | None
    created_at: int
    in_progress_at: int | None
    expires_at: int
    finalizing_at: int | None
    completed_at: int | None
    failed_at: int | None
    expired_at: int | None
    cancelling_at: int | None
    cancelled_at: int | None
    request_counts: RequestCounts
    metadata: dict[str, Any] | None


class BatchList(msgspec.Struct, frozen=True, kw_only=True):
    """A page of batches."""

    object: Literal["list"] = "list"
    data: list[BatchObject]
    first_id: str | None
    last_id: str | None
    has_more: bool


def batch_object(batch: Batch) -> BatchObject:
    """Return a batch as it goes on the wire."""
    errors = [
        BatchErrorObject(code=each.code, message=each.message, line=each.line, param=each.param)
        for each in batch.errors
    ]
    at = batch.reached.get
    return BatchObject(
        id=batch.id,
        endpoint=batch.endpoint,
        errors=BatchErrorList(data=errors) if errors else None,
        input_file_id=batch.input_file,
        status=batch.status,
        output_file_id=batch.output_file,
        error_file_id=batch.error_file,
        created_at=batch.created,
        in_progress_at=at("in_progress"),
        expires_at=batch.expires,
        finalizing_at=at("finalizing"),
        completed_at=at("completed"),
        failed_at=at("failed"),
        expired_at=at("expired"),
        cancelling_at=at("cancelling"),
        cancelled_at=at("cancelled"),
        request_counts=RequestCounts(
            total=batch.counts.total, completed=batch.counts.completed, failed=batch.counts.failed
        ),
        metadata=None if batch.metadata is None else dict(batch.metadata),
    )
