"""`/v1/responses` by the official client, on a scripted floor and on a real engine."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import openai
import pytest
from openai.types.responses import Response
from pydantic import BaseModel

from tests.api.boxes import Box, ScriptedBox
from tests.api.scripted import say

pytestmark = pytest.mark.anyio


@pytest.fixture
async def client(any_box: Box) -> AsyncIterator[openai.AsyncOpenAI]:
    async with openai.AsyncOpenAI(base_url=f"{any_box.url}/v1", api_key="any", max_retries=0, timeout=60) as each:
        yield each


def strictly(response: Any) -> None:
    """Check a response object against OpenAI's own model, which the client does not do by itself."""
    Response.model_validate(response.to_dict(mode="json"), strict=False)


async def test_a_response_is_answered_and_can_be_fetched(client: openai.AsyncOpenAI) -> None:
    answer = await client.responses.create(model="tiny", input="Hello", max_output_tokens=4, temperature=0)
    strictly(answer)
    assert answer.status in ("completed", "incomplete")
    assert answer.output_text
    assert answer.model == "tiny:1"
    assert answer.usage is not None
    assert answer.usage.total_tokens == answer.usage.input_tokens + answer.usage.output_tokens
    again = await client.responses.retrieve(answer.id)
    assert again.to_dict() == answer.to_dict()
    items = [each async for each in client.responses.input_items.list(answer.id)]
    assert [each.type for each in items] == ["message"]
    await client.responses.delete(answer.id)
    with pytest.raises(openai.NotFoundError):
        await client.responses.retrieve(answer.id)


async def test_a_stream_says_the_same_as_the_whole_answer(client: openai.AsyncOpenAI) -> None:
    whole = await client.responses.create(model="tiny", input="Hello", max_output_tokens=4, temperature=0)
    async with client.responses.stream(model="tiny", input="Hello", max_output_tokens=4, temperature=0) as stream:
        events = [each async for each in stream]
    assert next(each.sequence_number for each in events) == 0
    assert "".join(each.delta for each in events if each.type == "response.output_text.delta") == whole.output_text


async def test_a_turn_follows_another(client: openai.AsyncOpenAI) -> None:
    first = await client.responses.create(model="tiny", input="Hello", max_output_tokens=3, temperature=0)
    second = await client.responses.create(
        model="tiny", input="And then?", previous_response_id=first.id, max_output_tokens=3, temperature=0
    )
    assert second.previous_response_id == first.id
    items = [each async for each in client.responses.input_items.list(second.id, order="asc")]
    assert [each.role for each in items] == ["user", "assistant", "user"]  # type: ignore[union-attr]


class Pump(BaseModel):
    """What the model is to fill in."""

    name: str
    power: int


def client_of(box: Box) -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(base_url=f"{box.url}/v1", api_key="any", max_retries=0, timeout=60)


async def test_an_answer_is_parsed_whole_and_streamed(box: ScriptedBox) -> None:
    box.models.script = lambda _: say('{"name": "P1", ', '"power": 7}')
    async with client_of(box) as client:
        whole = await client.responses.parse(model="tiny", input="Which?", text_format=Pump)
        assert whole.output_parsed == Pump(name="P1", power=7)
        async with client.responses.stream(model="tiny", input="Which?", text_format=Pump) as stream:
            final = await stream.get_final_response()
        assert final.output_parsed == Pump(name="P1", power=7)
    grammar = box.models.requests[0].sampling.grammar
    assert grammar is not None
    assert grammar.kind == "json_schema"


async def test_a_background_stream_is_taken_up_and_another_cancelled(box: ScriptedBox) -> None:
    gate = asyncio.Event()
    box.models.script = lambda _: [*say("Hel")[:1], gate, *say("lo")]
    async with client_of(box) as client:
        stream = await client.responses.create(model="tiny", input="x", background=True, stream=True)
        seen = [await anext(stream) for _ in range(5)]
        await stream.close()
        assert seen[0].type == "response.created"
        gate.set()
        rest = await client.responses.retrieve(
            seen[0].response.id, stream=True, starting_after=seen[-1].sequence_number
        )
        events = [each async for each in rest]
        assert [each.sequence_number for each in events][:1] == [seen[-1].sequence_number + 1]
        assert events[-1].type == "response.completed"
        assert events[-1].response.output_text == "Hello"
        box.models.script = lambda _: [asyncio.Event(), *say("never")]
        begun = await client.responses.create(model="tiny", input="x", background=True)
        assert (await client.responses.cancel(begun.id)).status == "cancelled"
