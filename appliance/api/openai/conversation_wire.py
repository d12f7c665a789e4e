"""What conversations look like on the wire, and how they are made of what is stored."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from appliance.api.openai.items import AnyItem
from appliance.api.openai.paging import Id, PageQuery
from appliance.api.openai.vector_store_wire import Pairs
from appliance.core.sessions import Conversation, Found
from appliance.web.wire import Text, ignored, meaning

MOST_ITEMS = 1000
"""Of one request; an import may have more."""

Title = Annotated[Text, Meta(max_length=512)]
Items = Annotated[list[AnyItem], Meta(max_length=MOST_ITEMS)]


class NewConversationRequest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A conversation that is to begin."""

    items: Annotated[Items | None, meaning("What was said before")] = None
    metadata: Annotated[Pairs | None, meaning("Up to 16 pairs of texts, kept with the conversation")] = None
    title: Annotated[Title | None, meaning("Extension: its title")] = None


class ConversationChangeRequest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """New values for a conversation; what is left out stays as it is."""

    metadata: Annotated[Pairs | None, meaning("Replaces all pairs")] = None
    title: Annotated[Title | None, meaning("Extension: its title")] = None


class NewItemsRequest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Items that are to be appended; one whose id the conversation has already is not appended again."""

    items: Annotated[Items, meaning("The items, oldest first")]
    after: Annotated[
        Id | None,
        meaning("Extension: id of the newest item that you know of, empty for none; if there is a newer one, 409"),
    ] = None
    fork: Annotated[bool, meaning("Extension: instead of 409 go on in a fork from `after`")] = False


class ForkRequest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Where a fork leaves its conversation."""

    at: Annotated[Id | None, meaning("Id of the last item that both have; all unless given, none if empty")] = None


class ConversationSearchRequest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What is looked for in one's own conversations."""

    query: Annotated[Annotated[Text, Meta(min_length=1, max_length=4096)], meaning("Words, in any language")]
    limit: Annotated[Annotated[int, Meta(ge=1, le=100)], meaning("Most items")] = 20


class ImportRequest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What the export of a conversation returned."""

    object: Literal["conversation.export"]
    version: Literal[1]
    conversation: Annotated[dict[str, Any], meaning("Its title and metadata are taken; ids and times are made anew")]
    items: Annotated[list[AnyItem], Meta(max_length=100_000)]


class ItemsQuery(PageQuery, frozen=True, kw_only=True, forbid_unknown_fields=True, rename={"include": "include[]"}):
    """Which items of a conversation."""

    order: Annotated[Literal["asc", "desc"], meaning("By the time that they were appended")] = "desc"
    include: Annotated[str, ignored("items are shown whole")] = ""


class ItemQuery(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, rename={"include": "include[]"}):
    """How an item is shown."""

    include: Annotated[str, ignored("items are shown whole")] = ""


class ConversationsQuery(PageQuery, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Which conversations."""

    order: Annotated[Literal["asc", "desc"], meaning("By the time of the last change")] = "desc"


class ConversationObject(msgspec.Struct, frozen=True, kw_only=True):
    """A conversation; the fields behind `metadata` are extensions.

    Attributes:
        updated_at: When it was last appended to or changed.
        last_item_id: The newest item, for `after`.
        forked_from: The conversation whose past it has.
    """

    id: str
    object: Literal["conversation"] = "conversation"
    created_at: int
    metadata: dict[str, str]
    title: str
    updated_at: int
    last_item_id: str | None
    forked_from: str | None


class ConversationList(msgspec.Struct, frozen=True, kw_only=True):
    """A page of conversations."""

    object: Literal["list"] = "list"
    data: list[ConversationObject]
    first_id: str | None
    last_id: str | None
    has_more: bool


class ItemObject(msgspec.Struct, frozen=True, kw_only=True):
    """An item of a conversation, with the fields of its type."""

    id: str
    type: str


class ItemList(msgspec.Struct, frozen=True, kw_only=True):
    """Items of a conversation; `conversation_id` is an extension: it tells a fork.

    Attributes:
        data: Each as `ItemObject`, with the fields of its type.
    """

    object: Literal["list"] = "list"
    data: list[dict[str, Any]]
    first_id: str | None
    last_id: str | None
    has_more: bool
    conversation_id: str


class DeletedConversation(msgspec.Struct, frozen=True, kw_only=True):
    """A conversation that is no more."""

    id: str
    object: Literal["conversation.deleted"] = "conversation.deleted"
    deleted: bool = True


class FoundItem(msgspec.Struct, frozen=True, kw_only=True):
    """An item that was found, and the passage of it in which the words stand."""

    conversation_id: str
    item: dict[str, Any]
    text: str


class FoundItemList(msgspec.Struct, frozen=True, kw_only=True):
    """Items that were found, best first."""

    object: Literal["list"] = "list"
    data: list[FoundItem]


class ExportedConversation(msgspec.Struct, frozen=True, kw_only=True):
    """All of a conversation, for an import here or elsewhere."""

    object: Literal["conversation.export"]
    version: Literal[1]
    conversation: dict[str, Any]
    items: list[dict[str, Any]]


def conversation_object(conversation: Conversation) -> ConversationObject:
    """Return a conversation as it goes on the wire."""
    return ConversationObject(
        id=conversation.id,
        created_at=conversation.created,
        metadata=dict(conversation.metadata),
        title=conversation.title,
        updated_at=conversation.updated,
        last_item_id=conversation.last or None,
        forked_from=conversation.forked_from or None,
    )


def found_item(found: Found) -> FoundItem:
    """Return a finding as it goes on the wire."""
    return FoundItem(conversation_id=found.conversation, item=dict(found.item), text=found.text)
