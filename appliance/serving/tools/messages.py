"""A conversation with tools, as a chat template reads it. Pure.

A template that knows tools gets them as OpenAI's function objects, earlier calls with their arguments as an object, and
results under the role `tool`. Another template gets all of it as text: the tools in the system message, calls in the
dialect that the model is asked for, and results in the user's turn, since such templates often know no other roles and
want turns to alternate.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from appliance.core.errors import InvalidRequestError
from appliance.core.tools import Tool, ToolChoice
from appliance.core.types import ChatMessage
from appliance.serving.tools.dialects import GEMMA, Dialect, ToolStyle

_ID_LETTERS = "0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"
_NO_PARAMETERS: Mapping[str, Any] = {"type": "object", "properties": {}}


def function_objects(tools: Sequence[Tool]) -> list[dict[str, Any]]:
    """Return tools as templates that know them read them."""
    return [
        {
            "type": "function",
            "function": {
                "name": each.name,
                "description": each.description,
                "parameters": dict(each.parameters or _NO_PARAMETERS),
            },
        }
        for each in tools
    ]


def native_messages(messages: Sequence[ChatMessage], dialect: Dialect) -> list[ChatMessage]:
    """Return messages for a template that knows tools.

    Raises:
        InvalidRequestError: An earlier call has arguments that are no JSON object.
    """
    converted = [_native_message(each, dialect) for each in messages]
    return _one_call_each(converted) if dialect.one_call else converted


def plain_messages(
    messages: Sequence[ChatMessage], style: ToolStyle, tools: Sequence[Tool], choice: ToolChoice
) -> list[ChatMessage]:
    """Return messages for a template that knows no tools; those that may be called are told of in the first.

    Raises:
        InvalidRequestError: An earlier call has arguments that are no JSON object.
    """
    converted: list[ChatMessage] = []
    for each in messages:
        plain = _plain_message(each, style.dialect)
        follows_results = bool(converted) and _is_result(converted[-1]) and plain.role == "user"
        if follows_results:
            plain = replace(plain, content=f"{converted.pop().content}\n{plain.content}", extra=_RESULT)
        converted.append(plain)
    converted = [replace(each, extra={}) if _is_result(each) else each for each in converted]
    if not tools or choice.mode == "none":
        return converted
    told = _instructions(style.dialect, tools)
    if converted and converted[0].role in ("system", "developer"):
        first = converted[0]
        return [replace(first, content=f"{first.content}\n\n{told}"), *converted[1:]]
    return [ChatMessage("system", told), *converted]


def without_system(messages: Sequence[ChatMessage]) -> list[ChatMessage]:
    """Return messages with the first one, the system's, put before the user's first text."""
    first, *rest = messages
    for at, each in enumerate(rest):
        if each.role == "user":
            joined = replace(each, content=f"{first.content}\n\n{each.content}")
            return [*rest[:at], joined, *rest[at + 1 :]]
    return [ChatMessage("user", first.content), *rest]


def has_calls(messages: Sequence[ChatMessage]) -> bool:
    """Return whether calls or results are among the messages."""
    return any(each.role == "tool" or each.extra.get("tool_calls") for each in messages)


_RESULT: Mapping[str, Any] = {"result": True}


def _is_result(message: ChatMessage) -> bool:
    return message.extra is _RESULT


def _native_message(message: ChatMessage, dialect: Dialect) -> ChatMessage:
    extra = dict(message.extra)
    if calls := extra.get("tool_calls"):
        extra["tool_calls"] = [
            {
                "id": _short_id(each["id"], dialect),
                "type": "function",
                "function": {"name": each["function"]["name"], "arguments": _arguments(each)},
            }
            for each in calls
        ]
    if "tool_call_id" in extra:
        extra["tool_call_id"] = _short_id(extra["tool_call_id"], dialect)
    return replace(message, extra=extra)


def _one_call_each(messages: Sequence[ChatMessage]) -> list[ChatMessage]:
    """Return messages with every call in one of its own, its result right behind it."""
    single: list[ChatMessage] = []
    results = {each.extra["tool_call_id"]: each for each in messages if "tool_call_id" in each.extra}
    told: set[int] = set()
    for message in messages:
        if id(message) in told:
            continue
        calls = message.extra.get("tool_calls") or []
        if len(calls) < 2:
            single.append(message)
            continue
        for index, call in enumerate(calls):
            content = message.content if index == 0 else ""
            single.append(replace(message, content=content, extra={**message.extra, "tool_calls": [call]}))
            if (result := results.get(call["id"])) is not None:
                single.append(result)
                told.add(id(result))
    return single


def _plain_message(message: ChatMessage, dialect: Dialect) -> ChatMessage:
    if message.role == "tool":
        return ChatMessage("user", f"<tool_response>\n{message.content}\n</tool_response>", _RESULT)
    calls = message.extra.get("tool_calls")
    if not calls:
        return message
    written = dialect.between.join(
        dialect.call(each["function"]["name"], json.dumps(_arguments(each), ensure_ascii=False)) for each in calls
    )
    text = f"{message.content}\n" if message.content else ""
    extra = {name: value for name, value in message.extra.items() if name != "tool_calls"}
    return replace(message, content=f"{text}{dialect.start[0]}{written}{dialect.end}", extra=extra)


def _instructions(dialect: Dialect, tools: Sequence[Tool]) -> str:
    return "\n".join(_gemma_instructions(tools) if dialect is GEMMA else _hermes_instructions(tools))


def _hermes_instructions(tools: Sequence[Tool]) -> Iterator[str]:
    yield "# Tools\n\nYou may call one or more functions to help the user. These functions exist, one a line:\n<tools>"
    for each in function_objects(tools):
        yield json.dumps(each, ensure_ascii=False)
    yield "</tools>\n\nTo call a function, write its name and its arguments as JSON within <tool_call></tool_call>:"
    yield '<tool_call>\n{"name": <function-name>, "arguments": <arguments-as-json-object>}\n</tool_call>'


def _gemma_instructions(tools: Sequence[Tool]) -> Iterator[str]:
    yield "You have access to functions. If you decide to invoke any of the function(s),"
    yield "you MUST put it in the format of"
    yield '{"name": function name, "parameters": dictionary of argument name and its value}'
    yield "You SHOULD NOT include any other text in the response if you call a function"
    yield json.dumps([each["function"] for each in function_objects(tools)], ensure_ascii=False)


def _arguments(call: Mapping[str, Any]) -> dict[str, Any]:
    function = call["function"]
    try:
        arguments = json.loads(function["arguments"] or "{}")
    except (ValueError, RecursionError):
        arguments = None
    if not isinstance(arguments, dict):
        raise InvalidRequestError(
            f"An earlier call of {function['name']!r} has arguments that are no JSON object: "
            f"{function['arguments'][:100]!r}.",
            advice="Send calls back as they came; leave out one that broke off.",
            param="messages",
            code="invalid_value",
        )
    return arguments


def _short_id(call_id: str, dialect: Dialect) -> str:
    """Return an id of the length that the template wants, always the same for the same id."""
    if not dialect.id_length or (len(call_id) == dialect.id_length and call_id.isascii() and call_id.isalnum()):
        return call_id
    number = int.from_bytes(hashlib.sha256(call_id.encode()).digest()[:16], "big")
    letters = []
    for _ in range(dialect.id_length):
        number, letter = divmod(number, len(_ID_LETTERS))
        letters.append(_ID_LETTERS[letter])
    return "".join(letters)
