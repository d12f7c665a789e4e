"""`/v1/files`: files are received, listed, read and erased."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal
from urllib.parse import quote

import anyio.to_thread
import msgspec
from msgspec import UNSET, Meta, UnsetType
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.types import ASGIApp

from appliance.api.multipart import UploadForm
from appliance.api.openai.paging import PageQuery, ends, query_of
from appliance.core.errors import InvalidRequestError
from appliance.core.retrieval import Files, StoredFile, UploadTerms
from appliance.web.wire import convert_query, meaning

Purpose = Literal["assistants", "batch", "fine-tune", "vision", "user_data", "evals"]
Age = Annotated[int, Meta(ge=3600, le=30 * 86_400)]


class FilesQuery(PageQuery, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Which files."""

    limit: Annotated[Annotated[int, Meta(ge=1, le=10_000)], meaning("Most files of the page")] = 10_000
    purpose: Annotated[Purpose | Literal["batch_output", ""], meaning("Only files for it")] = ""


class UploadFields(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The fields of a form beside the file."""

    purpose: Purpose
    anchor: Literal["created_at", ""] = msgspec.field(default="", name="expires_after[anchor]")
    seconds: Age | None = msgspec.field(default=None, name="expires_after[seconds]")


class FileUpload(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A form that brings a file."""

    file: Annotated[str, Meta(extra_json_schema={"format": "binary"}), meaning("The file")]
    purpose: Annotated[Purpose, meaning("What it is for; files for vector stores are `assistants` or `user_data`")]
    anchor: Annotated[Literal["created_at"], meaning("Since when it ages")] | UnsetType = msgspec.field(
        default=UNSET, name="expires_after[anchor]"
    )
    seconds: Annotated[Age, meaning("Seconds until it is erased")] | UnsetType = msgspec.field(
        default=UNSET, name="expires_after[seconds]"
    )

    schema_conditions: ClassVar[tuple[dict[str, Any], ...]] = (
        {
            "dependentRequired": {
                "expires_after[anchor]": ["expires_after[seconds]"],
                "expires_after[seconds]": ["expires_after[anchor]"],
            }
        },
    )


class FileObject(msgspec.Struct, frozen=True, kw_only=True):
    """An uploaded file; `media_type` is an extension.

    Attributes:
        status: Deprecated by OpenAI; a file is there whole or not at all.
        media_type: What its bytes were found to be, whatever its name says.
    """

    id: str
    object: Literal["file"] = "file"
    bytes: int
    created_at: int
    expires_at: int | None
    filename: str
    purpose: str
    status: Literal["processed"] = "processed"
    status_details: None = None
    media_type: str


class FileList(msgspec.Struct, frozen=True, kw_only=True):
    """A page of files."""

    object: Literal["list"] = "list"
    data: list[FileObject]
    first_id: str | None
    last_id: str | None
    has_more: bool


class DeletedFile(msgspec.Struct, frozen=True, kw_only=True):
    """A file that is no more."""

    id: str
    object: Literal["file"] = "file"
    deleted: bool = True


class FileResource:
    """The resource."""

    def __init__(self, files: Files) -> None:
        self._files = files

    async def create(self, request: Request) -> ASGIApp:
        """Receive a file; nothing is left of one that does not come whole.

        Raises:
            ApplianceError: The form will not do, or as `Files.create`.
            ClientGoneError: The client left before the form was whole.
        """
        form = UploadForm(request)
        name = await form.begin()
        stored = await self._files.create(
            name, "", form.content(), tenant=tenant_of(request), terms=lambda: _terms(form.fields)
        )
        return _json(file_object(stored))

    async def list(self, request: Request) -> ASGIApp:
        """Answer with a page of files."""
        query = query_of(request, FilesQuery)
        found, more = await anyio.to_thread.run_sync(
            lambda: self._files.list(
                tenant=tenant_of(request),
                purpose=query.purpose,
                limit=query.limit,
                after=query.after,
                newest_first=query.order == "desc",
            )
        )
        first, last = ends(found)
        page = FileList(data=[file_object(each) for each in found], first_id=first, last_id=last, has_more=more)
        return _json(page)

    async def retrieve(self, request: Request) -> ASGIApp:
        """Answer with one file. Raises NotFoundError."""
        return _json(file_object(await self._get(request)))

    async def content(self, request: Request) -> ASGIApp:
        """Answer with a file's bytes, which no browser shows as a page of this server. Raises NotFoundError."""
        stored = await self._get(request)
        headers = {
            "content-length": str(stored.size),
            "content-disposition": f"attachment; filename*=UTF-8''{quote(stored.filename, safe='')}",
            "content-security-policy": "sandbox",
        }
        content = self._files.content(stored.id, tenant=tenant_of(request))
        return StreamingResponse(content, headers=headers, media_type="application/octet-stream")

    async def delete(self, request: Request) -> ASGIApp:
        """Erase a file, and what was made of it in every vector store. Raises NotFoundError."""
        name = request.path_params["file_id"]
        await self._files.delete(name, tenant=tenant_of(request))
        return _json(DeletedFile(id=name))

    async def _get(self, request: Request) -> StoredFile:
        name = request.path_params["file_id"]
        return await anyio.to_thread.run_sync(lambda: self._files.get(name, tenant=tenant_of(request)))


def tenant_of(request: Request) -> str:
    """Return whose request it is."""
    tenant: str = request.scope["state"].get("tenant", "")
    return tenant


def file_object(stored: StoredFile) -> FileObject:
    """Return a file as it goes on the wire."""
    return FileObject(
        id=stored.id,
        bytes=stored.size,
        created_at=stored.created,
        expires_at=stored.expires,
        filename=stored.filename,
        purpose=stored.purpose,
        media_type=stored.media_type,
    )


def _terms(fields: dict[str, str]) -> UploadTerms:
    """Check the fields of a form that has come whole."""
    given = convert_query(fields, UploadFields)
    if (given.seconds is None) != (given.anchor == ""):
        raise InvalidRequestError(
            "`expires_after` needs both `anchor` and `seconds`.", param="expires_after", code="invalid_value"
        )
    return UploadTerms(given.purpose, given.seconds)


def _json(value: msgspec.Struct) -> Response:
    return Response(msgspec.json.encode(value), media_type="application/json")
