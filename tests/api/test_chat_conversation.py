"""A chat completion within a stored conversation: what it reads, what it keeps, and who wins when two append."""

from __future__ import annotations

import asyncio
from typing import Any

import openai
import pytest

from appliance.core.errors import EngineError
from appliance.core.tools import ToolCallDelta
from appliance.core.types import ChatMessage, Delta, FinishReason
from tests.api.boxes import ScriptedBox, events, until
from tests.api.scripted import say

pytestmark = pytest.mark.anyio

PATH = "/v1/conversations"


async def begin(box: ScriptedBox, *items: dict[str, Any]) -> str:
    reply = await box.ask("POST", PATH, {"items": list(items)})
    assert reply.status == 200, reply.json()
    return str(reply.json()["id"])


async def kept(box: ScriptedBox, name: str) -> list[dict[str, Any]]:
    items: list[dict[str, Any]] = (await box.ask("GET", f"{PATH}/{name}/items?order=asc&limit=100")).json()["data"]
    return items


async def texts(box: ScriptedBox, name: str) -> list[tuple[str, str]]:
    return [(each["role"], each["content"][0]["text"]) for each in await kept(box, name)]


async def test_turns_of_the_official_client_join_the_conversation_they_name(box: ScriptedBox) -> None:
    box.models.script = lambda _: say("Fine", ".")
    async with openai.AsyncOpenAI(base_url=f"{box.url}/v1", api_key="any", max_retries=0, timeout=60) as client:
        name = (await client.conversations.create()).id
        for text in ("One", "Two"):
            answer = await client.chat.completions.create(
                model="tiny",
                messages=[{"role": "system", "content": "Be brief."}, {"role": "user", "content": text}],
                extra_body={"conversation": name},
            )
            assert answer.choices[0].message.content == "Fine."
    assert box.models.requests[-1].prompt == (
        ChatMessage("system", "Be brief."),
        ChatMessage("user", "One"),
        ChatMessage("assistant", "Fine."),
        ChatMessage("user", "Two"),
    )
    session = box.models.requests[-1].session
    assert session is not None
    assert session.id == name
    assert await texts(box, name) == [("user", "One"), ("assistant", "Fine."), ("user", "Two"), ("assistant", "Fine.")]


async def test_a_stream_is_kept_before_it_says_that_it_is_done(box: ScriptedBox) -> None:
    name = await begin(box)
    box.models.script = lambda _: say("Well", " then")
    reply = await box.chat("Hello", conversation=name, stream=True)
    assert events(reply.body)[-1] == "[DONE]"
    assert await texts(box, name) == [("user", "Hello"), ("assistant", "Well then")]


async def test_calls_and_their_results_are_kept_and_read_again(box: ScriptedBox) -> None:
    name = await begin(box)
    tools = [{"type": "function", "function": {"name": "clock"}}]
    box.models.script = lambda _: [
        Delta(0, "", 1, tool_calls=(ToolCallDelta(0, "", "call_a", "clock"),)),
        Delta(0, "", 1, tool_calls=(ToolCallDelta(0, "{}"),)),
        Delta(0, "", 1, finish_reason=FinishReason.TOOL_CALLS),
    ]
    assert (await box.chat("What time is it?", conversation=name, tools=tools)).status == 200
    box.models.script = lambda _: say("Noon.")
    result = {"role": "tool", "tool_call_id": "call_a", "content": "12:00"}
    body = {"model": "tiny", "messages": [result], "conversation": name, "tools": tools}
    assert (await box.ask("POST", "/v1/chat/completions", body)).status == 200
    assert [each["type"] for each in await kept(box, name)] == [
        "message",
        "function_call",
        "function_call_output",
        "message",
    ]
    prompt = box.models.requests[-1].prompt
    assert isinstance(prompt[1], ChatMessage)
    assert prompt[1].extra["tool_calls"][0]["function"] == {"name": "clock", "arguments": "{}"}
    assert prompt[2] == ChatMessage("tool", "12:00", {"tool_call_id": "call_a"})


async def test_messages_with_calls_are_kept_as_items(box: ScriptedBox) -> None:
    name = await begin(box)
    call = {"id": "call_b", "type": "function", "function": {"name": "clock", "arguments": "{}"}}
    messages = [
        {"role": "user", "content": "When?"},
        {"role": "assistant", "content": "Let me see.", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call_b", "content": "Noon"},
        {"role": "assistant", "content": None, "tool_calls": [{**call, "id": "call_c"}]},
        {"role": "tool", "tool_call_id": "call_c", "content": "Noon"},
    ]
    body = {"model": "tiny", "messages": messages, "conversation": name}
    assert (await box.ask("POST", "/v1/chat/completions", body)).status == 200
    message, call_item, output = "message", "function_call", "function_call_output"
    types = [each["type"] for each in await kept(box, name)]
    assert types == [message, message, call_item, output, call_item, output, message]


@pytest.mark.parametrize("stream", [False, True])
async def test_an_answer_that_failed_leaves_nothing(box: ScriptedBox, stream: bool) -> None:
    name = await begin(box, {"role": "user", "content": "Before"})
    box.models.script = lambda _: [Delta(0, "Half", 1), EngineError("It broke.")]
    reply = await box.chat("Hello", conversation=name, stream=stream)
    assert b"engine_failed" in reply.body
    assert await texts(box, name) == [("user", "Before")]


@pytest.mark.parametrize("stream", [False, True])
async def test_of_two_who_go_on_at_once_one_wins_and_the_other_is_told(box: ScriptedBox, stream: bool) -> None:
    name = await begin(box)
    hold = asyncio.Event()
    box.models.script = lambda _: [Delta(0, "Slow", 1), hold, *say("ly")]
    slow = asyncio.create_task(box.chat("First", conversation=name, stream=stream))
    await until(lambda: bool(box.models.requests))
    box.models.script = lambda _: say("Quick")
    assert (await box.chat("Second", conversation=name)).status == 200
    hold.set()
    reply = await slow
    assert b"conversation" in reply.body
    assert reply.status == (200 if stream else 409)
    assert await texts(box, name) == [("user", "Second"), ("assistant", "Quick")]


async def test_a_conversation_that_is_not_there_and_several_answers_are_refused(box: ScriptedBox) -> None:
    reply = await box.chat("Hello", conversation="conv_none")
    assert (reply.status, "conv_none" in reply.error["message"]) == (404, True)
    name = await begin(box)
    reply = await box.chat("Hello", conversation=name, n=2)
    assert (reply.status, reply.error["param"]) == (400, "n")
    assert not box.models.requests
    assert await kept(box, name) == []


async def test_a_result_without_its_call_is_refused_in_a_conversation_too(box: ScriptedBox) -> None:
    name = await begin(box)
    result = {"role": "tool", "tool_call_id": "call_x", "content": "12:00"}
    reply = await box.ask("POST", "/v1/chat/completions", {"model": "tiny", "messages": [result], "conversation": name})
    assert (reply.status, reply.error["param"]) == (400, "messages[0].tool_call_id")
