"""Structured output by the official client, on a real engine with random weights that says anything else by itself."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, Literal

import openai
import pydantic
import pytest
from openai.types.chat import ChatCompletionMessageParam

from tests.api.boxes import Box, real_box
from tests.api.test_sdk import client_of
from tests.tiny_gguf import write_tiny_llama

pytestmark = pytest.mark.anyio

CELLS = 4096
ASK: list[ChatCompletionMessageParam] = [{"role": "user", "content": "Which pump?"}]


class Pump(pydantic.BaseModel):
    """What the model is to fill in; so small that a random model comes to its end."""

    kind: Literal["gear", "vane", "Kreiselpumpe", "水泵"]
    stages: Literal[1, 2, 3]
    running: bool


@pytest.fixture
async def box(tmp_path: Path) -> AsyncIterator[Box]:
    model = write_tiny_llama(tmp_path / "tiny.gguf", context_length=CELLS)
    async with real_box(tmp_path, model, context_cells=CELLS, max_sequences=8) as each:
        yield each


@pytest.fixture
async def client(box: Box) -> AsyncIterator[openai.AsyncOpenAI]:
    async with client_of(box) as each:
        yield each


async def free_text(client: openai.AsyncOpenAI) -> str | None:
    answer = await client.chat.completions.create(
        model="tiny", messages=ASK, temperature=0, max_completion_tokens=40, extra_body={"ignore_eos": True}
    )
    return answer.choices[0].message.content


async def test_both_resources_parse(client: openai.AsyncOpenAI) -> None:
    chat = await client.chat.completions.parse(model="tiny", messages=ASK, response_format=Pump, n=3, seed=1)
    assert len(chat.choices) == 3
    for choice in chat.choices:
        assert choice.finish_reason == "stop"
        assert isinstance(choice.message.parsed, Pump)
    response = await client.responses.parse(model="tiny", input="Which pump?", text_format=Pump)
    assert isinstance(response.output_parsed, Pump)


async def test_a_schema_holds_in_a_stream_of_choices_with_log_probabilities_beside_a_free_answer(
    client: openai.AsyncOpenAI,
) -> None:
    alone = await free_text(client)
    texts, pieces = [""] * 4, [b""] * 4
    ends: dict[int, str] = {}

    async def constrained() -> None:
        stream = await client.chat.completions.create(
            model="tiny",
            messages=ASK,
            n=4,
            seed=3,
            stream=True,
            logprobs=True,
            top_logprobs=2,
            response_format={
                "type": "json_schema",
                "json_schema": {"name": "pump", "schema": openai.lib._pydantic.to_strict_json_schema(Pump)},
            },
        )
        async for chunk in stream:
            for each in chunk.choices:
                texts[each.index] += each.delta.content or ""
                for token in (each.logprobs and each.logprobs.content) or ():
                    assert token.logprob <= 0
                    assert len(token.top_logprobs) == 2
                    pieces[each.index] += bytes(token.bytes or ())
                if each.finish_reason:
                    ends[each.index] = each.finish_reason

    async with asyncio.TaskGroup() as group:
        group.create_task(constrained())
        beside = [group.create_task(free_text(client)) for _ in range(2)]
    assert ends == dict.fromkeys(range(4), "stop")
    for text, told in zip(texts, pieces, strict=True):
        Pump.model_validate_json(text)
        assert told.decode() == text
    assert [each.result() for each in beside] == [alone, alone], "a grammar is its own answer's alone"


LARK = 'start: "pump " NUMBER ("," NUMBER)*\nNUMBER: /[0-9]{1,2}/\n'
GBNF = 'root ::= "pump " number\nnumber ::= [0-9] [0-9]?\n'
ODD = ["a-b c", "50% (of [it])", "x\ty\n#&~", "C:\\pumps", "水泵|Σ", "^$.*+?{}"]


@pytest.mark.parametrize(
    ("given", "pattern"),
    [
        ({"regex": "(on|off): [0-9]{3}"}, "(on|off): [0-9]{3}"),
        ({"grammar": LARK}, "pump [0-9]{1,2}(,[0-9]{1,2})*"),
        ({"grammar": GBNF}, "pump [0-9][0-9]?"),
        ({"choice": ODD}, "|".join(map(re.escape, ODD))),
        (
            {"json": {"type": "array", "items": {"enum": [1, 2]}, "minItems": 2, "maxItems": 2}},
            r"\[\s*[12]\s*,\s*[12]\s*\]",
        ),
    ],
)
async def test_every_extension_holds_in_chat_streamed_and_in_completions(
    client: openai.AsyncOpenAI, given: dict[str, Any], pattern: str
) -> None:
    for seed in range(3):
        extra = {"structured_outputs": given}
        chat = await client.chat.completions.create(
            model="tiny", messages=ASK, seed=seed, stream=True, max_completion_tokens=300, extra_body=extra
        )
        chunks = [each.choices[0] async for each in chat]
        text = "".join(each.delta.content or "" for each in chunks)
        assert chunks[-1].finish_reason == "stop"
        assert re.fullmatch(pattern, text), text
        plain = await client.completions.create(
            model="tiny", prompt="Which?", seed=seed, max_tokens=300, extra_body=extra
        )
        assert plain.choices[0].finish_reason == "stop"
        assert re.fullmatch(pattern, plain.choices[0].text), plain.choices[0].text


def deep(levels: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "string"}
    for _ in range(levels):
        schema = {"type": "array", "items": schema}
    return schema


HOSTILE: list[tuple[dict[str, Any], str]] = [
    ({"type": "array", "items": {}, "contains": {"type": "integer"}}, "contains"),
    ({"type": "array", "uniqueItems": True}, "uniqueItems"),
    ({"not": {"type": "string"}}, '"not"'),
    ({"if": {}, "then": {}}, '"if"'),
    ({"enum": ["x" * 1_000_000]}, "131072 are allowed"),
    (deep(200), "levels deep|within each other"),
]
LOOPS: list[tuple[dict[str, Any], str]] = [
    ({"$ref": "#"}, "No text satisfies"),
    ({"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}}, "No text satisfies"),
]
"""As an optional argument of a tool they are left out, which satisfies the schema."""


def ways(schema: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """Return a request by each way in which the schema of an answer comes in."""
    chat = {"model": "tiny", "messages": ASK}
    answer = {"type": "json_schema", "json_schema": {"name": "a", "schema": schema}}
    text = {"format": {"type": "json_schema", "name": "a", "schema": schema}}
    return [
        ("/v1/chat/completions", {**chat, "response_format": answer}),
        ("/v1/chat/completions", {**chat, "structured_outputs": {"json": schema}}),
        ("/v1/completions", {"model": "tiny", "prompt": "x", "structured_outputs": {"json": schema}}),
        ("/v1/responses", {"model": "tiny", "input": "x", "text": text}),
    ]


def ways_of_tools(schema: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """Return a request by each way in which the schema of a tool's argument comes in."""
    function = {"name": "f", "parameters": {"type": "object", "properties": {"a": schema}}}
    return [
        (
            "/v1/chat/completions",
            {"model": "tiny", "messages": ASK, "tools": [{"type": "function", "function": function}]},
        ),
        ("/v1/responses", {"model": "tiny", "input": "x", "tools": [{"type": "function", **function}]}),
    ]


