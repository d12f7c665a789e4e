"""Input items of `/v1/responses` on the wire, one type a kind, and as they are kept."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from appliance.api.wire import Text, convert, ignored
from appliance.core.errors import InvalidRequestError

ItemId = Annotated[Text, Meta(min_length=1, max_length=128)]
Role = Literal["user", "assistant", "system", "developer"]
Status = Literal["in_progress", "completed", "incomplete"]
Json = Annotated[Text, Meta(max_length=1_000_000)]


class TextPart(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag_field="type", tag="input_text"):
    """Text that the model reads."""

    text: Text
    prompt_cache_breakpoint: Annotated[dict[str, Any] | None, ignored("every prefix is cached")] = None


class AnswerPart(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag_field="type", tag="output_text"):
    """Text that the model wrote."""

    text: Text
    annotations: list[dict[str, Any]] | None = None
    logprobs: list[dict[str, Any]] | None = None
    parsed: Annotated[Any, ignored("the official client adds it")] = None


class RefusalPart(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag_field="type", tag="refusal"):
    """A refusal that the model wrote."""

    refusal: Text


Parts = Annotated[list[TextPart | AnswerPart | RefusalPart], Meta(min_length=1)]


class MessageItem(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag_field="type", tag="message"):
    """A message. One without `type` is one too."""

    role: Role
    content: Text | Parts
    id: ItemId | None = None
    status: Status | None = None
    phase: Annotated[Literal["commentary", "final_answer"] | None, ignored("the models here have no phases")] = None


class FunctionCallItem(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag_field="type", tag="function_call"):
    """A call of a function that the model asked for."""

    call_id: ItemId
    name: Annotated[Text, Meta(min_length=1, max_length=64)]
    arguments: Json
    id: ItemId | None = None
    status: Status | None = None
    namespace: None = None
    caller: Annotated[Any, ignored("functions are called directly")] = None
    async_: Annotated[bool | None, ignored("it says how the client runs it")] = msgspec.field(
        default=None, name="async"
    )
    parsed_arguments: Annotated[Any, ignored("the official client adds it")] = None


class FunctionCallOutputItem(
    msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag_field="type", tag="function_call_output"
):
    """What a function returned."""

    call_id: ItemId
    output: Text | Annotated[list[TextPart], Meta(min_length=1)]
    id: ItemId | None = None
    status: Status | None = None
    name: Text | None = None
    caller: Annotated[Any, ignored("functions are called directly")] = None


class FileSearchCallItem(
    msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag_field="type", tag="file_search_call"
):
    """A search that the box made; `call`, an extension, has what the model saw of it."""

    id: ItemId
    queries: list[Text]
    status: Text
    results: list[dict[str, Any]] | None = None
    call: dict[str, Text] | None = None


class McpCallItem(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag_field="type", tag="mcp_call"):
    """A call of a tool that the box made."""

    id: ItemId
    name: Text
    arguments: Json
    server_label: Text
    approval_request_id: ItemId | None = None
    output: Text | None = None
    error: dict[str, Any] | None = None
    status: Text | None = None


class McpListToolsItem(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag_field="type", tag="mcp_list_tools"):
    """The tools that a server has; the model is shown those of the request instead."""

    id: ItemId
    server_label: Text
    tools: list[dict[str, Any]]
    error: Any = None


class ApprovalRequestItem(
    msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag_field="type", tag="mcp_approval_request"
):
    """The request that a person agrees to a call."""

    id: ItemId
    name: Text
    arguments: Json
    server_label: Text


class ApprovalResponseItem(
    msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag_field="type", tag="mcp_approval_response"
):
    """What a person decided on a call."""

    approval_request_id: ItemId
    approve: bool
    id: ItemId | None = None
    reason: Text | None = None


class ReasoningItem(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag_field="type", tag="reasoning"):
    """What a reasoning model thought; the models here are not shown it."""

    id: ItemId
    summary: list[dict[str, Any]]
    content: list[dict[str, Any]] | None = None
    status: Status | None = None
    encrypted_content: None = None


InputItem = (
    MessageItem
    | FunctionCallItem
    | FunctionCallOutputItem
    | FileSearchCallItem
    | McpCallItem
    | McpListToolsItem
    | ApprovalRequestItem
    | ApprovalResponseItem
    | ReasoningItem
)

_PREFIXES = {
    "message": "msg",
    "function_call": "fc",
    "function_call_output": "fco",
    "mcp_approval_response": "mcpa",
}

KNOWN = (
    "message",
    "function_call",
    "function_call_output",
    "file_search_call",
    "mcp_call",
    "mcp_list_tools",
    "mcp_approval_request",
    "mcp_approval_response",
    "reasoning",
)


def with_types(value: Any) -> Any:
    """Return items with the type that OpenAI lets messages leave out."""
    if not isinstance(value, list):
        return value
    return [
        {**each, "type": "message"} if isinstance(each, dict) and each.get("type") is None and "role" in each else each
        for each in value
    ]


def check_types(items: Any) -> None:
    """Refuse items and parts of unknown types by name.

    Raises:
        InvalidRequestError: With the place and the type.
    """
    for index, item in enumerate(items if isinstance(items, list) else ()):
        if not isinstance(item, dict):
            continue
        kind = item.get("type")
        if isinstance(kind, str) and kind not in KNOWN:
            raise _unsupported(f"input[{index}].type", kind, f"items here are {', '.join(KNOWN)}")
        content = item.get("content")
        for at, part in enumerate(content if isinstance(content, list) and kind == "message" else ()):
            given = part.get("type") if isinstance(part, dict) else None
            if isinstance(given, str) and given not in ("input_text", "output_text", "refusal"):
                raise _unsupported(
                    f"input[{index}].content[{at}].type", given, "the models here read text; send input_text"
                )


def _unsupported(path: str, kind: str, words: str) -> InvalidRequestError:
    return InvalidRequestError(
        f"{path}: {kind[:100]!r} is not supported; {words}.", param=path, code="unsupported_parameter"
    )


def kept_items(value: str | Sequence[InputItem]) -> tuple[dict[str, Any], ...]:
    """Return the items as they are kept and shown, each with an id.

    Raises:
        InvalidRequestError: Two have one id.
    """
    if isinstance(value, str):
        value = [MessageItem("user", value)]
    items = tuple(_kept(each) for each in value)
    ids = [each["id"] for each in items]
    if len(set(ids)) < len(ids):
        twice = next(name for index, name in enumerate(ids) if name in ids[:index])
        raise InvalidRequestError(f"Two items have the id {twice[:100]!r}.", param="input", code="invalid_value")
    return items


def _kept(item: InputItem) -> dict[str, Any]:
    written: dict[str, Any] = msgspec.to_builtins(item)
    kept = {key: each for key, each in written.items() if each is not None and key not in _DROPPED}
    kept.setdefault("id", f"{_PREFIXES.get(kept['type'], 'item')}_{secrets.token_hex(12)}")
    if isinstance(item, MessageItem):
        kept["content"] = _content(item)
        kept["status"] = item.status or "completed"
    elif isinstance(item, FunctionCallItem | FunctionCallOutputItem):
        kept["status"] = item.status or "completed"
    return kept


_DROPPED = ("phase", "caller", "async", "parsed_arguments", "namespace")


def _content(item: MessageItem) -> list[dict[str, Any]]:
    """Return a message's parts as OpenAI shows them: what an assistant wrote is output, all else input."""
    is_answer = item.role == "assistant"
    parts: list[dict[str, Any]] = []
    for part in [TextPart(item.content)] if isinstance(item.content, str) else item.content:
        if isinstance(part, RefusalPart):
            parts.append({"type": "refusal", "refusal": part.refusal})
        elif is_answer:
            annotations = list(part.annotations or ()) if isinstance(part, AnswerPart) else []
            parts.append({"type": "output_text", "text": part.text, "annotations": annotations})
        else:
            parts.append({"type": "input_text", "text": part.text})
    return parts


class _Items(msgspec.Struct, frozen=True):
    input: list[InputItem]


def read_items(value: Any) -> tuple[dict[str, Any], ...]:
    """Return items of a request as they are kept.

    Raises:
        InvalidRequestError: One will not do; `param` is its path.
    """
    typed = with_types(value)
    check_types(typed)
    return kept_items(convert({"input": typed}, _Items).input)
