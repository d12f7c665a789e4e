"""What vector stores, their files and batches look like on the wire, and how they are made of what is stored."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from appliance.api.openai.paging import Id, PageQuery
from appliance.core.errors import InvalidRequestError
from appliance.core.retrieval import AttributeValue, Chunking, FileBatch, FileCounts, StoreFile, VectorStore
from appliance.web.wire import Text, meaning

MOST_FILES = 2000
"""Of one request."""

Key = Annotated[Text, Meta(min_length=1, max_length=64)]
Value = Annotated[Text, Meta(max_length=512)]
Integer = Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)]
Pairs = Annotated[dict[Key, Value], Meta(max_length=16)]
AttributeKey = Annotated[str, Meta(min_length=1, max_length=64, pattern=r'^[^"\\\x00-\x1f\x7f]+$')]
"""Filters name attributes in paths of JSON."""
Attributes = Annotated[dict[AttributeKey, Value | bool | Integer | float], Meta(max_length=16)]
FileId = Annotated[Id, Meta(min_length=1)]
FileIds = Annotated[list[FileId], Meta(max_length=MOST_FILES)]
Name = Annotated[Text, Meta(max_length=256)]
Description = Annotated[Text, Meta(max_length=4096)]


class StaticSizes(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Tokens of a chunk, and how many of them two neighbours share: at most half."""

    max_chunk_size_tokens: Annotated[int, Meta(ge=100, le=4096)]
    chunk_overlap_tokens: Annotated[int, Meta(ge=0, le=2048)]


class AutoChunking(msgspec.Struct, frozen=True, tag="auto", tag_field="type", forbid_unknown_fields=True):
    """Chunks of the size that suits the embedder."""


class StaticChunking(msgspec.Struct, frozen=True, tag="static", tag_field="type", forbid_unknown_fields=True):
    """Chunks of a given size."""

    static: StaticSizes


ChunkingStrategy = AutoChunking | StaticChunking


