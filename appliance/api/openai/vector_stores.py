"""`/v1/vector_stores`: sets of files that can be searched are made, listed, changed and erased."""

from __future__ import annotations

from typing import Annotated, Literal

import anyio.to_thread
import msgspec
from msgspec import UNSET, UnsetType
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp

from appliance.api.openai.files import tenant_of
from appliance.api.openai.paging import PageQuery, ends, query_of
from appliance.api.openai.vector_store_wire import (
    ChunkingStrategy,
    Description,
    FileIds,
    LastActive,
    Name,
    Pairs,
    VectorStoreList,
    chunking_of,
    vector_store_object,
)
from appliance.core.errors import ApplianceError
from appliance.core.retrieval import Files, NewStoreFile, StoreChange, VectorStore, VectorStores
from appliance.web.body import read_json
from appliance.web.wire import convert, meaning

AGE = "Erase the store so many days after its last use; null is never"


class NewVectorStoreRequest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A vector store that is to be made."""

    name: Annotated[Name | None, meaning("Its name; need not be unique")] = None
    description: Annotated[Description | None, meaning("What it is for")] = None
    file_ids: Annotated[FileIds | None, meaning("Files to take in at once")] = None
    chunking_strategy: Annotated[ChunkingStrategy | None, meaning("How those files are cut; `auto` unless given")] = (
        None
    )
    expires_after: Annotated[LastActive | None, meaning(AGE)] = None
    metadata: Annotated[Pairs | None, meaning("Up to 16 pairs of texts, kept with the store")] = None


class VectorStoreChangeRequest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """New values for a vector store; what is left out stays as it is."""

    name: Annotated[Name | None, meaning("Its name")] = None
    description: Annotated[Description | None, meaning("What it is for")] = None
    expires_after: Annotated[LastActive | UnsetType | None, meaning(AGE)] = UNSET
    metadata: Annotated[Pairs | None, meaning("Replaces all pairs")] = None


class DeletedVectorStore(msgspec.Struct, frozen=True, kw_only=True):
    """A vector store that is no more."""

    id: str
    object: Literal["vector_store.deleted"] = "vector_store.deleted"
    deleted: bool = True


class VerifiedVectorStore(msgspec.Struct, frozen=True, kw_only=True):
    """What was found wrong with a store's indexes, one sentence each."""

    id: str
    object: Literal["vector_store.verification"] = "vector_store.verification"
    valid: bool
    problems: list[str]


class VectorStoreResource:
    """The resource."""

    def __init__(self, stores: VectorStores, files: Files) -> None:
        self._stores = stores
        self._files = files

    async def create(self, request: Request) -> ASGIApp:
        """Make a store, and take files in if any are named; one that is not there is found before anything is made.

        Raises:
            NotFoundError: There is no such file.
        """
        fields = await read_json(request, lambda document: convert(document, NewVectorStoreRequest), empty=b"{}")
        chunking = chunking_of(fields.chunking_strategy)
        tenant = tenant_of(request)

        def create() -> VectorStore:
            for each in fields.file_ids or ():
                self._files.get(each, tenant=tenant)
            return self._stores.create(
                tenant=tenant,
                name=fields.name or "",
                description=fields.description or "",
                metadata=fields.metadata,
                expires_after_days=None if fields.expires_after is None else fields.expires_after.days,
            )

        store = await anyio.to_thread.run_sync(create)
        if fields.file_ids:
            wanted = [NewStoreFile(each, chunking=chunking) for each in dict.fromkeys(fields.file_ids)]
            store = await self._fill(store, wanted, tenant)
        return _json(vector_store_object(store))

    async def _fill(self, store: VectorStore, wanted: list[NewStoreFile], tenant: str) -> VectorStore:
        def add() -> VectorStore:
            self._stores.add(store.id, wanted, tenant=tenant, batch=False)
            return self._stores.get(store.id, tenant=tenant)

        try:
            return await anyio.to_thread.run_sync(add)
        except ApplianceError:  # a file was deleted meanwhile, or the disk is full: nothing was made
            await self._stores.delete(store.id, tenant=tenant)
            raise

    async def list(self, request: Request) -> ASGIApp:
        """Answer with a page of stores."""
        query = query_of(request, PageQuery)
        found, more = await anyio.to_thread.run_sync(
            lambda: self._stores.list(
                tenant=tenant_of(request),
                limit=query.limit,
                after=query.after,
                newest_first=query.order == "desc",
            )
        )
        first, last = ends(found)
        data = [vector_store_object(each) for each in found]
        return _json(VectorStoreList(data=data, first_id=first, last_id=last, has_more=more))

    async def retrieve(self, request: Request) -> ASGIApp:
        """Answer with one store. Raises NotFoundError."""
        name, tenant = request.path_params["vector_store_id"], tenant_of(request)
        store = await anyio.to_thread.run_sync(lambda: self._stores.get(name, tenant=tenant))
        return _json(vector_store_object(store))

    async def change(self, request: Request) -> ASGIApp:
        """Change what is said of a store. Raises NotFoundError."""
        fields = await read_json(request, lambda document: convert(document, VectorStoreChangeRequest))
        name, tenant = request.path_params["vector_store_id"], tenant_of(request)
        days = None if isinstance(fields.expires_after, UnsetType) else _days(fields.expires_after)
        change = StoreChange(
            name=fields.name, description=fields.description, metadata=fields.metadata, expires_after_days=days
        )
        store = await anyio.to_thread.run_sync(lambda: self._stores.change(name, change, tenant=tenant))
        return _json(vector_store_object(store))

    async def delete(self, request: Request) -> ASGIApp:
        """Erase a store. Raises NotFoundError."""
        name = request.path_params["vector_store_id"]
        await self._stores.delete(name, tenant=tenant_of(request))
        return _json(DeletedVectorStore(id=name))

    async def rebuild(self, request: Request) -> ASGIApp:
        """Make a store's indexes anew, whoever's it is, and answer with the store. Raises NotFoundError."""
        name = request.path_params["vector_store_id"]
        return _json(vector_store_object(await self._stores.rebuild(name, tenant=None)))

    async def reembed(self, request: Request) -> ASGIApp:
        """Have a store embedded with the model that the settings name now, and answer with the store.

        Raises:
            NotFoundError: There is no such store or model.
        """
        name = request.path_params["vector_store_id"]
        return _json(vector_store_object(await self._stores.reembed(name, tenant=tenant_of(request))))

    async def verify(self, request: Request) -> ASGIApp:
        """Answer with what is wrong with a store's indexes, whoever's it is. Raises NotFoundError."""
        name = request.path_params["vector_store_id"]
        problems = await self._stores.verify(name, tenant=None)
        return _json(VerifiedVectorStore(id=name, valid=not problems, problems=list(problems)))


def _days(age: LastActive | None) -> int:
    return 0 if age is None else age.days


def _json(value: msgspec.Struct) -> Response:
    return Response(msgspec.json.encode(value), media_type="application/json")
