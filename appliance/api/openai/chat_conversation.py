"""A chat completion within a stored conversation: what was said comes first, and what is said now is appended.

    conversation  ── item ── item ── item ──┐                  ┌── new messages ── answer
    request       instructions              └── new messages ──┘

Instructions, the system and developer messages that the request begins with, count for this answer alone. Nothing is
kept of an answer that did not come to its end. Who appends meanwhile wins: the other is told 409, and nothing of his is
kept.
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from appliance.agents.transcript import messages_of
from appliance.core.clock import SystemClock
from appliance.core.sessions import Conversations, Item
from appliance.core.types import ChatMessage, Delta, Session

_INSTRUCTIONS = ("system", "developer")


@dataclass(frozen=True, slots=True)
class Past:
    """A conversation as it was when an answer to it began.

    Attributes:
        session: Whose text it is.
        last: Id of its newest item, or "".
        items: What was said in it.
    """

    session: Session
    last: str
    items: Sequence[Item]

    @property
    def calls(self) -> frozenset[str]:
        """Return the ids of the calls in it, whose results may be among the new messages."""
        return frozenset(str(each["call_id"]) for each in self.items if each["type"] == "function_call")


def read_past(conversations: Conversations, name: str, *, tenant: str) -> Past:
    """Return a conversation's past.

    Raises:
        NotFoundError: The tenant has no such conversation.
    """
    as_of = SystemClock().monotonic()
    last = conversations.get(name, tenant=tenant).last
    items: Sequence[Item] = ()
    if last:
        items, _ = conversations.items(name, tenant=tenant)
        ids = [each["id"] for each in items]
        items = items[: ids.index(last) + 1] if last in ids else items
    return Past(Session(name, as_of), last, items)


def with_past(past: Past, new: Sequence[ChatMessage], result_bytes: int) -> tuple[ChatMessage, ...]:
    """Return the request's instructions, the past with so much of each tool's result, and the other messages."""
    count = _instructions(new)
    answered = [each.extra["tool_call_id"] for each in new if each.role == "tool"]
    return (*new[:count], *messages_of("", past.items, result_bytes, answered), *new[count:])


async def keep(
    conversations: Conversations, past: Past, new: Sequence[ChatMessage], answer: Delta, *, tenant: str
) -> None:
    """Append what is new and the answer, all or nothing; durable when this returns.

    Raises:
        ConflictError: Something was appended since the past was read.
        NotFoundError: The conversation was deleted meanwhile.
    """
    items = [item for each in new[_instructions(new) :] for item in _items(each)]
    if answer.text or not answer.tool_calls:
        items.append(_message("assistant", answer.text))
    items += [_call(each.id, each.name, each.arguments) for each in answer.tool_calls]
    await conversations.append(past.session.id, items, tenant=tenant, after=past.last)


def _instructions(new: Sequence[ChatMessage]) -> int:
    return next((index for index, each in enumerate(new) if each.role not in _INSTRUCTIONS), len(new))


def _items(message: ChatMessage) -> list[Item]:
    if message.role == "tool":
        call = message.extra["tool_call_id"]
        return [{"id": _new("fco"), "type": "function_call_output", "call_id": call, "output": message.content}]
    calls = [
        _call(each["id"], each["function"]["name"], each["function"]["arguments"])
        for each in message.extra.get("tool_calls", ())
    ]
    return [*([_message(message.role, message.content)] if message.content or not calls else []), *calls]


def _message(role: str, text: str) -> dict[str, Any]:
    part: dict[str, Any] = {"type": "input_text", "text": text}
    if role == "assistant":
        part = {"type": "output_text", "annotations": [], "text": text}
    return {"id": _new("msg"), "type": "message", "status": "completed", "role": role, "content": [part]}


def _call(call: str, name: str, arguments: str) -> dict[str, Any]:
    return {
        "id": _new("fc"),
        "type": "function_call",
        "status": "completed",
        "call_id": call,
        "name": name,
        "arguments": arguments,
    }


def _new(prefix: str) -> str:
    return f"{prefix}_{secrets.token_hex(12)}"
