"""`/v1/vector_stores/{id}/files` and `…/file_batches`: what is taken into a vector store, and how far that is."""

from __future__ import annotations

from typing import Annotated, Literal

import anyio.to_thread
import msgspec
from msgspec import Meta
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp

from appliance.api.openai.files import tenant_of
from appliance.api.openai.paging import ends, query_of
from appliance.api.openai.vector_store_wire import (
    MOST_FILES,
    Attributes,
    ChunkingStrategy,
    FileId,
    FileIds,
    StoreFilesQuery,
    TextPart,
    VectorStoreFileList,
    attributes_of,
    batch_object,
    chunking_of,
    store_file_object,
)
from appliance.core.errors import InvalidRequestError
from appliance.core.retrieval import FileBatch, NewStoreFile, VectorStores
from appliance.web.body import read_json
from appliance.web.wire import convert, meaning

PAIRS = "Up to 16 values by which searches can be filtered"
CUT = "How the text is cut; `auto` unless given"


class AddedFileRequest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A file that is to be taken in."""

    file_id: Annotated[FileId, meaning("An uploaded file")]
    attributes: Annotated[Attributes | None, meaning(PAIRS)] = None
    chunking_strategy: Annotated[ChunkingStrategy | None, meaning(CUT)] = None


class FileAttributesRequest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """New attributes for a file in a store."""

    attributes: Annotated[Attributes | None, meaning("Replace all that it had; null is none")]


class FileBatchRequest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Files that are to be taken in together: `file_ids`, or `files` with attributes of their own."""

    file_ids: Annotated[FileIds | None, meaning("Uploaded files")] = None
    files: Annotated[
        Annotated[list[AddedFileRequest], Meta(max_length=MOST_FILES)] | None,
        meaning("Uploaded files, each with its own attributes and chunking; instead of `file_ids`"),
    ] = None
    attributes: Annotated[Attributes | None, meaning("Of all `file_ids`")] = None
    chunking_strategy: Annotated[ChunkingStrategy | None, meaning("Of all `file_ids`")] = None


class DeletedVectorStoreFile(msgspec.Struct, frozen=True, kw_only=True):
    """A file that is in a store no more."""

    id: str
    object: Literal["vector_store.file.deleted"] = "vector_store.file.deleted"
    deleted: bool = True


class FileContentPage(msgspec.Struct, frozen=True, kw_only=True):
    """The text that was taken from a file, chunk by chunk."""

    object: Literal["vector_store.file_content.page"] = "vector_store.file_content.page"
    data: list[TextPart]
    has_more: bool = False
    next_page: None = None


class VectorStoreFileResource:
    """The resource of files in a store."""

    def __init__(self, stores: VectorStores) -> None:
        self._stores = stores

    async def create(self, request: Request) -> ASGIApp:
        """Queue a file to be taken in. Raises NotFoundError."""
        fields = await read_json(request, lambda document: convert(document, AddedFileRequest))
        wanted = _wanted(fields)
        store, tenant = request.path_params["vector_store_id"], tenant_of(request)
        _, added = await anyio.to_thread.run_sync(lambda: self._stores.add(store, [wanted], tenant=tenant, batch=False))
        return _json(store_file_object(added[0]))

    async def list(self, request: Request) -> ASGIApp:
        """Answer with a page of a store's files. Raises NotFoundError."""
        return await list_files(request, self._stores)

    async def retrieve(self, request: Request) -> ASGIApp:
        """Answer with one file. Raises NotFoundError."""
        store, file, tenant = _of(request)
        found = await anyio.to_thread.run_sync(lambda: self._stores.get_file(store, file, tenant=tenant))
        return _json(store_file_object(found))

    async def change(self, request: Request) -> ASGIApp:
        """Replace a file's attributes. Raises NotFoundError."""
        fields = await read_json(request, lambda document: convert(document, FileAttributesRequest))
        attributes = attributes_of(fields.attributes)
        store, file, tenant = _of(request)
        changed = await anyio.to_thread.run_sync(
            lambda: self._stores.change_file(store, file, attributes, tenant=tenant)
        )
        return _json(store_file_object(changed))

    async def content(self, request: Request) -> ASGIApp:
        """Answer with the text that was taken from a file. Raises NotFoundError."""
        store, file, tenant = _of(request)

        def encoded() -> bytes:
            texts = self._stores.file_text(store, file, tenant=tenant)
            return msgspec.json.encode(FileContentPage(data=[TextPart(text=each) for each in texts]))

        return Response(await anyio.to_thread.run_sync(encoded), media_type="application/json")

    async def delete(self, request: Request) -> ASGIApp:
        """Take a file out of a store; the uploaded file stays. Raises NotFoundError."""
        store, file, tenant = _of(request)
        await self._stores.remove_file(store, file, tenant=tenant)
        return _json(DeletedVectorStoreFile(id=file))


