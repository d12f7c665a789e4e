"""Chat messages on the wire, one type a role, and as the chat template reads them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from appliance.api.openai.sampling import check_prompt_length
from appliance.api.wire import Text, ignored, meaning, refused
from appliance.core.settings import Settings
from appliance.core.types import ChatMessage

Name = Annotated[Text, Meta(max_length=256)]
Nothing = Annotated[list[Any], Meta(max_length=0)]


class TextPart(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A part of a message's content; the parts are joined by line breaks."""

    type: Literal["text"]
    text: Text
    prompt_cache_breakpoint: Annotated[dict[str, Any] | None, ignored("every prefix is cached")] = None


Content = Text | Annotated[list[TextPart], Meta(min_length=1)]


class Message(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag_field="role"):
    """What every role has. `name` goes to the chat template, which may show it to the model."""

    content: Content


class SystemMessage(Message, frozen=True, tag="system"):
    """Instructions of the operator."""

    name: Name | None = None


class DeveloperMessage(Message, frozen=True, tag="developer"):
    """Instructions of the developer; OpenAI's newer word for `system`."""

    name: Name | None = None


class UserMessage(Message, frozen=True, tag="user"):
    """What the user said."""

    name: Name | None = None


class AssistantMessage(Message, frozen=True, tag="assistant"):
    """What the model said. Fields that come with every answer may be sent back with it as long as they are empty."""

    name: Name | None = None
    refusal: Annotated[None, refused("send refusals as text")] = None
    annotations: Annotated[list[Any] | None, ignored("notes for the reader")] = None
    audio: Annotated[None, refused("the models here read text")] = None
    tool_calls: Annotated[Nothing | None, refused("tool calls are not supported")] = None
    function_call: Annotated[None, refused("tool calls are not supported")] = None


class ToolMessage(Message, frozen=True, tag="tool"):
    """What a tool returned; the chat template decides whether the model sees it as such."""

    tool_call_id: Name


AnyMessage = SystemMessage | DeveloperMessage | UserMessage | AssistantMessage | ToolMessage
Messages = Annotated[list[AnyMessage], Meta(min_length=1), meaning("The conversation, oldest first")]


def chat_messages(messages: Sequence[AnyMessage], settings: Settings) -> tuple[ChatMessage, ...]:
    """Return the messages as the chat template reads them.

    Raises:
        InvalidRequestError: Together they are longer than `max_prompt_characters`.
    """
    converted = tuple(_chat_message(each) for each in messages)
    check_prompt_length(sum(len(each.content) for each in converted), settings, "messages")
    return converted


def _chat_message(message: AnyMessage) -> ChatMessage:
    content = message.content
    text = content if isinstance(content, str) else "\n".join(part.text for part in content)
    extra: dict[str, Any] = {}
    if isinstance(message, ToolMessage):
        extra["tool_call_id"] = message.tool_call_id
    elif message.name is not None:
        extra["name"] = message.name
    return ChatMessage(role=str(type(message).__struct_config__.tag), content=text, extra=extra)
