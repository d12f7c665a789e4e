"""Tools for one request."""

from __future__ import annotations

from dataclasses import replace

import pytest

from appliance.core.errors import InvalidRequestError
from appliance.core.structured import Grammar
from appliance.core.tools import Tool, ToolChoice
from appliance.core.types import ChatMessage, GenerationRequest, SamplingParams
from appliance.serving.tools import dialects
from appliance.serving.tools.dialects import ToolStyle
from appliance.serving.tools.offer import ModelTools, allowed_tools

A, B = Tool("a"), Tool("b")
USER = (ChatMessage("user", "Hello"),)
REQUEST = GenerationRequest("m", USER, SamplingParams(), tools=(A, B))
NATIVE = ModelTools(ToolStyle(dialects.MISTRAL, native=True), {"[TOOL_CALLS]": 5})
PLAIN = ModelTools(ToolStyle(dialects.HERMES, native=False))


def choosing(mode: str, *names: str) -> GenerationRequest:
    return replace(REQUEST, tool_choice=ToolChoice(mode, names))  # type: ignore[arg-type]


@pytest.mark.parametrize("request_", [replace(REQUEST, tools=()), choosing("none")])
@pytest.mark.parametrize("tools", [NATIVE, PLAIN])
def test_what_is_not_offered_is_not_told_of(tools: ModelTools, request_: GenerationRequest) -> None:
    grammar = Grammar("regex", "a+")
    request_ = replace(request_, sampling=SamplingParams(grammar=grammar))
    assert tools.conversation(request_, USER) == (list(USER), {})
    assert tools.sampling(request_) is request_.sampling
    calls = ChatMessage("assistant", "", {"tool_calls": [{"id": "1", "function": {"name": "a", "arguments": "{}"}}]})
    told, extra = tools.conversation(request_, [*USER, calls])
    assert (len(told), extra) == (2, {})


def test_all_tools_are_told_of_whichever_may_be_called() -> None:
    for request in (REQUEST, choosing("required", "b")):
        told, extra = NATIVE.conversation(request, USER)
        assert (told, [each["function"]["name"] for each in extra["tools"]]) == (list(USER), ["a", "b"])
        told, extra = PLAIN.conversation(request, USER)
        assert (told[0].role, extra) == ("system", {})


def test_the_answer_is_held_to_the_tools_that_may_be_called() -> None:
    sampling = NATIVE.sampling(choosing("required", "b"))
    assert sampling.grammar is not None
    assert '"b\\"' in sampling.grammar.text
    assert '"a\\"' not in sampling.grammar.text
    assert "<[5]>" in sampling.grammar.text
    assert sampling.shown_tokens == (5,)
    reader = NATIVE.reader(choosing("auto", "b"), lambda: "call_1")
    assert reader.push('[TOOL_CALLS][{"name": "a", "arguments": {}}]').calls == ()
    assert reader.push('[TOOL_CALLS][{"name": "b", "arguments": {}}]').calls[0].name == "b"


def test_a_tool_that_is_not_offered_cannot_be_chosen() -> None:
    assert allowed_tools(choosing("auto", "b")) == [B]
    with pytest.raises(InvalidRequestError, match="'c'") as refusal:
        allowed_tools(choosing("auto", "c"))
    assert refusal.value.param == "tool_choice"
