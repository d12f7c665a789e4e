"""The routes of files, vector stores and search."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec

from appliance.api.openai.files import DeletedFile, FileList, FileObject, FileResource, FilesQuery, FileUpload
from appliance.api.openai.paging import PageQuery
from appliance.api.openai.vector_store_files import (
    AddedFileRequest,
    DeletedVectorStoreFile,
    FileAttributesRequest,
    FileBatchRequest,
    FileBatchResource,
    FileContentPage,
    VectorStoreFileResource,
)
from appliance.api.openai.vector_store_search import SearchPage, VectorStoreSearchRequest, VectorStoreSearchResource
from appliance.api.openai.vector_store_wire import (
    FileBatchObject,
    StoreFilesQuery,
    VectorStoreFileList,
    VectorStoreFileObject,
    VectorStoreList,
    VectorStoreObject,
)
from appliance.api.openai.vector_stores import (
    DeletedVectorStore,
    NewVectorStoreRequest,
    VectorStoreChangeRequest,
    VectorStoreResource,
    VerifiedVectorStore,
)
from appliance.core.retrieval import Files, VectorStores
from appliance.core.settings import Settings
from appliance.web.routes import Handler, Operation

STORES = "/v1/vector_stores"
STORE = f"{STORES}/{{vector_store_id}}"

_PARAMETERS = {
    "file_id": "Id of a file, `file-…`",
    "vector_store_id": "Id of a vector store, `vs_…`",
    "batch_id": "Id of a file batch, `vsfb_…`",
}

NO_SUCH = (404,)


def retrieval_operations(settings: Settings, files: Files, stores: VectorStores) -> Sequence[Operation]:
    """Return the routes of files, vector stores and search."""
    search = VectorStoreSearchResource(stores, settings)
    return (
        *_file_operations(FileResource(files)),
        *_store_operations(VectorStoreResource(stores, files)),
        _operation(
            "POST",
            f"{STORE}/search",
            "searchVectorStore",
            "Find passages that answer a query",
            search.create,
            request=VectorStoreSearchRequest,
            examples={
                "words": {"query": "How is the filter changed?"},
                "filtered": {
                    "query": ["filter change", "滤网更换"],
                    "filters": {"type": "eq", "key": "unit", "value": "compressor 3"},
                    "max_num_results": 5,
                    "explain": True,
                },
            },
            response=SearchPage,
            errors=(404, 429),
        ),
        *_store_file_operations(VectorStoreFileResource(stores)),
        *_batch_operations(FileBatchResource(stores)),
    )


def _file_operations(files: FileResource) -> Sequence[Operation]:
    path = "/v1/files"
    return (
        _operation("GET", path, "listFiles", "List uploaded files", files.list, query=FilesQuery, response=FileList),
        _operation(
            "POST",
            path,
            "createFile",
            "Upload a file, as a form",
            files.create,
            request=FileUpload,
            request_media_type="multipart/form-data",
            response=FileObject,
        ),
        _operation("GET", f"{path}/{{file_id}}", "retrieveFile", "Show one file", files.retrieve, response=FileObject),
        _operation(
            "DELETE",
            f"{path}/{{file_id}}",
            "deleteFile",
            "Erase a file, and what was made of it in every vector store",
            files.delete,
            response=DeletedFile,
        ),
        _operation(
            "GET",
            f"{path}/{{file_id}}/content",
            "downloadFile",
            "Read a file",
            files.content,
            media_type="application/octet-stream",
        ),
    )


def _store_operations(stores: VectorStoreResource) -> Sequence[Operation]:
    return (
        _operation(
            "GET",
            STORES,
            "listVectorStores",
            "List vector stores",
            stores.list,
            query=PageQuery,
            response=VectorStoreList,
        ),
        _operation(
            "POST",
            STORES,
            "createVectorStore",
            "Make a vector store",
            stores.create,
            request=NewVectorStoreRequest,
            request_optional=True,
            examples={
                "manuals": {
                    "name": "manuals",
                    "metadata": {"site": "north"},
                    "expires_after": {"anchor": "last_active_at", "days": 90},
                }
            },
            response=VectorStoreObject,
            errors=NO_SUCH,
        ),
        _operation("GET", STORE, "retrieveVectorStore", "Show one store", stores.retrieve, response=VectorStoreObject),
        _operation(
            "POST",
            STORE,
            "modifyVectorStore",
            "Change name, description, metadata or expiry of a store",
            stores.change,
            request=VectorStoreChangeRequest,
            examples={"name": {"name": "old manuals"}},
            response=VectorStoreObject,
        ),
        _operation(
            "DELETE",
            STORE,
            "deleteVectorStore",
            "Erase a vector store; its files stay",
            stores.delete,
            response=DeletedVectorStore,
        ),
        _operation(
            "POST",
            f"{STORE}/rebuild",
            "rebuildVectorStore",
            "Make a store's indexes anew",
            stores.rebuild,
            access="admin",
            response=VectorStoreObject,
        ),
        _operation(
            "POST",
            f"{STORE}/reembed",
            "reembedVectorStore",
            "Embed a store with the model that the settings name now; the old vectors answer until all are new",
            stores.reembed,
            response=VectorStoreObject,
        ),
        _operation(
            "GET",
            f"{STORE}/verify",
            "verifyVectorStore",
            "Check a store's indexes against what is stored",
            stores.verify,
            access="admin",
            response=VerifiedVectorStore,
        ),
    )


def _store_file_operations(files: VectorStoreFileResource) -> Sequence[Operation]:
    path, one = f"{STORE}/files", f"{STORE}/files/{{file_id}}"
    return (
        _operation(
            "GET",
            path,
            "listVectorStoreFiles",
            "List the files of a store",
            files.list,
            query=StoreFilesQuery,
            response=VectorStoreFileList,
        ),
        _operation(
            "POST",
            path,
            "createVectorStoreFile",
            "Take a file into a store",
            files.create,
            request=AddedFileRequest,
            examples={"file": {"file_id": "file-abc", "attributes": {"unit": "compressor 3", "year": 2024}}},
            response=VectorStoreFileObject,
        ),
        _operation(
            "GET",
            one,
            "retrieveVectorStoreFile",
            "Show how far a file is",
            files.retrieve,
            response=VectorStoreFileObject,
        ),
        _operation(
            "POST",
            one,
            "updateVectorStoreFileAttributes",
            "Replace a file's attributes",
            files.change,
            request=FileAttributesRequest,
            examples={"year": {"attributes": {"year": 2025}}},
            response=VectorStoreFileObject,
        ),
        _operation(
            "DELETE",
            one,
            "deleteVectorStoreFile",
            "Take a file out of a store; the upload stays",
            files.delete,
            response=DeletedVectorStoreFile,
        ),
        _operation(
            "GET",
            f"{one}/content",
            "retrieveVectorStoreFileContent",
            "Show the text that was taken from a file",
            files.content,
            response=FileContentPage,
        ),
    )


def _batch_operations(batches: FileBatchResource) -> Sequence[Operation]:
    path = f"{STORE}/file_batches"
    one = f"{path}/{{batch_id}}"
    return (
        _operation(
            "POST",
            path,
            "createVectorStoreFileBatch",
            "Take files into a store together",
            batches.create,
            request=FileBatchRequest,
            examples={"files": {"file_ids": ["file-abc", "file-def"], "chunking_strategy": {"type": "auto"}}},
            response=FileBatchObject,
        ),
        _operation(
            "GET",
            one,
            "retrieveVectorStoreFileBatch",
            "Show how far a batch is",
            batches.retrieve,
            response=FileBatchObject,
        ),
        _operation(
            "POST",
            f"{one}/cancel",
            "cancelVectorStoreFileBatch",
            "Stop taking in a batch",
            batches.cancel,
            response=FileBatchObject,
        ),
        _operation(
            "GET",
            f"{one}/files",
            "listFilesInVectorStoreBatch",
            "List the files of a batch",
            batches.list_files,
            query=StoreFilesQuery,
            response=VectorStoreFileList,
        ),
    )


def _operation(
    method: str,
    path: str,
    operation_id: str,
    summary: str,
    handler: Handler,
    *,
    request: type[msgspec.Struct] | None = None,
    query: type[msgspec.Struct] | None = None,
    access: str = "inference",
    errors: tuple[int, ...] = (),
    **fields: Any,
) -> Operation:
    """Return a route; what its path or its list names may not exist."""
    parameters = {name: words for name, words in _PARAMETERS.items() if f"{{{name}}}" in path}
    return Operation(
        method=method,
        path=path,
        operation_id=operation_id,
        summary=summary,
        handler=handler,
        access=access,
        parameters=parameters,
        query=query,
        request=() if request is None else (request,),
        errors=errors or (NO_SUCH if parameters or query else ()),
        **fields,
    )
