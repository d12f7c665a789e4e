"""Tools in `POST /v1/chat/completions`: what reaches the serving floor, and calls on the wire."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from appliance.core.tools import Tool, ToolCallDelta, ToolChoice
from appliance.core.types import Delta, FinishReason, TokenLogprob
from tests.api.boxes import ScriptedBox, events, real_box, scripted_box

pytestmark = pytest.mark.anyio

SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
WEATHER = {"type": "function", "function": {"name": "weather", "description": "Tells it.", "parameters": SCHEMA}}
CLOCK = {"type": "function", "function": {"name": "clock", "strict": True}}
TOOLS = (Tool("weather", "Tells it.", SCHEMA), Tool("clock", "", {}, strict=True))

CALLS = [
    Delta(0, "Let me look.", 3),
    Delta(0, "", 1, tool_calls=(ToolCallDelta(0, "", "call_a", "weather"),)),
    Delta(0, "", 1, tool_calls=(ToolCallDelta(0, '{"city": '),)),
    Delta(0, "", 2, tool_calls=(ToolCallDelta(0, '"Graz"}'), ToolCallDelta(1, "{}", "call_b", "clock"))),
    Delta(0, "", 1, finish_reason=FinishReason.TOOL_CALLS),
]


def by_name(name: str) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name}}


@pytest.mark.parametrize(
    ("choice", "wanted"),
    [
        ({}, ToolChoice("auto")),
        ({"tool_choice": None}, ToolChoice("auto")),
        ({"tool_choice": "auto"}, ToolChoice("auto")),
        ({"tool_choice": "none"}, ToolChoice("none")),
        ({"tool_choice": "required"}, ToolChoice("required")),
        ({"tool_choice": by_name("clock")}, ToolChoice("required", ("clock",))),
        (
            {"tool_choice": {"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": [by_name("clock")]}}},
            ToolChoice("auto", ("clock",)),
        ),
        (
            {
                "tool_choice": {
                    "type": "allowed_tools",
                    "allowed_tools": {"mode": "required", "tools": [by_name("clock"), by_name("clock")]},
                }
            },
            ToolChoice("required", ("clock",)),
        ),
    ],
)
async def test_tools_and_the_choice_reach_the_serving_floor(
    box: ScriptedBox, choice: dict[str, Any], wanted: ToolChoice
) -> None:
    assert (await box.chat(tools=[WEATHER, CLOCK], **choice)).status == 200
    (request,) = box.models.requests
    assert (request.tools, request.tool_choice, request.parallel_tool_calls) == (TOOLS, wanted, True)


@pytest.mark.parametrize(("given", "parallel"), [(None, True), (True, True), (False, False)])
async def test_calls_are_parallel_unless_refused(box: ScriptedBox, given: bool | None, parallel: bool) -> None:
    assert (await box.chat(tools=[CLOCK], parallel_tool_calls=given)).status == 200
    assert box.models.requests[0].parallel_tool_calls is parallel


@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        ({"tools": [CLOCK, WEATHER, CLOCK]}, "tools[2].function.name", "clock"),
        ({"tools": [WEATHER], "tool_choice": by_name("clock")}, "tool_choice", "clock"),
        ({"tool_choice": "required"}, "tool_choice", "no tools"),
        ({"tool_choice": by_name("clock")}, "tool_choice", "no tools"),
        (
            {"messages": [{"role": "tool", "content": "x", "tool_call_id": "call_1"}]},
            "messages[0].tool_call_id",
            "call_1",
        ),
        ({"messages": [{"role": "assistant", "content": None}]}, "messages[0].content", "neither text nor"),
        ({"messages": [{"role": "assistant", "tool_calls": []}]}, "messages[0].content", "neither text nor"),
        (
            {
                "messages": [
                    {
                        "role": "assistant",
                        "tool_calls": [{"id": "1", "function": {"name": "clock", "arguments": "{}"}}] * 2,
                    }
                ]
            },
            "messages[0].tool_calls",
            "one id",
        ),
    ],
)
async def test_what_cannot_be_is_refused_before_anything_is_generated(
    box: ScriptedBox, fields: dict[str, Any], param: str, words: str
) -> None:
    reply = await box.chat(**fields)
    error = reply.json()["error"]
    assert (reply.status, error["param"]) == (400, param)
    assert words in error["message"]
    assert box.models.requests == []


async def test_calls_and_descriptions_count_as_prompt(tmp_path: Path) -> None:
    long = "x" * 60
    called = {"id": "1", "function": {"name": "clock", "arguments": f'{{"a": "{long}"}}'}}
    async with scripted_box(tmp_path, max_prompt_characters=50) as small:
        for fields in (
            {"messages": [{"role": "assistant", "tool_calls": [called]}]},
            {"tools": [{"type": "function", "function": {"name": "f", "description": long}}]},
        ):
            reply = await small.chat(**fields)
            assert (reply.status, reply.json()["error"]["code"]) == (400, "prompt_too_long")


async def test_whole_calls(box: ScriptedBox) -> None:
    box.models.script = lambda _: CALLS
    (choice,) = (await box.chat(tools=[WEATHER, CLOCK])).json()["choices"]
    assert choice["finish_reason"] == "tool_calls"
    assert choice["message"] == {
        "content": "Let me look.",
        "role": "assistant",
        "refusal": None,
        "tool_calls": [
            {"id": "call_a", "function": {"name": "weather", "arguments": '{"city": "Graz"}'}, "type": "function"},
            {"id": "call_b", "function": {"name": "clock", "arguments": "{}"}, "type": "function"},
        ],
    }


async def test_an_answer_of_calls_alone_has_no_content(box: ScriptedBox) -> None:
    box.models.script = lambda _: CALLS[1:]
    (choice,) = (await box.chat(tools=[WEATHER, CLOCK])).json()["choices"]
    assert choice["message"]["content"] is None


async def test_an_answer_without_calls_does_not_speak_of_them(box: ScriptedBox) -> None:
    (choice,) = (await box.chat(tools=[WEATHER])).json()["choices"]
    assert "tool_calls" not in choice["message"]


async def test_a_stream_of_calls_is_as_openais(box: ScriptedBox) -> None:
    box.models.script = lambda _: CALLS
    reply = await box.chat(tools=[WEATHER, CLOCK], stream=True)
    chunks = events(reply.body)
    assert chunks.pop() == "[DONE]"
    choices = [chunk["choices"][0] for chunk in chunks]
    deltas = merged_text([each["delta"] for each in choices])
    assert deltas == [
        {"role": "assistant", "content": ""},
        {"content": "Let me look."},
        {
            "tool_calls": [
                {"index": 0, "function": {"arguments": "", "name": "weather"}, "id": "call_a", "type": "function"}
            ]
        },
        {"tool_calls": [{"index": 0, "function": {"arguments": '{"city": "Graz"}'}}]},
        {
            "tool_calls": [
                {"index": 1, "function": {"arguments": "", "name": "clock"}, "id": "call_b", "type": "function"}
            ]
        },
        {"tool_calls": [{"index": 1, "function": {"arguments": "{}"}}]},
        {},
    ]
    assert [each["finish_reason"] for each in choices if each["finish_reason"]] == ["tool_calls"]


def merged_text(deltas: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the deltas with neighbours joined that gain the same call's arguments: how they are cut is not told."""
    joined: list[dict[str, Any]] = []
    for delta in deltas:
        calls, before = delta.get("tool_calls"), joined[-1].get("tool_calls") if joined else None
        if calls and before and "id" not in calls[0] and "id" not in before[0]:
            before[0]["function"]["arguments"] += calls[0]["function"]["arguments"]
        else:
            joined.append(delta)
    return joined


