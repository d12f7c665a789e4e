"""Tool calls on real engines with random weights: whatever the model wants to say, its calls satisfy the schemas."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest

from appliance.core.tools import Tool, ToolChoice
from appliance.core.types import ChatMessage, FinishReason, GenerationRequest, SamplingParams
from tests.deltas import deltas_of
from tests.serving.conftest import Box, serving
from tests.tiny_gguf import write_tiny_llama

pytestmark = pytest.mark.anyio


@pytest.fixture
def roomy(box: Box) -> Box:
    """A box whose model has room for tools: its vocabulary makes many tokens of them."""
    path = write_tiny_llama(box.folder / "roomy.gguf", context_length=4096, seed=1)
    box.add_file("roomy", path)
    box.settings = replace(box.settings, context_cells=4096)
    return box


USER = (ChatMessage("user", "hello there"),)
WEATHER = Tool(
    "get_weather",
    "Tells the weather.",
    {
        "type": "object",
        "properties": {"city": {"enum": ["Wien", "成都"]}, "days": {"type": "integer", "minimum": 1, "maximum": 7}},
        "required": ["city", "days"],
    },
)
CLOCK = Tool("clock")
REQUIRED = GenerationRequest(
    "roomy",
    USER,
    SamplingParams(temperature=1.0, seed=1, max_tokens=200),
    tools=(WEATHER, CLOCK),
    tool_choice=ToolChoice("required"),
    parallel_tool_calls=False,
)


async def answer(box: Box, request: GenerationRequest) -> tuple[str, list[dict[str, Any]], FinishReason | None]:
    async with serving(box) as floor:
        return await said(floor, request)


async def said(floor: Any, request: GenerationRequest) -> tuple[str, list[dict[str, Any]], FinishReason | None]:
    text, calls, reason = "", [], None
    async for delta in deltas_of(await floor.text.generate(request)):
        text += delta.text
        reason = delta.finish_reason
        for each in delta.tool_calls:
            if each.name:
                assert each.index == len(calls)
                calls.append({"id": each.id, "name": each.name, "arguments": ""})
            calls[each.index]["arguments"] += each.arguments
    return text, calls, reason


async def test_a_random_model_makes_a_valid_call_when_it_must(roomy: Box) -> None:
    async with serving(roomy) as floor:
        for seed in range(4):
            request = replace(REQUIRED, sampling=replace(REQUIRED.sampling, seed=seed))
            text, calls, reason = await said(floor, request)
            print(text, calls, reason)
            assert (text, reason) == ("", FinishReason.TOOL_CALLS)
            [call] = calls
            arguments = json.loads(call["arguments"])
            if call["name"] == "clock":
                assert arguments == {}
            else:
                assert arguments["city"] in ("Wien", "成都")
                assert 1 <= arguments["days"] <= 7
