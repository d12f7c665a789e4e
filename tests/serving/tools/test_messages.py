"""Tools, calls and results as chat templates read them; the templates of the families render them."""

from __future__ import annotations

import json
from typing import Any

import pytest

from appliance.core.errors import InvalidRequestError
from appliance.core.tools import Tool, ToolChoice
from appliance.core.types import ChatMessage, GenerationRequest, SamplingParams
from appliance.serving.prompts import PromptRenderer
from appliance.serving.tools import dialects
from appliance.serving.tools.dialects import ToolStyle, tool_style
from appliance.serving.tools.messages import native_messages, plain_messages, without_system
from appliance.serving.tools.offer import ModelTools
from tests.serving import chat_templates
from tests.serving.tools import templates

WEATHER = Tool("weather", "Tells it.", {"type": "object", "properties": {"city": {"type": "string"}}})
CLOCK = Tool("clock")


def call(call_id: str, name: str, arguments: str) -> dict[str, Any]:
    return {"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}}


TALK = (
    ChatMessage("user", "What is it like in 成都?"),
    ChatMessage(
        "assistant",
        "I look.",
        {"tool_calls": [call("call_1", "weather", '{"city": "成都"}'), call("call_2", "clock", "")]},
    ),
    ChatMessage("tool", "Rain.", {"tool_call_id": "call_1"}),
    ChatMessage("tool", "12:00", {"tool_call_id": "call_2"}),
    ChatMessage("assistant", "It rains at noon."),
    ChatMessage("user", "Thanks"),
)
REQUEST = GenerationRequest("m", TALK, SamplingParams(), tools=(WEATHER, CLOCK))


async def rendered(template: str, request: GenerationRequest = REQUEST) -> str:
    messages, extra = ModelTools(tool_style(template)).conversation(request, [*request.prompt])
    renderer = PromptRenderer(template, bos_token="<s>", eos_token="</s>", timeout_s=20, max_bytes=100_000)
    try:
        return await renderer.render(messages, extra=extra)
    finally:
        await renderer.close()


@pytest.mark.anyio
async def test_qwen() -> None:
    prompt = await rendered(templates.QWEN)
    tools = [json.loads(line) for line in prompt.split("<tools>\n")[1].split("\n</tools>")[0].splitlines()]
    assert tools == [
        {
            "type": "function",
            "function": {"name": "weather", "description": "Tells it.", "parameters": WEATHER.parameters},
        },
        {
            "type": "function",
            "function": {"name": "clock", "description": "", "parameters": {"type": "object", "properties": {}}},
        },
    ]
    assert (
        '<|im_start|>assistant\nI look.\n<tool_call>\n{"name": "weather", "arguments": {"city": "成都"}}\n'
        "</tool_call>\n"
        '<tool_call>\n{"name": "clock", "arguments": {}}\n</tool_call><|im_end|>\n'
        "<|im_start|>user\n<tool_response>\nRain.\n</tool_response>\n"
        "<tool_response>\n12:00\n</tool_response><|im_end|>\n"
    ) in prompt


@pytest.mark.anyio
async def test_llama_3_gets_one_call_a_message_each_before_its_result() -> None:
    prompt = await rendered(templates.LLAMA_3)
    assert '"description": "Tells it."' in prompt
    first, second = '{"name": "weather", "parameters": {"city": "成都"}}', '{"name": "clock", "parameters": {}}'
    places = [prompt.index(each) for each in (first, '"Rain."', second, '"12:00"', "It rains at noon.", "Thanks")]
    assert places == sorted(places)


@pytest.mark.anyio
async def test_mistral_gets_ids_of_nine_letters_or_digits_that_match() -> None:
    prompt = await rendered(templates.MISTRAL)
    calls = json.loads(prompt.split("[TOOL_CALLS]")[1].split("</s>")[0])
    ids = [each.pop("id") for each in calls]
    assert calls == [{"name": "weather", "arguments": {"city": "成都"}}, {"name": "clock", "arguments": {}}]
    assert all(len(each) == 9 and each.isalnum() for each in ids)
    assert len(set(ids)) == 2
    results = [part.split("[/TOOL_RESULTS]")[0] for part in prompt.split("[TOOL_RESULTS]")[1:]]
    assert [f'"call_id": "{each}"' in result for each, result in zip(ids, results, strict=True)] == [True, True]


@pytest.mark.parametrize(
    ("given", "stays"), [("abcDEF123", True), ("abcDEF12", False), ("abc-EF123", False), ("ébcDEF123", False)]
)
def test_an_id_that_suits_mistral_stays(given: str, stays: bool) -> None:
    message = ChatMessage("tool", "x", {"tool_call_id": given})
    (native,) = native_messages([message], dialects.MISTRAL)
    assert (native.extra["tool_call_id"] == given) is stays
    assert native_messages([message], dialects.MISTRAL) == [native]
    assert native_messages([message], dialects.HERMES) == [message]


@pytest.mark.anyio
async def test_a_model_that_knows_no_tools_is_told_in_the_system_message() -> None:
    prompt = await rendered(chat_templates.CHATML)
    assert prompt.startswith("<|im_start|>system\n# Tools\n")
    assert '{"type": "function", "function": {"name": "weather", "description": "Tells it."' in prompt
    assert (
        '<tool_call>\n{"name": <function-name>, "arguments": <arguments-as-json-object>}\n</tool_call><|im_end|>'
        in prompt
    )
    assert (
        '<|im_start|>assistant\nI look.\n<tool_call>\n{"name": "weather", "arguments": {"city": "成都"}}\n'
        "</tool_call>\n"
        '<tool_call>\n{"name": "clock", "arguments": {}}\n</tool_call><|im_end|>\n'
        "<|im_start|>user\n<tool_response>\nRain.\n</tool_response>\n"
        "<tool_response>\n12:00\n</tool_response><|im_end|>\n"
    ) in prompt


@pytest.mark.anyio
async def test_gemma_is_told_as_googles_guide_says() -> None:
    messages, _ = ModelTools(tool_style(chat_templates.GEMMA)).conversation(REQUEST, TALK)
    first, user, assistant, results, *_ = messages
    assert first.role == "system"
    assert first.content.startswith("You have access to functions.")
    assert json.loads(first.content.splitlines()[-1])[1]["name"] == "clock"
    assert user == TALK[0]
    assert assistant.content == (
        'I look.\n{"name": "weather", "parameters": {"city": "成都"}}\n{"name": "clock", "parameters": {}}'
    )
    assert results.role == "user"


def test_instructions_go_behind_the_operators_own() -> None:
    style = ToolStyle(dialects.HERMES, native=False)
    for role in ("system", "developer"):
        own = ChatMessage(role, "Be brief.")
        first, user = plain_messages([own, TALK[0]], style, [CLOCK], ToolChoice())
        assert (first.role, user) == (role, TALK[0])
        assert first.content.startswith("Be brief.\n\n# Tools\n")


def test_a_question_behind_a_result_joins_its_turn() -> None:
    style = ToolStyle(dialects.HERMES, native=False)
    messages = [TALK[0], TALK[1], TALK[2], ChatMessage("user", "And?", {"name": "Li"}), ChatMessage("assistant", "So.")]
    told = plain_messages(messages, style, [], ToolChoice())
    assert [each.role for each in told] == ["user", "assistant", "user", "assistant"]
    assert told[2] == ChatMessage("user", "<tool_response>\nRain.\n</tool_response>\nAnd?")


def test_a_call_without_text_is_all_there_is() -> None:
    style = ToolStyle(dialects.MISTRAL, native=False)
    calls = ChatMessage("assistant", "", {"tool_calls": [call("1", "clock", "{}")], "name": "Bo"})
    (told,) = plain_messages([calls], style, [], ToolChoice())
    assert told == ChatMessage("assistant", '[TOOL_CALLS][{"name": "clock", "arguments": {}}]', {"name": "Bo"})


def test_a_call_without_a_result_stands_alone_for_llama_3() -> None:
    calls = ChatMessage("assistant", "", {"tool_calls": [call("1", "clock", "{}"), call("2", "clock", "{}")]})
    told = native_messages([calls, ChatMessage("tool", "12:00", {"tool_call_id": "2"})], dialects.LLAMA_3)
    assert [each.role for each in told] == ["assistant", "assistant", "tool"]


@pytest.mark.parametrize("arguments", ['{"city": ', "[]", "7", '"x"', "[" * 100_000])
def test_an_earlier_call_that_broke_off_is_refused(arguments: str) -> None:
    broken = ChatMessage("assistant", "", {"tool_calls": [call("1", "weather", arguments)]})
    for style in (ToolStyle(dialects.HERMES, native=True), ToolStyle(dialects.HERMES, native=False)):
        with pytest.raises(InvalidRequestError, match="weather") as refusal:
            ModelTools(style).conversation(REQUEST, [broken])
        assert refusal.value.param == "messages"


def test_where_there_is_no_system_role_the_user_is_told() -> None:
    system = ChatMessage("system", "Tools.")
    assert without_system([system, *TALK])[0] == ChatMessage("user", f"Tools.\n\n{TALK[0].content}")
    assert without_system([system, TALK[4], TALK[5]])[1] == ChatMessage("user", "Tools.\n\nThanks")
    assert without_system([system, TALK[4]]) == [ChatMessage("user", "Tools."), TALK[4]]
