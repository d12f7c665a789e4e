"""`/v1/responses`: created whole, as a stream or in the background, fetched, taken up again, cancelled and erased."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

import msgspec
from msgspec import Meta
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp

from appliance.api.openai.files import tenant_of
from appliance.api.openai.paging import PageQuery, query_of
from appliance.api.openai.responses_stream import EventStream
from appliance.api.openai.responses_turn import read_request, turn_of
from appliance.api.openai.responses_wire import DeletedResponse, ResponseItemList
from appliance.core.agents import Agents, Answer
from appliance.core.errors import InvalidRequestError, NotFoundError
from appliance.core.sessions import Item
from appliance.core.settings import Settings
from appliance.web.body import read_json
from appliance.web.disconnect import ClientGoneError, until_disconnected
from appliance.web.wire import Text, ignored, meaning


class RetrieveQuery(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How to fetch a response."""

    stream: Annotated[bool, meaning("Send its events, and go on with them while it runs")] = False
    starting_after: Annotated[
        Annotated[int, Meta(ge=0, le=2**31 - 1)] | None, meaning("Only events behind this number; with `stream`")
    ] = None
    include_obfuscation: Annotated[bool, ignored("events are never padded")] = False
    include: Annotated[Text, ignored("a response shows what it was created with")] = msgspec.field(
        default="", name="include[]"
    )


class ItemsQuery(PageQuery, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Which input items."""

    include: Annotated[Text, ignored("items show what they were created with")] = msgspec.field(
        default="", name="include[]"
    )


class ResponseResource:
    """The resource."""

    def __init__(self, agents: Agents, settings: Settings) -> None:
        self._agents = agents
        self._settings = settings

    async def create(self, request: Request) -> ASGIApp:
        """Begin a response, and answer with it whole, as a stream, or as far as it is if it goes on by itself.

        Raises:
            ApplianceError: The request will not do, or as `Agents.create`.
            ClientGoneError: The client left; the response was cancelled.
        """
        types = self._agents.tool_types
        fields = await read_json(request, lambda document: read_request(document, self._settings, types))
        request.scope["state"]["model"] = fields.model
        turn = turn_of(request, fields, self._settings)
        try:
            answer = await until_disconnected(request.receive, self._agents.create(turn), limit_s=turn.deadline_s)
        except InvalidRequestError as error:
            if error.param == "prompt":  # as the engine calls it
                error.param = "input"
            raise
        if turn.stream:
            return self._stream(answer, after=-1, owned=not turn.background)
        if turn.background:
            return _json(answer.body)
        return _json(await _whole(request, answer))

    async def retrieve(self, request: Request) -> ASGIApp:
        """Answer with a response as it is, or with its events.

        Raises:
            NotFoundError: There is none.
            InvalidRequestError: Its events were not kept.
        """
        query = query_of(request, RetrieveQuery)
        answer = self._agents.find(_name(request), tenant=tenant_of(request))
        if not query.stream:
            if query.starting_after is not None:
                raise InvalidRequestError(
                    "starting_after needs `stream` to be true.", param="starting_after", code="invalid_value"
                )
            return _json(answer.body)
        if not answer.streamed:
            raise InvalidRequestError(
                f"{_name(request)} was not created as a stream, so it has no events.",
                advice="Fetch it without `stream`, or create it with `stream`.",
                param="stream",
                code="invalid_value",
            )
        after = -1 if query.starting_after is None else query.starting_after
        return self._stream(answer, after=after, owned=False)

    async def cancel(self, request: Request) -> ASGIApp:
        """End a background response, and answer with it."""
        return _json(await self._agents.cancel(_name(request), tenant=tenant_of(request)))

    async def delete(self, request: Request) -> ASGIApp:
        """Erase a response. Raises NotFoundError."""
        name = _name(request)
        await self._agents.delete(name, tenant=tenant_of(request))
        return Response(msgspec.json.encode(DeletedResponse(id=name)), media_type="application/json")

    async def input_items(self, request: Request) -> ASGIApp:
        """Answer with a page of the items that a response answers. Raises NotFoundError."""
        query = query_of(request, ItemsQuery)
        items = list(self._agents.input_items(_name(request), tenant=tenant_of(request)))
        page = _page(items if query.order == "asc" else items[::-1], query)
        return Response(msgspec.json.encode(page), media_type="application/json")

    def _stream(self, answer: Answer, *, after: int, owned: bool) -> EventStream:
        return EventStream(answer, after=after, owned=owned, keep_alive_s=self._settings.stream_keep_alive_s)


async def _whole(request: Request, answer: Answer) -> Mapping[str, Any]:
    """Wait for a response; the client's leaving cancels it."""
    try:
        return await until_disconnected(request.receive, answer.whole())
    except ClientGoneError:
        answer.cancel()
        raise


def _page(items: list[Item], query: ItemsQuery) -> ResponseItemList:
    begin = 0
    if query.after:
        ids = [each["id"] for each in items]
        if query.after not in ids:
            raise NotFoundError(f"There is no item {query.after!r} among the input items.", param="after")
        begin = ids.index(query.after) + 1
    page = items[begin : begin + query.limit]
    return ResponseItemList(
        data=[dict(each) for each in page],
        first_id=page[0]["id"] if page else None,
        last_id=page[-1]["id"] if page else None,
        has_more=begin + query.limit < len(items),
    )


def _name(request: Request) -> str:
    name: str = request.path_params["response_id"]
    return name


def _json(body: Mapping[str, Any]) -> Response:
    return Response(msgspec.json.encode(body), media_type="application/json")
