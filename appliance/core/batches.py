"""Batches: requests that were uploaded as the lines of a file and are worked off when nobody else needs the box.

Times are Unix seconds. What belongs to an API key is seen and changed by that key alone: every call names the tenant,
"" on an open server.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

BatchEndpoint = Literal["/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/v1/responses"]

BatchStatus = Literal[
    "validating", "failed", "in_progress", "finalizing", "completed", "expired", "cancelling", "cancelled"
]

BATCH_PURPOSE = "batch"
"""What a file of requests is uploaded for."""

OUTPUT_PURPOSE = "batch_output"
"""What a file of answers is for; none is uploaded for it."""


@dataclass(frozen=True, slots=True)
class BatchError:
    """Why a batch failed; `line` counts from 1, and is None where the whole file is meant."""

    code: str
    message: str
    line: int | None = None
    param: str | None = None


@dataclass(frozen=True, slots=True)
class LineCounts:
    """Lines of a batch: all, those answered with a success, and those answered with an error."""

    total: int = 0
    completed: int = 0
    failed: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class NewBatch:
    """A batch that is to be worked off.

    Attributes:
        window_s: Seconds after which it expires.
        output_expires_after_s: Seconds that its output files are kept, or None.
    """

    endpoint: BatchEndpoint
    input_file: str
    window_s: int
    metadata: Mapping[str, str] | None = None
    output_expires_after_s: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """A batch as it is.

    Attributes:
        id: `batch_` and 24 letters and digits.
        reached: When it first had each status.
        errors: Why it failed, or nothing.
    """

    id: str
    tenant: str
    endpoint: BatchEndpoint
    input_file: str
    status: BatchStatus
    created: int
    expires: int
    counts: LineCounts
    metadata: Mapping[str, str] | None = None
    output_expires_after_s: int | None = None
    output_file: str | None = None
    error_file: str | None = None
    errors: Sequence[BatchError] = ()
    reached: Mapping[BatchStatus, int] = field(default_factory=dict)


class Batches(Protocol):
    """Batches, as the doors see them. Every method raises NotFoundError for what the tenant does not have."""

    async def create(self, new: NewBatch, *, tenant: str) -> Batch:
        """Keep a batch and begin with it; it goes on after a restart.

        Raises:
            InvalidRequestError: The file was uploaded for something else.
            OverloadedError: The tenant has too many that have not ended.
        """
        ...

    def get(self, batch: str, *, tenant: str) -> Batch:
        """Return one batch."""
        ...

    def list(self, *, tenant: str, limit: int, after: str) -> tuple[Sequence[Batch], bool]:
        """Return batches, newest first, and whether there are more."""
        ...

    async def cancel(self, batch: str, *, tenant: str) -> Batch:
        """Stop a batch; what it has answered so far is written to its files. Raises ConflictError once it has ended."""
        ...


@dataclass(frozen=True, slots=True)
class Caller:
    """In whose name a line is answered, and his share of the engine."""

    tenant: str
    weight: float = 1.0


class Callers(Protocol):
    """Who may have work done."""

    def find(self, tenant: str) -> Caller | None:
        """Return who he is now, or None if he may no longer."""
        ...


@dataclass(frozen=True, slots=True)
class LineAnswer:
    """What the door answered to a line.

    Attributes:
        status: As of HTTP.
        body: JSON.
        retry_after_s: Seconds after which the same line may succeed, or None if the answer does not say.
    """

    status: int
    body: bytes
    retry_after_s: float | None = None


class OfflineDoor(Protocol):
    """The door's own handlers, without a connection: a line passes the same checks as a request over HTTP."""

    async def answer(self, endpoint: BatchEndpoint, body: bytes, *, caller: Caller, request_id: str) -> LineAnswer:
        """Answer one request in the lowest tier, whatever happens."""
        ...
