"""A tool round trip on the real default model, by the official client."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from openai.types.chat import ChatCompletionMessageParam, ChatCompletionToolParam

from tests.journeys.processes import server_process

pytestmark = [pytest.mark.journey, pytest.mark.timeout(300)]

WEATHER: ChatCompletionToolParam = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Tells the weather of a city.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "maxLength": 40}},
            "required": ["city"],
        },
    },
}
CLOCK: ChatCompletionToolParam = {
    "type": "function",
    "function": {"name": "get_time", "description": "Tells the time."},
}


def test_the_model_calls_a_tool_and_answers_by_its_result(real_data: Path, tmp_path: Path) -> None:
    fields: dict[str, Any] = {"model": "smollm2-135m-instruct", "temperature": 0, "tools": [WEATHER, CLOCK]}
    talk: list[ChatCompletionMessageParam] = [{"role": "user", "content": "What is the weather like in Paris?"}]
    with server_process(real_data, tmp_path) as server:
        server.wait_until_ready()
        with server.client() as client:
            called = client.chat.completions.create(
                messages=talk, tool_choice="required", parallel_tool_calls=False, max_completion_tokens=100, **fields
            ).choices[0]
            assert called.finish_reason == "tool_calls"
            assert called.message.tool_calls is not None
            (call,) = called.message.tool_calls
            assert call.type == "function"
            assert call.function.name == "get_weather"
            assert "Paris" in json.loads(call.function.arguments)["city"]
            talk += [
                called.message.model_dump(exclude_none=True),
                {"role": "tool", "tool_call_id": call.id, "content": "It snows, at -3 degrees."},
            ]
            answer = client.chat.completions.create(
                messages=talk, tool_choice="none", max_completion_tokens=60, **fields
            ).choices[0]
    assert answer.message.tool_calls is None
    assert answer.message.content
    assert "-3" in answer.message.content  # what only the result says
