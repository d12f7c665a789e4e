"""Rows of `sessions.db` as the doors know them, and back."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from appliance.core.errors import InvalidRequestError
from appliance.core.sessions import Conversation, Item, StoredResponse
from appliance.store.database import Connection, Row
from appliance.store.rows import new_id

_PREFIXES = {
    "message": "msg_",
    "function_call": "fc_",
    "function_call_output": "fco_",
    "reasoning": "rs_",
    "file_search_call": "fs_",
    "mcp_call": "mcp_",
    "mcp_list_tools": "mcpl_",
    "mcp_approval_request": "mcpr_",
    "mcp_approval_response": "mcpa_",
}

_ID = re.compile("[A-Za-z0-9_-]{1,64}")


def encoded(value: Any) -> str:
    """Return a value as JSON."""
    return msgspec.json.encode(value).decode()


def with_id(item: Item) -> Item:
    """Return an item with an id: its own, or a new one of its type.

    Raises:
        InvalidRequestError: It has no type, or its id is none.
    """
    kind, name = item.get("type"), item.get("id")
    if not isinstance(kind, str):
        raise InvalidRequestError("An item has no `type`.", param="items", code="invalid_value")
    if name is None:
        return {"id": new_id(_PREFIXES.get(kind, "item_")), **{key: item[key] for key in item if key != "id"}}
    if not isinstance(name, str) or not _ID.fullmatch(name):
        raise InvalidRequestError(
            f"{str(name)[:100]!r} is no id of an item; ids have 1 to 64 letters, digits, `_` and `-`.",
            advice="Leave the id out, and the item is given one.",
            param="items",
            code="invalid_value",
        )
    return item


def to_conversation(row: Row) -> Conversation:
    """Return a row of `conversations`."""
    return Conversation(
        id=row["id"],
        created=row["created"],
        updated=row["updated"],
        metadata=msgspec.json.decode(row["metadata"], type=dict[str, str]),
        title=row["title"],
        last=row["last"],
        forked_from=row["forked_from"],
    )


def conversation_page(
    connection: Connection, tenant: str, after: Row | None, *, limit: int, newest_first: bool
) -> tuple[Sequence[Conversation], bool]:
    """Return conversations in the order of their last change, those behind a row, and whether there are more."""
    order, sign = ("DESC", "<") if newest_first else ("ASC", ">")
    behind = f"AND (updated, key) {sign} (:updated, :key)" if after is not None else ""
    sql = f"""
        SELECT * FROM conversations WHERE tenant = :tenant {behind} ORDER BY updated {order}, key {order} LIMIT :limit
    """  # noqa: S608
    values = {"tenant": tenant, "limit": limit + 1}
    if after is not None:
        values |= {"updated": after["updated"], "key": after["key"]}
    rows = connection.execute(sql, values).fetchall()
    return [to_conversation(each) for each in rows[:limit]], len(rows) > limit


def to_response(row: Row) -> StoredResponse:
    """Return a row of `responses`."""
    return StoredResponse(
        id=row["id"],
        created=row["created"],
        status=row["status"],
        request=decoded_object(row["request"]),
        body=decoded_object(row["body"]),
        input=decoded_items(row["input"]),
        previous=row["previous"],
        conversation=row["conversation"],
        background=bool(row["background"]),
        tenant=row["tenant"],
    )


def decoded_object(text: str) -> Mapping[str, Any]:
    """Return a JSON object."""
    return msgspec.json.decode(text, type=dict[str, Any])


def decoded_items(text: str) -> Sequence[Item]:
    """Return a JSON list of items."""
    return msgspec.json.decode(text, type=list[dict[str, Any]])
