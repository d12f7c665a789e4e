"""What the grammars allow, by llguidance itself."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

import pytest
from llguidance import LLMatcher, LLTokenizer

from appliance.core.errors import InvalidRequestError
from appliance.core.structured import Grammar
from appliance.core.tools import Tool
from appliance.serving.schemas import MOST_SCHEMA_BYTES
from appliance.serving.tools import dialects
from appliance.serving.tools.dialects import Dialect
from appliance.serving.tools.grammar import call_grammar

BYTES = LLTokenizer("byte")
SPECIAL = (256, 257)
"""Tokens of it that stand for no text."""
WEATHER = Tool(
    "get_weather",
    "",
    {"properties": {"city": {"type": "string"}, "days": {"type": "integer"}}, "required": ["city"]},
)
CLOCK = Tool("clock")
BOTH = (WEATHER, CLOCK)
ALL = [value for value in vars(dialects).values() if isinstance(value, Dialect)]


def allows(grammar: Grammar, answer: str, tokens: Mapping[str, int]) -> bool:
    """Return whether an answer may be so, and end there."""
    assert (grammar.kind, grammar.param) == ("lark", "tools")
    matcher = LLMatcher(BYTES, LLMatcher.grammar_from_lark(grammar.text), log_level=0)
    assert not matcher.is_error(), matcher.get_error()
    marks = "|".join(map(re.escape, tokens)) or "(?!)"
    for part in re.split(f"({marks})", answer):
        ids = [tokens[part]] if part in tokens else list(part.encode())
        if matcher.try_consume_tokens(ids) < len(ids):
            return False
    return bool(matcher.is_accepting())


def begins(grammar: Grammar, answer: str) -> bool:
    """Return whether an answer may begin so."""
    matcher = LLMatcher(BYTES, LLMatcher.grammar_from_lark(grammar.text), log_level=0)
    return int(matcher.try_consume_tokens(list(answer.encode()))) == len(answer.encode())


def written(dialect: Dialect, *calls: tuple[str, str], start: int = 0) -> str:
    return dialect.start[start] + dialect.between.join(dialect.call(*each) for each in calls) + dialect.end


def tokens_of(dialect: Dialect, control: bool) -> dict[str, int]:
    return dict(zip(dialect.marks, SPECIAL, strict=False)) if control else {}


GRAZ = ("get_weather", '{"city": "Graz", "days": 2}')
NOW = ("clock", "{}")


@pytest.mark.parametrize("control", [False, True])
@pytest.mark.parametrize("required", [False, True])
@pytest.mark.parametrize("dialect", ALL, ids=lambda each: each.name)
def test_calls_of_every_dialect(dialect: Dialect, required: bool, control: bool) -> None:
    tokens = tokens_of(dialect, control)
    grammar = call_grammar(dialect, BOTH, required=required, parallel=True, tokens=tokens)
    for start in range(len(dialect.start)):
        assert allows(grammar, written(dialect, GRAZ, start=start), tokens)
        assert allows(grammar, written(dialect, GRAZ, NOW, GRAZ, start=start), tokens)
    single = call_grammar(dialect, BOTH, required=required, parallel=False, tokens=tokens)
    assert allows(single, written(dialect, NOW), tokens)
    assert not allows(single, written(dialect, GRAZ, NOW), tokens)
    for wrong in (("rm", "{}"), ("get_weather", "{}"), ("clock", '{"a": 1}'), ("get_weather", '{"city": 7}')):
        assert not allows(grammar, written(dialect, wrong), tokens)


@pytest.mark.parametrize("control", [False, True])
@pytest.mark.parametrize("dialect", ALL, ids=lambda each: each.name)
def test_text_is_free_unless_a_call_is_required(dialect: Dialect, control: bool) -> None:
    tokens = tokens_of(dialect, control)
    free = call_grammar(dialect, BOTH, required=False, parallel=True, tokens=tokens)
    bound = call_grammar(dialect, BOTH, required=True, parallel=True, tokens=tokens)
    for text in ("", "Grüß Gott!\nA <b> [c] {d}, 3 < 4.", "  \n", "x" * 500):
        assert allows(free, text, tokens)
        assert not allows(bound, text, tokens)
    calls = written(dialect, GRAZ)
    assert allows(free, f"Let me see.\n{calls}", tokens)  # a call where marks tell it, else text
    assert not allows(bound, f"Let me see.\n{calls}", tokens)


@pytest.mark.parametrize("control", [False, True])
@pytest.mark.parametrize("dialect", [each for each in ALL if each.is_marked], ids=lambda each: each.name)
def test_behind_a_mark_there_is_nothing_but_a_call(dialect: Dialect, control: bool) -> None:
    tokens = tokens_of(dialect, control)
    grammar = call_grammar(dialect, BOTH, required=False, parallel=True, tokens=tokens)
    assert not allows(grammar, f"Look: {dialect.marks[0]} and so on", tokens)
    assert not allows(grammar, f"Look: {written(dialect, ('rm', '{}'))}", tokens)


def test_a_bare_brace_can_only_begin_a_call() -> None:
    grammar = call_grammar(dialects.LLAMA_3, BOTH, required=False, parallel=True, tokens={})
    assert begins(grammar, '{"name": "get_w')
    assert not begins(grammar, '{"answer')
    assert not begins(grammar, '\n {"answer')
    assert begins(grammar, 'So {"answer')


def test_references_hold_within_each_tools_schema() -> None:
    def tool(name: str, kind: str) -> Tool:
        return Tool(
            name,
            "",
            {
                "properties": {"x": {"$ref": "#/$defs/thing"}},
                "required": ["x"],
                "$defs": {"thing": {"type": kind}},
            },
        )

    grammar = call_grammar(
        dialects.HERMES, (tool("a", "integer"), tool("b", "boolean")), required=True, parallel=False, tokens={}
    )
    assert allows(grammar, written(dialects.HERMES, ("a", '{"x": 1}')), {})
    assert allows(grammar, written(dialects.HERMES, ("b", '{"x": true}')), {})
    assert not allows(grammar, written(dialects.HERMES, ("a", '{"x": true}')), {})


@pytest.mark.parametrize("schema", [{"type": "object"}, {"properties": {"a": {"const": 1}}, "required": ["a"]}, True])
def test_an_answer_that_is_no_call_may_be_held_to_json(schema: Any) -> None:
    text = Grammar("json_schema", json.dumps(schema))
    grammar = call_grammar(dialects.HERMES, BOTH, required=False, parallel=True, tokens={}, text=text)
    assert allows(grammar, '{"a": 1}', {})
    assert allows(grammar, written(dialects.HERMES, NOW), {})
    assert not allows(grammar, "Hello", {})


def test_any_json_object_or_a_call() -> None:
    text = Grammar("json_object")
    grammar = call_grammar(
        dialects.MISTRAL, BOTH, required=False, parallel=True, tokens={"[TOOL_CALLS]": 256}, text=text
    )
    assert allows(grammar, '{"any": ["thing"]}', {})
    assert allows(grammar, written(dialects.MISTRAL, NOW), {"[TOOL_CALLS]": 256})
    assert not allows(grammar, "Hello", {})


def test_a_required_call_leaves_no_text_to_hold() -> None:
    grammar = call_grammar(
        dialects.LLAMA_3, BOTH, required=True, parallel=True, tokens={}, text=Grammar("regex", "never")
    )
    assert allows(grammar, written(dialects.LLAMA_3, NOW), {})


@pytest.mark.parametrize(
    ("dialect", "text", "words"),
    [
        (dialects.LLAMA_3, Grammar("json_object"), "plain JSON"),
        (dialects.HERMES, Grammar("regex", "a+", "grammar"), "another grammar"),
    ],
)
def test_grammars_that_cannot_stand_together_are_refused(dialect: Dialect, text: Grammar, words: str) -> None:
    with pytest.raises(InvalidRequestError, match=words) as refusal:
        call_grammar(dialect, BOTH, required=False, parallel=True, tokens={}, text=text)
    assert refusal.value.param == text.param


def test_schemas_are_bounded_together() -> None:
    half = Tool("a", "", {"properties": {"x": {"description": "d" * (MOST_SCHEMA_BYTES // 2)}}})
    call_grammar(dialects.HERMES, [half, CLOCK], required=True, parallel=True, tokens={})
    with pytest.raises(InvalidRequestError, match=str(MOST_SCHEMA_BYTES)):
        call_grammar(dialects.HERMES, [half, half, CLOCK], required=True, parallel=True, tokens={})
