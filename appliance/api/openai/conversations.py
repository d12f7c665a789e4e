"""`/v1/conversations`: begun, continued, forked, searched, exported and erased; each API key sees its own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import anyio.to_thread
import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp

from appliance.api.openai.conversation_wire import (
    ConversationChangeRequest,
    ConversationList,
    ConversationSearchRequest,
    ConversationsQuery,
    DeletedConversation,
    ForkRequest,
    FoundItemList,
    ImportRequest,
    ItemList,
    ItemQuery,
    ItemsQuery,
    NewConversationRequest,
    NewItemsRequest,
    conversation_object,
    found_item,
)
from appliance.api.openai.files import tenant_of
from appliance.api.openai.items import stored_items, with_types
from appliance.api.openai.paging import ends, query_of
from appliance.core.sessions import Conversation, Conversations, Item
from appliance.web.body import read_json
from appliance.web.wire import convert

_REPEATABLE = frozenset({"include[]"})


class ConversationResource:
    """The resource."""

    def __init__(self, conversations: Conversations) -> None:
        self._conversations = conversations

    async def create(self, request: Request) -> ASGIApp:
        """Begin a conversation."""
        fields = await read_json(
            request, lambda document: convert(with_types(document, "items"), NewConversationRequest), empty=b"{}"
        )
        made = await self._conversations.create(
            tenant=tenant_of(request),
            items=stored_items(fields.items or ()),
            metadata=fields.metadata,
            title=fields.title or "",
        )
        return _conversation(made)

    async def list(self, request: Request) -> ASGIApp:
        """Answer with a page of conversations."""
        query = query_of(request, ConversationsQuery)
        found, more = self._conversations.list(
            tenant=tenant_of(request), limit=query.limit, after=query.after, newest_first=query.order == "desc"
        )
        first, last = ends(found)
        data = [conversation_object(each) for each in found]
        return _json(ConversationList(data=data, first_id=first, last_id=last, has_more=more))

    async def retrieve(self, request: Request) -> ASGIApp:
        """Answer with one conversation. Raises NotFoundError."""
        return _conversation(self._conversations.get(_name(request), tenant=tenant_of(request)))

    async def change(self, request: Request) -> ASGIApp:
        """Change metadata or title. Raises NotFoundError."""
        fields = await read_json(request, lambda document: convert(document, ConversationChangeRequest))
        changed = await self._conversations.change(
            _name(request), tenant=tenant_of(request), metadata=fields.metadata, title=fields.title
        )
        return _conversation(changed)

    async def delete(self, request: Request) -> ASGIApp:
        """Erase a conversation. Raises NotFoundError."""
        await self._conversations.delete(_name(request), tenant=tenant_of(request))
        return _json(DeletedConversation(id=_name(request)))

    async def fork(self, request: Request) -> ASGIApp:
        """Begin a conversation with the past of this one. Raises NotFoundError."""
        fields = await read_json(request, lambda document: convert(document, ForkRequest), empty=b"{}")
        return _conversation(await self._conversations.fork(_name(request), tenant=tenant_of(request), at=fields.at))

    async def search(self, request: Request) -> ASGIApp:
        """Answer with items of the key's own conversations in which words stand."""
        fields = await read_json(request, lambda document: convert(document, ConversationSearchRequest))
        tenant = tenant_of(request)
        found = await anyio.to_thread.run_sync(
            lambda: self._conversations.search(fields.query, tenant=tenant, limit=fields.limit)
        )
        return _json(FoundItemList(data=[found_item(each) for each in found]))

    async def export(self, request: Request) -> ASGIApp:
        """Answer with all of a conversation. Raises NotFoundError."""
        name, tenant = _name(request), tenant_of(request)
        body = await anyio.to_thread.run_sync(
            lambda: msgspec.json.encode(self._conversations.export(name, tenant=tenant))
        )
        return Response(body, media_type="application/json")

    async def import_(self, request: Request) -> ASGIApp:
        """Make a conversation of what an export returned."""
        fields = await read_json(request, lambda document: convert(with_types(document, "items"), ImportRequest))
        document = {
            "object": fields.object,
            "version": fields.version,
            "conversation": fields.conversation,
            "items": stored_items(fields.items),
        }
        return _conversation(await self._conversations.import_(document, tenant=tenant_of(request)))


class ItemResource:
    """The items of a conversation."""

    def __init__(self, conversations: Conversations) -> None:
        self._conversations = conversations

    async def create(self, request: Request) -> ASGIApp:
        """Append items, and answer with them.

        Raises:
            NotFoundError: There is no such conversation.
            ConflictError: Another item was appended behind `after`.
        """
        query_of(request, ItemQuery, repeatable=_REPEATABLE)
        fields = await read_json(request, lambda document: convert(with_types(document, "items"), NewItemsRequest))
        conversation, kept = await self._conversations.append(
            _name(request),
            stored_items(fields.items),
            tenant=tenant_of(request),
            after=fields.after,
            fork=fields.fork,
        )
        return _json(_item_list(conversation.id, kept, more=False))

    async def list(self, request: Request) -> ASGIApp:
        """Answer with a page of items. Raises NotFoundError."""
        query = query_of(request, ItemsQuery, repeatable=_REPEATABLE)
        found, more = self._conversations.items(
            _name(request),
            tenant=tenant_of(request),
            limit=query.limit,
            after=query.after,
            newest_first=query.order == "desc",
        )
        return _json(_item_list(_name(request), found, more=more))

    async def retrieve(self, request: Request) -> ASGIApp:
        """Answer with one item. Raises NotFoundError."""
        query_of(request, ItemQuery, repeatable=_REPEATABLE)
        item = self._conversations.item(_name(request), request.path_params["item_id"], tenant=tenant_of(request))
        return Response(msgspec.json.encode(item), media_type="application/json")

    async def delete(self, request: Request) -> ASGIApp:
        """Erase an item, and answer with the conversation, as OpenAI does. Raises NotFoundError."""
        item = request.path_params["item_id"]
        return _conversation(await self._conversations.remove_item(_name(request), item, tenant=tenant_of(request)))


def _item_list(conversation: str, items: Sequence[Item], *, more: bool) -> ItemList:
    data: list[dict[str, Any]] = [dict(each) for each in items]
    first, last = (data[0]["id"], data[-1]["id"]) if data else (None, None)
    return ItemList(data=data, first_id=first, last_id=last, has_more=more, conversation_id=conversation)


def _name(request: Request) -> str:
    name: str = request.path_params["conversation_id"]
    return name


def _conversation(conversation: Conversation) -> Response:
    return _json(conversation_object(conversation))


def _json(value: msgspec.Struct) -> Response:
    return Response(msgspec.json.encode(value), media_type="application/json")
