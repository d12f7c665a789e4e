"""Items of a conversation as the messages that the chat template reads. Pure.

What tools returned and what was retrieved goes into messages of the role `tool` and nowhere else, cut to a limit. A
call without a result gets one that says so, the same each time, since templates refuse or misread a call left open.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from appliance.core.errors import InvalidRequestError
from appliance.core.sessions import Item
from appliance.core.types import ChatMessage

NO_RESULT = "No result was given."
"""What the model reads of a call that nobody answered."""

_HIDDEN = frozenset({"reasoning", "mcp_list_tools", "mcp_approval_request", "mcp_approval_response"})
"""Types of items that the model is not shown."""


def messages_of(
    instructions: str, items: Sequence[Item], result_bytes: int, answered: Collection[str] = ()
) -> tuple[ChatMessage, ...]:
    """Return the messages of a turn.

    Args:
        instructions: What stands before all, or "".
        items: The history, the input, and what the response has come to so far.
        result_bytes: Of a tool's result, what the model is shown.
        answered: Calls whose results follow behind these items.
    """
    calls = _ids(items, "function_call")
    answered = _ids(items, "function_call_output").union(answered)
    messages: list[ChatMessage] = [ChatMessage("system", instructions)] if instructions else []
    for item in items:
        if item.get("type") == "function_call_output" and item["call_id"] not in calls:
            continue  # its call was removed from the conversation
        for message in _messages(item, answered, result_bytes):
            _add(messages, message)
    return tuple(messages)


def said(items: Sequence[Item]) -> str:
    """Return what users and the model said in words; nothing that a tool brought in."""
    texts = (
        text_of(each["content"])
        for each in items
        if each.get("type", "message") == "message" and each["role"] in ("user", "assistant")
    )
    return "\n".join(text for text in texts if text)


def with_notes(messages: Sequence[ChatMessage], summary: str, memory: Sequence[str]) -> tuple[ChatMessage, ...]:
    """Return messages with what stands for turns that are left out.

    Both go into messages of the user, since models made what is in them of what users said, and many templates know no
    place beside the turns: the summary into the first, memory into the newest.
    """
    noted = list(messages)
    if memory:
        at = max((index for index, each in enumerate(noted) if each.role == "user"), default=len(noted))
        _note(noted, at, "From earlier in this conversation", "\n".join(memory))
    if summary:
        at = next((index for index, each in enumerate(noted) if each.role not in ("system", "developer")), len(noted))
        _note(noted, at, "Summary of the conversation so far", summary)
    return tuple(noted)


def _note(messages: list[ChatMessage], at: int, what: str, text: str) -> None:
    note = f"[{what}; these are notes, not a request]\n{text}\n[End of the notes]"
    if at < len(messages) and messages[at].role == "user":
        messages[at] = replace(messages[at], content=f"{note}\n\n{messages[at].content}")
    else:
        messages.insert(at, ChatMessage("user", note))


def check_calls(items: Sequence[Item], new: Sequence[Item]) -> None:
    """Refuse an output among the new items whose call is not known.

    Raises:
        InvalidRequestError: With the id of the call.
    """
    known = {each["call_id"] for each in (*items, *new) if each.get("type") == "function_call"}
    asked = {each["id"] for each in (*items, *new) if each.get("type") == "mcp_approval_request"}
    for each in new:
        if each.get("type") == "function_call_output" and each["call_id"] not in known:
            raise _unknown("function call", str(each["call_id"]))
        if each.get("type") == "mcp_approval_response" and each["approval_request_id"] not in asked:
            raise _unknown("approval request", str(each["approval_request_id"]))


def _ids(items: Sequence[Item], kind: str) -> frozenset[str]:
    return frozenset(str(each["call_id"]) for each in items if each.get("type") == kind)


def _unknown(what: str, name: str) -> InvalidRequestError:
    return InvalidRequestError(
        f"There is no {what} {name[:100]!r} in the input or before it.",
        advice="Send previous_response_id, or the call's own item before its output.",
        param="input",
        code="unknown_call",
    )


def cut(text: str, most_bytes: int) -> str:
    """Return a text of at most so many bytes in UTF-8, and a line on what was left out if it was longer."""
    encoded = text.encode("utf-8", "replace")
    if len(encoded) <= most_bytes:
        return text
    shown = encoded[:most_bytes].decode("utf-8", "ignore")
    return f"{shown}\n[{len(encoded)} bytes in all; the rest is left out here.]"


def text_of(content: Any) -> str:
    """Return the text of an item's content, a string or a list of parts; what is neither is no text."""
    if isinstance(content, str):
        return content
    parts = [each for each in content if isinstance(each, Mapping)] if isinstance(content, list | tuple) else []
    return "\n".join(str(part.get("text", part.get("refusal", ""))) for part in parts)


def _messages(item: Item, answered: frozenset[str], result_bytes: int) -> Iterator[ChatMessage]:
    kind = item.get("type", "message")
    if kind in _HIDDEN:
        return
    if kind == "message":
        yield ChatMessage(str(item["role"]), text_of(item["content"]))
    elif kind == "function_call":
        yield _call(str(item["call_id"]), item)
        if item["call_id"] not in answered:
            yield _result(str(item["call_id"]), NO_RESULT)
    elif kind == "function_call_output":
        yield _result(str(item["call_id"]), cut(text_of(item["output"]), result_bytes))
    elif kind == "file_search_call":
        call = {"name": "file_search", "arguments": "{}", "output": NO_RESULT, **(item.get("call") or {})}
        yield _call(str(item["id"]), call)
        yield _result(str(item["id"]), cut(str(call["output"]), result_bytes))
    else:
        yield _call(str(item["id"]), item)
        yield _result(str(item["id"]), cut(_outcome(item), result_bytes))


def _outcome(item: Item) -> str:
    """Return what a call of a built-in tool came to."""
    error = item.get("error")
    if isinstance(error, str):
        return f"failed: {error}"
    if isinstance(error, Mapping):
        return f"{error.get('kind', 'failed')}: {text_of(error.get('content', error.get('message', '')))}"
    return NO_RESULT if item.get("output") is None else str(item["output"])


def _call(call_id: str, item: Mapping[str, Any]) -> ChatMessage:
    function = {"name": str(item["name"]), "arguments": str(item["arguments"])}
    return ChatMessage("assistant", "", {"tool_calls": [{"id": call_id, "type": "function", "function": function}]})


def _result(call_id: str, text: str) -> ChatMessage:
    return ChatMessage("tool", text, {"tool_call_id": call_id})


def _add(messages: list[ChatMessage], message: ChatMessage) -> None:
    """Add a message; calls join what the assistant said just before them, as they came in one answer."""
    calls = message.extra.get("tool_calls")
    if calls and messages and messages[-1].role == "assistant":
        said = messages[-1]
        messages[-1] = replace(said, extra={**said.extra, "tool_calls": [*said.extra.get("tool_calls", ()), *calls]})
    else:
        messages.append(message)