async def test_a_hostile_schema_is_refused_by_name_wherever_it_comes_in_and_harms_nobody(
    box: Box, client: openai.AsyncOpenAI
) -> None:
    alone = await free_text(client)
    asked = [(words, *each) for schema, words in HOSTILE + LOOPS for each in ways(schema)]
    asked += [(words, *each) for schema, words in HOSTILE for each in ways_of_tools(schema)]
    for words, path, document in asked:
        reply = await box.ask("POST", path, document)
        assert (reply.status, reply.error["code"]) == (400, "invalid_grammar"), (words, path, reply.body[:300])
        assert re.search(words, reply.error["message"]), (path, reply.error)
        assert len(reply.error["message"]) < 1000
    assert await free_text(client) == alone


async def test_a_schema_that_leads_out_of_itself_is_refused_and_nothing_is_fetched(box: Box) -> None:
    asked: list[bytes] = []

    async def note(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        asked.append(await reader.read(1))
        writer.close()

    server = await asyncio.start_server(note, "127.0.0.1", 0)
    async with server:
        here = f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
        for schema in (
            {"$ref": f"http://{here}/schema.json"},
            {"$ref": f"//{here}/schema.json#/$defs/a"},
            {"$id": f"http://{here}/schema.json", "$ref": "other.json"},
            {"$ref": "file:///etc/hostname"},
        ):
            for path, document in (*ways(schema), *ways_of_tools(schema)):
                reply = await box.ask("POST", path, document)
                assert (reply.status, reply.error["code"]) == (400, "invalid_grammar"), (path, reply.body[:300])
                assert "nothing is fetched" in reply.error["message"], (path, reply.error)
        assert not asked
