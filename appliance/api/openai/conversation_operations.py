"""The routes of conversations and their items."""

from __future__ import annotations

from collections.abc import Sequence

from appliance.api.openai.conversation_wire import (
    ConversationChangeRequest,
    ConversationList,
    ConversationObject,
    ConversationSearchRequest,
    ConversationsQuery,
    DeletedConversation,
    ExportedConversation,
    ForkRequest,
    FoundItemList,
    ImportRequest,
    ItemList,
    ItemObject,
    ItemQuery,
    ItemsQuery,
    NewConversationRequest,
    NewItemsRequest,
)
from appliance.api.openai.conversations import ConversationResource, ItemResource
from appliance.core.sessions import Conversations
from appliance.web.routes import Operation

CONVERSATIONS = "/v1/conversations"
CONVERSATION = f"{CONVERSATIONS}/{{conversation_id}}"
ITEMS = f"{CONVERSATION}/items"
ITEM = f"{ITEMS}/{{item_id}}"

_OF_CONVERSATION = {"conversation_id": "Id of a conversation, `conv_…`"}
_OF_ITEM = {**_OF_CONVERSATION, "item_id": "Id of an item"}

_MESSAGE = {"type": "message", "role": "user", "content": "Which filter does compressor 3 need?"}
_ANSWER = {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "滤网 XR-4500/b"}]}


def conversation_operations(conversations: Conversations) -> Sequence[Operation]:
    """Return the routes; fixed paths come before those with an id in their place."""
    resource = ConversationResource(conversations)
    return (
        *_collection(resource),
        *_one(resource),
        *_items(ItemResource(conversations)),
    )


def _collection(resource: ConversationResource) -> Sequence[Operation]:
    return (
        Operation(
            method="GET",
            path=CONVERSATIONS,
            operation_id="listConversations",
            summary="List one's own conversations",
            handler=resource.list,
            access="inference",
            query=ConversationsQuery,
            response=ConversationList,
            errors=(404,),
        ),
        Operation(
            method="POST",
            path=CONVERSATIONS,
            operation_id="createConversation",
            summary="Begin a conversation",
            handler=resource.create,
            access="inference",
            request=(NewConversationRequest,),
            request_optional=True,
            examples={"empty": {}, "with past": {"title": "Filters", "items": [_MESSAGE, _ANSWER]}},
            response=ConversationObject,
        ),
        Operation(
            method="POST",
            path=f"{CONVERSATIONS}/search",
            operation_id="searchConversations",
            summary="Find words in one's own conversations",
            handler=resource.search,
            access="inference",
            request=(ConversationSearchRequest,),
            examples={"words": {"query": "filter XR-4500"}, "best": {"query": "滤网更换", "limit": 1}},
            response=FoundItemList,
        ),
        Operation(
            method="POST",
            path=f"{CONVERSATIONS}/import",
            operation_id="importConversation",
            summary="Make a conversation of an exported one",
            handler=resource.import_,
            access="inference",
            request=(ImportRequest,),
            examples={
                "export": {
                    "object": "conversation.export",
                    "version": 1,
                    "conversation": {"title": "Filters", "metadata": {"site": "north"}},
                    "items": [{"id": "msg_1", **_MESSAGE}],
                }
            },
            response=ConversationObject,
        ),
    )


def _one(resource: ConversationResource) -> Sequence[Operation]:
    return (
        Operation(
            method="GET",
            path=CONVERSATION,
            operation_id="retrieveConversation",
            summary="Show one conversation",
            handler=resource.retrieve,
            access="inference",
            parameters=_OF_CONVERSATION,
            response=ConversationObject,
            errors=(404,),
        ),
        Operation(
            method="POST",
            path=CONVERSATION,
            operation_id="updateConversation",
            summary="Change metadata or title of a conversation",
            handler=resource.change,
            access="inference",
            parameters=_OF_CONVERSATION,
            request=(ConversationChangeRequest,),
            examples={"metadata": {"metadata": {"site": "north"}}, "title": {"title": "Filters"}},
            response=ConversationObject,
            errors=(404,),
        ),
        Operation(
            method="DELETE",
            path=CONVERSATION,
            operation_id="deleteConversation",
            summary="Erase a conversation and its responses; what forks hold of it stays theirs",
            handler=resource.delete,
            access="inference",
            parameters=_OF_CONVERSATION,
            response=DeletedConversation,
            errors=(404,),
        ),
        Operation(
            method="POST",
            path=f"{CONVERSATION}/fork",
            operation_id="forkConversation",
            summary="Begin a conversation with the past of another",
            handler=resource.fork,
            access="inference",
            parameters=_OF_CONVERSATION,
            request=(ForkRequest,),
            request_optional=True,
            examples={"all": {}, "from the start": {"at": ""}},
            response=ConversationObject,
            errors=(404,),
        ),
        Operation(
            method="GET",
            path=f"{CONVERSATION}/export",
            operation_id="exportConversation",
            summary="Show all of a conversation, for an import",
            handler=resource.export,
            access="inference",
            parameters=_OF_CONVERSATION,
            response=ExportedConversation,
            errors=(404,),
        ),
    )


def _items(resource: ItemResource) -> Sequence[Operation]:
    return (
        Operation(
            method="GET",
            path=ITEMS,
            operation_id="listConversationItems",
            summary="List the items of a conversation",
            handler=resource.list,
            access="inference",
            parameters=_OF_CONVERSATION,
            query=ItemsQuery,
            response=ItemList,
            errors=(404,),
        ),
        Operation(
            method="POST",
            path=ITEMS,
            operation_id="createConversationItems",
            summary="Append items to a conversation",
            handler=resource.create,
            access="inference",
            parameters=_OF_CONVERSATION,
            query=ItemQuery,
            request=(NewItemsRequest,),
            examples={
                "message": {"items": [_MESSAGE]},
                "or fork": {"items": [_MESSAGE], "after": "", "fork": True},
            },
            response=ItemList,
            errors=(404, 409),
        ),
        Operation(
            method="GET",
            path=ITEM,
            operation_id="retrieveConversationItem",
            summary="Show one item",
            handler=resource.retrieve,
            access="inference",
            parameters=_OF_ITEM,
            query=ItemQuery,
            response=ItemObject,
            errors=(404,),
        ),
        Operation(
            method="DELETE",
            path=ITEM,
            operation_id="deleteConversationItem",
            summary="Erase an item of a conversation; forks that hold it keep it",
            handler=resource.delete,
            access="inference",
            parameters=_OF_ITEM,
            response=ConversationObject,
            errors=(404,),
        ),
    )