async def test_a_stream_that_begins_with_a_call_has_null_content(box: ScriptedBox) -> None:
    box.models.script = lambda _: CALLS[1:]
    chunks = events((await box.chat(tools=[WEATHER, CLOCK], stream=True)).body)
    assert chunks[0]["choices"][0]["delta"] == {"role": "assistant", "content": None}


async def test_calls_of_several_choices_keep_apart(box: ScriptedBox) -> None:
    def both(_: object) -> list[Delta]:
        call = (ToolCallDelta(0, "{}", "call_x", "clock"),)
        return [Delta(index, "", 1, (), FinishReason.TOOL_CALLS, call) for index in (0, 1)]

    box.models.script = both
    choices = (await box.chat(tools=[CLOCK], n=2)).json()["choices"]
    assert [each["message"]["tool_calls"][0]["function"]["name"] for each in choices] == ["clock", "clock"]


async def test_a_call_that_broke_off_is_told_as_far_as_it_came(box: ScriptedBox) -> None:
    box.models.script = lambda _: [*CALLS[1:3], Delta(0, "", 0, finish_reason=FinishReason.LENGTH)]
    (choice,) = (await box.chat(tools=[WEATHER])).json()["choices"]
    assert choice["finish_reason"] == "length"
    assert choice["message"]["tool_calls"][0]["function"]["arguments"] == '{"city": '


async def test_log_probabilities_are_those_of_the_text(box: ScriptedBox) -> None:
    logprob = TokenLogprob(5, b"Hm", -0.5)
    box.models.script = lambda _: [Delta(0, "Hm", 1, (logprob,)), *CALLS[1:]]
    (choice,) = (await box.chat(tools=[WEATHER, CLOCK], logprobs=True)).json()["choices"]
    assert [each["token"] for each in choice["logprobs"]["content"]] == ["Hm"]


async def test_a_schema_of_a_megabyte_and_one_without_bottom_are_refused(tmp_path: Path, tiny_model_path: Path) -> None:
    huge = {"type": "object", "properties": {f"p{each}": {"type": "string"} for each in range(40_000)}}
    deep: dict[str, Any] = {}
    for _ in range(200):
        deep = {"type": "object", "properties": {"a": deep}}
    async with real_box(tmp_path, tiny_model_path) as box:
        for schema in (huge, deep):
            tool = {"type": "function", "function": {"name": "f", "parameters": schema}}
            reply = await box.chat(tools=[tool], max_tokens=1)
            error = reply.json()["error"]
            assert (reply.status, error["param"], error["code"]) == (400, "tools", "invalid_grammar")
        assert (await box.chat(max_tokens=1)).status == 200