class FileBatchResource:
    """The resource of file batches."""

    def __init__(self, stores: VectorStores) -> None:
        self._stores = stores

    async def create(self, request: Request) -> ASGIApp:
        """Queue files to be taken in together. Raises NotFoundError."""
        fields = await read_json(request, lambda document: convert(document, FileBatchRequest))
        wanted = _batch_files(fields)
        store, tenant = request.path_params["vector_store_id"], tenant_of(request)

        def add() -> FileBatch:
            batch, _ = self._stores.add(store, wanted, tenant=tenant, batch=True)
            return self._stores.get_batch(store, batch, tenant=tenant)

        return _json(batch_object(await anyio.to_thread.run_sync(add)))

    async def retrieve(self, request: Request) -> ASGIApp:
        """Answer with one batch. Raises NotFoundError."""
        store, batch, tenant = _of(request, "batch_id")
        found = await anyio.to_thread.run_sync(lambda: self._stores.get_batch(store, batch, tenant=tenant))
        return _json(batch_object(found))

    async def cancel(self, request: Request) -> ASGIApp:
        """Stop taking in the files of a batch that are not through. Raises NotFoundError."""
        store, batch, tenant = _of(request, "batch_id")
        found = await anyio.to_thread.run_sync(lambda: self._stores.cancel_batch(store, batch, tenant=tenant))
        return _json(batch_object(found))

    async def list_files(self, request: Request) -> ASGIApp:
        """Answer with a page of a batch's files. Raises NotFoundError."""
        return await list_files(request, self._stores, request.path_params["batch_id"])


async def list_files(request: Request, stores: VectorStores, batch: str = "") -> ASGIApp:
    """Answer with a page of files of a store, or of one of its batches. Raises NotFoundError."""
    query = query_of(request, StoreFilesQuery)
    found, more = await anyio.to_thread.run_sync(
        lambda: stores.list_files(
            request.path_params["vector_store_id"],
            tenant=tenant_of(request),
            batch=batch,
            status=query.filter,
            limit=query.limit,
            after=query.after,
            newest_first=query.order == "desc",
        )
    )
    first, last = ends(found)
    data = [store_file_object(each) for each in found]
    return _json(VectorStoreFileList(data=data, first_id=first, last_id=last, has_more=more))


def _of(request: Request, name: str = "file_id") -> tuple[str, str, str]:
    """Return the store, what of it is meant, and the tenant."""
    return request.path_params["vector_store_id"], request.path_params[name], tenant_of(request)


def _wanted(fields: AddedFileRequest) -> NewStoreFile:
    return NewStoreFile(fields.file_id, attributes_of(fields.attributes), chunking_of(fields.chunking_strategy))


def _batch_files(fields: FileBatchRequest) -> list[NewStoreFile]:
    """Return the files of a batch.

    Raises:
        InvalidRequestError: There are none, they are named in both ways, or one is named twice.
    """
    if bool(fields.file_ids) == bool(fields.files):
        what = "both" if fields.files else "neither"
        raise InvalidRequestError(
            f"A batch has `file_ids` or `files`; this one has {what}.", param="file_ids", code="invalid_value"
        )
    if fields.files:
        if fields.attributes is not None or fields.chunking_strategy is not None:
            raise InvalidRequestError(
                "`attributes` and `chunking_strategy` are of `file_ids`; `files` have their own.",
                param="attributes",
                code="invalid_value",
            )
        wanted = [_wanted(each) for each in fields.files]
    else:
        attributes, chunking = attributes_of(fields.attributes), chunking_of(fields.chunking_strategy)
        wanted = [NewStoreFile(each, attributes, chunking) for each in fields.file_ids or ()]
    if len({each.file for each in wanted}) < len(wanted):
        raise InvalidRequestError("The batch names a file twice.", param="file_ids", code="invalid_value")
    return wanted


def _json(value: msgspec.Struct) -> Response:
    return Response(msgspec.json.encode(value), media_type="application/json")
