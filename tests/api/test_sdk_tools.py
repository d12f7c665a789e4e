"""The official client calls tools on a real engine with random weights, whose calls are valid all the same."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import openai
import pytest
from openai.types.chat import ChatCompletionMessageParam, ChatCompletionToolParam
from pydantic import BaseModel

from tests.api.boxes import real_box
from tests.api.test_sdk import client_of
from tests.tiny_gguf import write_tiny_llama

pytestmark = pytest.mark.anyio

CELLS = 4096
ASK: list[ChatCompletionMessageParam] = [{"role": "user", "content": "Weather?"}]
WEATHER: ChatCompletionToolParam = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Tells the weather.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "enum": ["Graz", "成都"]}, "days": {"enum": [1, 2, 3]}},
            "required": ["city", "days"],
        },
    },
}
REQUIRED: dict[str, Any] = {
    "model": "tiny",
    "tools": [WEATHER],
    "tool_choice": "required",
    "parallel_tool_calls": False,
    "max_completion_tokens": 200,
    "seed": 5,
}


@pytest.fixture
async def client(tmp_path: Path) -> AsyncIterator[openai.AsyncOpenAI]:
    model = write_tiny_llama(tmp_path / "tiny.gguf", context_length=CELLS)
    async with real_box(tmp_path, model, context_cells=CELLS) as box, client_of(box) as each:
        yield each


def check(arguments: str) -> None:
    found = json.loads(arguments)
    assert found["city"] in ("Graz", "成都")
    assert found["days"] in (1, 2, 3)
    assert len(found) == 2


async def test_a_tool_round_trip(client: openai.AsyncOpenAI) -> None:
    answer = await client.chat.completions.create(messages=ASK, **REQUIRED)
    choice = answer.choices[0]
    assert choice.finish_reason == "tool_calls"
    assert choice.message.content is None
    assert choice.message.tool_calls is not None
    (call,) = choice.message.tool_calls
    assert call.type == "function"
    assert call.function.name == "get_weather"
    check(call.function.arguments)
    talk = [
        *ASK,
        choice.message.model_dump(exclude_none=True),
        {"role": "tool", "tool_call_id": call.id, "content": "Rain"},
    ]
    last = await client.chat.completions.create(
        model="tiny",
        messages=talk,
        tools=[WEATHER],
        tool_choice="none",
        max_completion_tokens=5,
    )
    assert last.choices[0].finish_reason == "length"
    assert last.choices[0].message.tool_calls is None


async def test_a_streamed_call_is_the_same_call(client: openai.AsyncOpenAI) -> None:
    whole = await client.chat.completions.create(messages=ASK, **REQUIRED)
    name, pieces, ids, reasons = "", [], [], []
    async for chunk in await client.chat.completions.create(messages=ASK, stream=True, **REQUIRED):
        (choice,) = chunk.choices
        assert not choice.delta.content
        reasons.append(choice.finish_reason)
        for call in choice.delta.tool_calls or []:
            assert call.index == 0
            assert call.function is not None
            if call.id:
                assert call.type == "function"
                assert call.function.arguments == ""
                ids.append(call.id)
                name += call.function.name or ""
            pieces.append(call.function.arguments or "")
    assert whole.choices[0].message.tool_calls is not None
    (call,) = whole.choices[0].message.tool_calls
    assert (name, "".join(pieces)) == (call.function.name, call.function.arguments)
    assert len(ids) == 1
    assert len(pieces) >= 2
    assert reasons[-1] == "tool_calls"
    assert set(reasons[:-1]) == {None}


class Days(BaseModel):
    """How many days to tell of."""

    days: int


async def test_the_clients_own_stream_and_parser_understand_calls(client: openai.AsyncOpenAI) -> None:
    fields = REQUIRED | {"tools": [openai.pydantic_function_tool(Days)]}
    async with client.chat.completions.stream(messages=ASK, **fields) as stream:
        events = [event.type async for event in stream]
        final = await stream.get_final_completion()
    assert "tool_calls.function.arguments.done" in events
    assert final.choices[0].message.tool_calls is not None
    parsed = final.choices[0].message.tool_calls[0].function.parsed_arguments
    assert isinstance(parsed, Days)


async def test_a_tool_that_was_not_offered_is_a_400(client: openai.AsyncOpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="rm") as refusal:
        await client.chat.completions.create(
            messages=ASK, **(REQUIRED | {"tool_choice": {"type": "function", "function": {"name": "rm"}}})
        )
    assert refusal.value.param == "tool_choice"