class LastActive(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """When an unused store is erased."""

    anchor: Literal["last_active_at"]
    days: Annotated[int, Meta(ge=1, le=365)]


class Counts(msgspec.Struct, frozen=True, kw_only=True):
    """Files by status."""

    in_progress: int
    completed: int
    failed: int
    cancelled: int
    total: int


class ReembeddingObject(msgspec.Struct, frozen=True, kw_only=True):
    """A store gets vectors of another model, and is searched with the old ones until it has all.

    Attributes:
        model: Empty until it has answered.
    """

    model: str
    done: int
    total: int


class VectorStoreObject(msgspec.Struct, frozen=True, kw_only=True):
    """A vector store; `model` and `reembedding` are extensions.

    Attributes:
        status: `in_progress` while any of its files is.
        model: The embedder, fixed by the first file that was embedded; empty until then.
        reembedding: How far it is with being embedded with another model; null unless it is.
    """

    id: str
    object: Literal["vector_store"] = "vector_store"
    created_at: int
    name: str
    description: str
    usage_bytes: int
    file_counts: Counts
    status: Literal["in_progress", "completed"]
    expires_after: LastActive | None
    expires_at: int | None
    last_active_at: int
    metadata: dict[str, str]
    model: str
    reembedding: ReembeddingObject | None


class LastError(msgspec.Struct, frozen=True):
    """Why a file could not be taken in."""

    code: str
    message: str


class VectorStoreFileObject(msgspec.Struct, frozen=True, kw_only=True):
    """A file in a vector store; the fields behind `attributes` are extensions.

    Attributes:
        chunks: So many are searchable by keyword.
        embedded: So many of them are searchable by meaning.
    """

    id: str
    object: Literal["vector_store.file"] = "vector_store.file"
    usage_bytes: int
    created_at: int
    vector_store_id: str
    status: Literal["in_progress", "completed", "cancelled", "failed"]
    last_error: LastError | None
    chunking_strategy: StaticChunking
    attributes: dict[str, str | bool | int | float]
    chunks: int
    embedded: int


class FileBatchObject(msgspec.Struct, frozen=True, kw_only=True):
    """Files that were added together."""

    id: str
    object: Literal["vector_store.files_batch"] = "vector_store.files_batch"
    created_at: int
    vector_store_id: str
    status: Literal["in_progress", "completed", "cancelled", "failed"]
    file_counts: Counts


class VectorStoreList(msgspec.Struct, frozen=True, kw_only=True):
    """A page of vector stores."""

    object: Literal["list"] = "list"
    data: list[VectorStoreObject]
    first_id: str | None
    last_id: str | None
    has_more: bool


class VectorStoreFileList(msgspec.Struct, frozen=True, kw_only=True):
    """A page of files of a vector store."""

    object: Literal["list"] = "list"
    data: list[VectorStoreFileObject]
    first_id: str | None
    last_id: str | None
    has_more: bool


class StoreFilesQuery(PageQuery, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Which files of a store."""

    filter: Annotated[
        Literal["in_progress", "completed", "failed", "cancelled", ""], meaning("Only files of this status")
    ] = ""


class TextPart(msgspec.Struct, frozen=True, kw_only=True):
    """A piece of text."""

    type: Literal["text"] = "text"
    text: str


def chunking_of(strategy: ChunkingStrategy | None) -> Chunking:
    """Return how files are to be cut.

    Raises:
        InvalidRequestError: Chunks would share more than half of their tokens.
    """
    if not isinstance(strategy, StaticChunking):
        return Chunking()
    size, overlap = strategy.static.max_chunk_size_tokens, strategy.static.chunk_overlap_tokens
    if overlap > size // 2:
        raise InvalidRequestError(
            f"Chunks of {size} tokens cannot share {overlap}; {size // 2}, half of them, is the most.",
            param="chunking_strategy",
            code="invalid_value",
        )
    return Chunking(size, overlap)


def attributes_of(given: Mapping[str, Any] | None) -> dict[str, AttributeValue]:
    """Return attributes as they are stored; null is none."""
    return dict(given or {})


def vector_store_object(store: VectorStore) -> VectorStoreObject:
    """Return a store as it goes on the wire."""
    days = store.expires_after_days
    return VectorStoreObject(
        id=store.id,
        created_at=store.created,
        name=store.name,
        description=store.description,
        usage_bytes=store.usage,
        file_counts=_counts(store.counts),
        status="in_progress" if store.counts.in_progress else "completed",
        expires_after=None if days is None else LastActive("last_active_at", days),
        expires_at=store.expires,
        last_active_at=store.last_active,
        metadata=dict(store.metadata),
        model=store.model,
        reembedding=None
        if store.reembedding is None
        else ReembeddingObject(
            model=store.reembedding.model, done=store.reembedding.done, total=store.reembedding.total
        ),
    )


def store_file_object(file: StoreFile) -> VectorStoreFileObject:
    """Return a file of a store as it goes on the wire."""
    return VectorStoreFileObject(
        id=file.id,
        usage_bytes=file.usage,
        created_at=file.created,
        vector_store_id=file.store,
        status=file.status,
        last_error=LastError(file.error_code, file.error) if file.error_code else None,
        chunking_strategy=StaticChunking(StaticSizes(file.chunking.most_tokens, file.chunking.overlap_tokens)),
        attributes=dict(file.attributes),
        chunks=file.chunks,
        embedded=file.embedded,
    )


def batch_object(batch: FileBatch) -> FileBatchObject:
    """Return a batch as it goes on the wire."""
    return FileBatchObject(
        id=batch.id,
        created_at=batch.created,
        vector_store_id=batch.store,
        status=batch.status,
        file_counts=_counts(batch.counts),
    )


def _counts(counts: FileCounts) -> Counts:
    return Counts(
        in_progress=counts.in_progress,
        completed=counts.completed,
        failed=counts.failed,
        cancelled=counts.cancelled,
        total=counts.in_progress + counts.completed + counts.failed + counts.cancelled,
    )
