"""Items of conversations and responses as OpenAI defines them, those that a box which reads text can keep.

Images, files and the calls of tools that are not here are refused by name. What is kept is what is shown: fields that
the client left out are not there, but for those that OpenAI always sends.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

import msgspec
from msgspec import UNSET, Meta, UnsetType

from appliance.core.errors import InvalidRequestError
from appliance.web.wire import Text

MOST_DEPTH = 64
"""Levels of JSON in an item: tools' schemas need some."""

ItemId = Annotated[str, Meta(pattern="^[A-Za-z0-9_-]{1,64}$")]
Name = Annotated[Text, Meta(min_length=1, max_length=256)]
Status = Literal["in_progress", "completed", "incomplete"]
CallStatus = Literal["in_progress", "searching", "calling", "completed", "incomplete", "failed"]


class _Part(msgspec.Struct, frozen=True, kw_only=True, tag_field="type", forbid_unknown_fields=True):
    """A part of an item's content."""


class InputText(_Part, frozen=True, kw_only=True, tag="input_text"):
    """What a person or program wrote."""

    text: Text


class OutputText(_Part, frozen=True, kw_only=True, tag="output_text"):
    """What a model wrote."""

    text: Text
    annotations: list[dict[str, Any]] = []
    logprobs: list[dict[str, Any]] = []


class Refusal(_Part, frozen=True, kw_only=True, tag="refusal"):
    """What a model wrote instead of an answer."""

    refusal: Text


class SummaryText(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a model thought, in short."""

    type: Literal["summary_text"]
    text: Text


class ReasoningText(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a model thought."""

    type: Literal["reasoning_text"]
    text: Text


class FunctionText(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a function returned."""

    type: Literal["input_text"]
    text: Text


MessagePart = InputText | OutputText | Refusal


class _Item(msgspec.Struct, frozen=True, kw_only=True, tag_field="type", forbid_unknown_fields=True):
    """An item; one without an id is given one."""

    id: ItemId | UnsetType | None = UNSET


class MessageItem(_Item, frozen=True, kw_only=True, tag="message"):
    """A message; its content may be one text."""

    role: Literal["user", "assistant", "system", "developer"]
    content: Text | list[MessagePart]
    status: Status | None = "completed"
    phase: Literal["commentary", "final_answer"] | UnsetType | None = UNSET


class FunctionCallItem(_Item, frozen=True, kw_only=True, tag="function_call"):
    """A model's call of a function of the client's."""

    call_id: Name
    name: Name
    arguments: Text
    status: Status | None = "completed"


class FunctionCallOutputItem(_Item, frozen=True, kw_only=True, tag="function_call_output"):
    """What the function returned."""

    call_id: Name
    output: Text | list[FunctionText]
    status: Status | None = "completed"


class ReasoningItem(_Item, frozen=True, kw_only=True, tag="reasoning"):
    """What a model thought."""

    summary: list[SummaryText] = []
    content: list[ReasoningText] | UnsetType | None = UNSET
    encrypted_content: Text | UnsetType | None = UNSET
    status: Status | UnsetType | None = UNSET


class FileSearchResult(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A passage that was found."""

    file_id: Text | UnsetType | None = UNSET
    filename: Text | UnsetType | None = UNSET
    score: float | UnsetType | None = UNSET
    text: Text | UnsetType | None = UNSET
    attributes: dict[str, Text | bool | int | float] | UnsetType | None = UNSET
    vector_store_id: Text | UnsetType | None = UNSET


class Citation(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The number of a passage that the model was shown, and where it is from."""

    number: Annotated[int, Meta(ge=1, lt=10**6)]
    file_id: Text
    filename: Text


class SearchCall(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What the model asked for and was shown of it."""

    name: Name
    arguments: Text
    output: Text
    citations: list[Citation] = []


class FileSearchCallItem(_Item, frozen=True, kw_only=True, tag="file_search_call"):
    """A search over vector stores; `call`, an extension, has what the model asked and was shown."""

    queries: list[Text]
    status: CallStatus | None = "completed"
    results: list[FileSearchResult] | UnsetType | None = UNSET
    call: SearchCall | UnsetType | None = UNSET


class McpCallItem(_Item, frozen=True, kw_only=True, tag="mcp_call"):
    """A call of an MCP server's tool, with what it returned."""

    server_label: Name
    name: Name
    arguments: Text
    output: Text | UnsetType | None = UNSET
    error: Text | dict[str, Any] | UnsetType | None = UNSET
    status: CallStatus | UnsetType | None = UNSET
    approval_request_id: Text | UnsetType | None = UNSET


class McpTool(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A tool of an MCP server."""

    name: Name
    input_schema: dict[str, Any]
    description: Text | UnsetType | None = UNSET
    annotations: dict[str, Any] | UnsetType | None = UNSET


class McpListToolsItem(_Item, frozen=True, kw_only=True, tag="mcp_list_tools"):
    """The tools of an MCP server."""

    server_label: Name
    tools: list[McpTool]
    error: Text | UnsetType | None = UNSET


class McpApprovalRequestItem(_Item, frozen=True, kw_only=True, tag="mcp_approval_request"):
    """A call that a person must agree to."""

    server_label: Name
    name: Name
    arguments: Text


class McpApprovalResponseItem(_Item, frozen=True, kw_only=True, tag="mcp_approval_response"):
    """What the person said."""

    approval_request_id: Name
    approve: bool
    reason: Text | UnsetType | None = UNSET


AnyItem = (
    MessageItem
    | FunctionCallItem
    | FunctionCallOutputItem
    | ReasoningItem
    | FileSearchCallItem
    | McpCallItem
    | McpListToolsItem
    | McpApprovalRequestItem
    | McpApprovalResponseItem
)


def with_types(document: Any, field: str) -> Any:
    """Return a request body in which messages without a type have one: OpenAI lets clients leave it out.

    Raises:
        InvalidRequestError: The items are nested too deeply.
    """
    items = document.get(field) if isinstance(document, dict) else None
    if not isinstance(items, list):
        return document
    if _is_deep(items):
        raise InvalidRequestError(
            f"The items are nested over {MOST_DEPTH} levels deep.", param=field, code="invalid_value"
        )
    return {**document, field: [_with_type(each) for each in items]}


def _with_type(item: Any) -> Any:
    return {**item, "type": "message"} if isinstance(item, dict) and "role" in item and "type" not in item else item


def _is_deep(value: Any) -> bool:
    level = [value]
    for _ in range(MOST_DEPTH):
        level = [inner for each in level for inner in _inner(each)]
        if not level:
            return False
    return True


def _inner(value: Any) -> Sequence[Any]:
    if isinstance(value, dict):
        return list(value.values())
    return value if isinstance(value, list) else ()


def stored_items(items: Sequence[AnyItem]) -> list[Mapping[str, Any]]:
    """Return items as they are kept and shown."""
    return [_stored(each) for each in items]


def _stored(item: AnyItem) -> Mapping[str, Any]:
    document = {key: value for key, value in msgspec.to_builtins(item).items() if value is not None}
    if isinstance(item, MessageItem) and isinstance(item.content, str):
        said = OutputText if item.role == "assistant" else InputText
        document["content"] = [msgspec.to_builtins(said(text=item.content))]
    return document
