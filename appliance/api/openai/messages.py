"""Chat messages on the wire, one type a role, and as the chat template reads them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from appliance.api.openai.sampling import check_prompt_length
from appliance.api.openai.tools import MAX_TOOLS, CallId, FunctionCall
from appliance.core.errors import InvalidRequestError
from appliance.core.settings import Settings
from appliance.core.tools import Tool
from appliance.core.types import ChatMessage
from appliance.web.wire import Text, ignored, meaning, refused

Name = Annotated[Text, Meta(max_length=256)]
Nothing = Annotated[list[Any], Meta(max_length=0)]


class TextPart(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A part of a message's content; the parts are joined by line breaks."""

    type: Literal["text"]
    text: Text
    prompt_cache_breakpoint: Annotated[dict[str, Any] | None, ignored("every prefix is cached")] = None


Content = Text | Annotated[list[TextPart], Meta(min_length=1)]


class Message(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag_field="role"):
    """One message. `name` goes to the chat template, which may show it to the model."""


class SystemMessage(Message, frozen=True, tag="system"):
    """Instructions of the operator."""

    content: Content
    name: Name | None = None


class DeveloperMessage(Message, frozen=True, tag="developer"):
    """Instructions of the developer; OpenAI's newer word for `system`."""

    content: Content
    name: Name | None = None


class UserMessage(Message, frozen=True, tag="user"):
    """What the user said."""

    content: Content
    name: Name | None = None


class AssistantMessage(Message, frozen=True, tag="assistant"):
    """What the model said or called. Fields that come with every answer may be sent back as long as they are empty."""

    content: Content | None = None
    name: Name | None = None
    refusal: Annotated[None, refused("send refusals as text")] = None
    annotations: Annotated[list[Any] | None, ignored("notes for the reader")] = None
    audio: Annotated[None, refused("the models here read text")] = None
    tool_calls: Annotated[
        Annotated[list[FunctionCall], Meta(max_length=MAX_TOOLS)] | None, meaning("Calls, as they came")
    ] = None
    function_call: Annotated[None, refused("it is the older form of `tool_calls`")] = None


class ToolMessage(Message, frozen=True, tag="tool"):
    """What a tool returned."""

    content: Content
    tool_call_id: Annotated[CallId, meaning("Of a call in a message before")]


AnyMessage = SystemMessage | DeveloperMessage | UserMessage | AssistantMessage | ToolMessage
Messages = Annotated[list[AnyMessage], Meta(min_length=1), meaning("The conversation, oldest first")]


def chat_messages(
    messages: Sequence[AnyMessage], settings: Settings, tools: Sequence[Tool] = ()
) -> tuple[ChatMessage, ...]:
    """Return the messages as the chat template reads them; the model is told of the tools beside them.

    Raises:
        InvalidRequestError: Together they are longer than `max_prompt_characters`, one says nothing, or a result
            belongs to no call.
    """
    _check_calls(messages)
    converted = tuple(_chat_message(each) for each in messages)
    characters = sum(len(each.content) for each in converted) + sum(
        len(call.function.arguments) for each in messages for call in _calls(each)
    )
    characters += sum(len(each.description) for each in tools)
    check_prompt_length(characters, settings, "messages")
    return converted


def _calls(message: AnyMessage) -> Sequence[FunctionCall]:
    return message.tool_calls or () if isinstance(message, AssistantMessage) else ()


def _check_calls(messages: Sequence[AnyMessage]) -> None:
    """Refuse what no conversation with tools can hold."""
    called: set[str] = set()
    for index, message in enumerate(messages):
        if message.content is None and not _calls(message):
            raise InvalidRequestError(
                f"messages[{index}] has neither text nor tool calls.",
                param=f"messages[{index}].content",
                code="invalid_value",
            )
        ids = {each.id for each in _calls(message)}
        if len(ids) < len(_calls(message)):
            raise InvalidRequestError(
                f"messages[{index}] has two calls with one id.",
                param=f"messages[{index}].tool_calls",
                code="invalid_value",
            )
        called |= ids
        if isinstance(message, ToolMessage) and message.tool_call_id not in called:
            raise InvalidRequestError(
                f"messages[{index}] is the result of {message.tool_call_id[:64]!r}, which no message before it calls.",
                advice="Send the assistant's message with its `tool_calls` before the results.",
                param=f"messages[{index}].tool_call_id",
                code="invalid_value",
            )


def _chat_message(message: AnyMessage) -> ChatMessage:
    content = message.content or ""
    text = content if isinstance(content, str) else "\n".join(part.text for part in content)
    extra: dict[str, Any] = {}
    if isinstance(message, ToolMessage):
        extra["tool_call_id"] = message.tool_call_id
    elif message.name is not None:
        extra["name"] = message.name
    if calls := _calls(message):
        extra["tool_calls"] = [
            {
                "id": each.id,
                "type": "function",
                "function": {"name": each.function.name, "arguments": each.function.arguments},
            }
            for each in calls
        ]
    return ChatMessage(role=str(type(message).__struct_config__.tag), content=text, extra=extra)
