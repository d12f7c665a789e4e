"""A conversation as a JSON document: what `export` writes, and what of a stranger's document is taken."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from appliance.core.errors import InvalidRequestError
from appliance.core.sessions import Conversation, Item
from appliance.sessions.rows import with_id

MOST_ITEMS = 100_000
"""Of one document."""


class _About(msgspec.Struct, frozen=True, kw_only=True):
    """What is said of a conversation; ids and times are those of the box that it comes from, and are not taken."""

    title: Annotated[str, Meta(max_length=512)] = ""
    metadata: Annotated[
        dict[Annotated[str, Meta(min_length=1, max_length=64)], Annotated[str, Meta(max_length=512)]],
        Meta(max_length=16),
    ] = {}


class _Document(msgspec.Struct, frozen=True, kw_only=True):
    object: Literal["conversation.export"]
    version: Literal[1]
    conversation: _About
    items: Annotated[list[dict[str, Any]], Meta(max_length=MOST_ITEMS)]


class Given(msgspec.Struct, frozen=True):
    """What a document says."""

    title: str
    metadata: Mapping[str, str]
    items: Sequence[Item]


def exported(conversation: Conversation, items: Sequence[Item]) -> Mapping[str, Any]:
    """Return a conversation as a document."""
    return {
        "object": "conversation.export",
        "version": 1,
        "conversation": {
            "id": conversation.id,
            "created_at": conversation.created,
            "updated_at": conversation.updated,
            "title": conversation.title,
            "metadata": dict(conversation.metadata),
            "forked_from": conversation.forked_from,
        },
        "items": [dict(each) for each in items],
    }


def checked(document: Mapping[str, Any]) -> Given:
    """Return what a document says.

    Raises:
        InvalidRequestError: It is not what `exported` returns.
    """
    try:
        given = msgspec.convert(dict(document), _Document)
    except msgspec.ValidationError as error:
        raise InvalidRequestError(
            f"This is no exported conversation: {error}.",
            advice="Send what the export of a conversation returned, as it is.",
            code="invalid_value",
        ) from error
    items = [with_id(each) for each in given.items]
    name, count = Counter(each["id"] for each in items).most_common(1)[0] if items else ("", 0)
    if count > 1:
        raise InvalidRequestError(
            f"This is no exported conversation: {count} of its items have the id {name!r}.", code="invalid_value"
        )
    return Given(given.conversation.title, given.conversation.metadata, items)
