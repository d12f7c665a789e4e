"""From bytes to a typed request, or to an error that shows the place."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from typing import Any, get_type_hints

import msgspec
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from openai.types import completion_create_params as text_params
from openai.types.chat import completion_create_params as chat_params

from appliance.api.openai.chat import ChatCompletionRequest
from appliance.api.openai.completions import CompletionRequest
from appliance.api.openai.messages import AssistantMessage
from appliance.api.openai.tokenize import TokenizeTextRequest
from appliance.core.errors import InvalidRequestError
from appliance.web.wire import convert, decode_json, ignored_fields, refused_fields

FUNCTION = {"type": "function", "function": {"name": "f"}}
CHAT = {"model": "tiny", "messages": [{"role": "user", "content": "Hello"}]}

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)


def refusal(document: Any, request_type: type[msgspec.Struct] = ChatCompletionRequest) -> InvalidRequestError:
    with pytest.raises(InvalidRequestError) as caught:
        convert(document, request_type)
    return caught.value


def error_of(function: Callable[[], object]) -> InvalidRequestError | None:
    """Return the refusal, if there is one; any other error fails the test."""
    try:
        function()
    except InvalidRequestError as error:
        return error
    return None


# JSON


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (b"", "empty"),
        (b" \n", "empty"),
        (b'{"model": "tiny",\n  "messages": oops}', "line 2, column 15 (byte 32)"),
        (b'{"a"', "line 1, column 5 (byte 4)"),
        (b'{"a": 1} x', "Extra data, at line 1, column 10"),
        ('{"热": oops}'.encode(), "line 1, column 7 (byte 8)"),
        (b'{"a": NaN}', "NaN is no JSON number, at line 1, column 7 (byte 6)"),
        (b'{"a": -Infinity}', "-Infinity is no JSON number"),
        (b'{"a": 1e999}', "out of range"),
        (b"1" * 5000, "digits"),
        (b'{"a": "\xff"}', "not UTF-8: byte 0xff, at line 1, column 8 (byte 7)"),
        (b'{"a": "\xed\xa0\x80"}', "not UTF-8"),
        (b'\xef\xbb\xbf{"a": 1}', "BOM"),
        (rb'{"a": "\ud800"}', r"\ud800 is a lone surrogate, at line 1, column 8 (byte 7)"),
        (rb'{"a": "\ud83d\ude00 \udc00"}', r"\udc00 is a lone surrogate"),
        (b"[" * 100_000, "nested too deeply"),
        (b'{"a": [' * 2000 + b"]}" * 2000, "nested too deeply"),
    ],
)
def test_what_is_not_json_is_refused_with_the_place(body: bytes, words: str) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        decode_json(body)
    assert caught.value.code == "invalid_json"
    assert words in str(caught.value)


def test_nesting_of_any_depth_is_refused_if_it_cannot_be_read() -> None:
    for depth in range(900, 1000):
        with pytest.raises(InvalidRequestError):
            decode_json(b"[" * depth + b"NaN")


def test_whole_characters_and_doubled_keys_are_read() -> None:
    assert decode_json(rb'{"a": "\ud83d\ude00 \\ud800", "b": 1, "b": 2}') == {"a": "😀 \\ud800", "b": 2}


@given(st.binary(max_size=200) | st.text(max_size=100).map(str.encode))
@example(b'{"a": "\\ud800\\ud800"}')
def test_no_bytes_bring_down_the_decoder(body: bytes) -> None:
    error = error_of(lambda: msgspec.json.encode(decode_json(body)))
    assert error is None or error.code == "invalid_json"


@given(json_values)
def test_json_is_read_as_it_was_written(document: Any) -> None:
    text = json.dumps(document).encode()
    error = error_of(lambda: decode_json(text))
    # Python writes integers of any size; those that no float can hold are refused as such.
    assert error is None or "range" in str(error) or "digits" in str(error)
    assert error is not None or decode_json(text) == document


# Requests


@given(json_values)
def test_no_document_brings_down_the_check(document: Any) -> None:
    for request_type in (ChatCompletionRequest, CompletionRequest, TokenizeTextRequest):
        error = error_of(partial(convert, document, request_type))
        assert error is None or error.code in ("invalid_value", "unknown_parameter", "unsupported_parameter")


fields = sorted(get_type_hints(ChatCompletionRequest))


@given(st.dictionaries(st.sampled_from(fields), json_values, max_size=4))
def test_one_wrong_field_is_named(extra: dict[str, Any]) -> None:
    error = error_of(lambda: convert({**CHAT, **extra}, ChatCompletionRequest))
    if error is not None:
        assert error.param is not None
        assert any(error.param.startswith(name) for name in extra), error.param


@pytest.mark.parametrize(
    ("changes", "param", "code", "words"),
    [
        ({"temperature": "hot"}, "temperature", "invalid_value", "expected `float | null`, got `str`"),
        ({"temperature": 2.1}, "temperature", "invalid_value", "<= 2"),
        ({"n": 10**30}, "n", "invalid_value", "n:"),
        ({"n": 1.5}, "n", "invalid_value", "got `float`"),
        ({"n": True}, "n", "invalid_value", "got `bool`"),
        ({"max_tokens": 0}, "max_tokens", "invalid_value", ">= 1"),
        ({"messages": []}, "messages", "invalid_value", "length >= 1"),
        ({"messages": "Hello"}, "messages", "invalid_value", "got `str`"),
        (
            {"messages": [{"role": "robot", "content": "x"}]},
            "messages[0].role",
            "invalid_value",
            "the roles are system",
        ),
        ({"messages": [{"role": "user", "content": 7}]}, "messages[0].content", "invalid_value", "got `int`"),
        ({"messages": [{"role": "user"}]}, "messages[0]", "invalid_value", "`content`"),
        ({"messages": [{"content": "x"}]}, "messages[0]", "invalid_value", "`role`"),
        ({"messages": [{"role": "user", "content": []}]}, "messages[0].content", "invalid_value", "length >= 1"),
        ({"messages": [{"role": "user", "content": "a\0b"}]}, "messages[0].content", "invalid_value", "NUL character"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
            "messages[0].content[0].type",
            "unsupported_parameter",
            "image_url",
        ),
        ({"messages": [{"role": "user", "content": None}]}, "messages[0].content", "invalid_value", "needs text"),
        (
            {"messages": [{"role": "assistant", "content": None, "tool_calls": [{"id": "1"}]}]},
            "messages[0].tool_calls[0]",
            "invalid_value",
            "`function`",
        ),
        (
            {"messages": [{"role": "assistant", "content": "x", "function_call": {"name": "f", "arguments": ""}}]},
            "messages[0].function_call",
            "unsupported_parameter",
            "older form",
        ),
        (
            {"messages": [{"role": "assistant", "content": "x", "audio": {"id": "1"}}]},
            "messages[0].audio",
            "unsupported_parameter",
            "audio",
        ),
        ({"messages": [{"role": "user", "content": "x", "mood": 1}]}, "messages[0].mood", "unknown_parameter", "mood"),
        ({"temprature": 1}, "temprature", "unknown_parameter", "Did you mean 'temperature'?"),
        ({"repetition_penalty": 1.1}, "repetition_penalty", "unknown_parameter", "repeat_penalty"),
        ({"qqq": 1}, "qqq", "unknown_parameter", "/openapi.json"),
        ({"tools": [{"type": "function"}]}, "tools[0]", "invalid_value", "`function`"),
        ({"tools": [{"type": "custom", "custom": {}}]}, "tools[0].type", "unsupported_parameter", "are functions"),
        ({"tools": [FUNCTION | {"function": {"name": "a b"}}]}, "tools[0].function.name", "invalid_value", "letters"),
        ({"tools": [FUNCTION | {"function": {"name": "a" * 65}}]}, "tools[0].function.name", "invalid_value", "64"),
        ({"tools": [{"function": {"name": "f"}}]}, "tools[0]", "invalid_value", "`type`"),
        ({"tools": [FUNCTION] * 129}, "tools", "invalid_value", "length <= 128"),
        ({"tool_choice": "maybe"}, "tool_choice", "invalid_value", "maybe"),
        ({"tool_choice": {"type": "custom", "custom": {"name": "f"}}}, "tool_choice.type", "invalid_value", "custom"),
        ({"functions": [{"name": "f"}]}, "functions", "unsupported_parameter", "older form"),
        ({"response_format": {"type": "xml"}}, "response_format.type", "invalid_value", "xml"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "a b"}}},
            "response_format.json_schema.name",
            "invalid_value",
            "regex",
        ),
        ({"modalities": ["text", "audio"]}, "modalities", "unsupported_parameter", "plain text"),
        ({"audio": {"voice": "x"}}, "audio", "unsupported_parameter", "plain text"),
        ({"web_search_options": {}}, "web_search_options", "unsupported_parameter", "no web"),
        ({"logit_bias": {"5": 101}}, "logit_bias", "invalid_value", "<= 100"),
        ({"stop": [""]}, "stop[0]", "invalid_value", "length >= 1"),
        ({"stop": ["x"] * 17}, "stop", "invalid_value", "length <= 16"),
    ],
)
def test_a_wrong_request_is_refused_with_the_path(changes: dict[str, Any], param: str, code: str, words: str) -> None:
    error = refusal({**CHAT, **changes})
    assert (error.param, error.code) == (param, code)
    assert words in str(error)


@pytest.mark.parametrize("document", [None, True, 7, 1.5, "x", []])
def test_what_is_no_object_is_refused(document: Any) -> None:
    assert "must be a JSON object" in str(refusal(document))


def test_a_missing_field_is_named() -> None:
    assert "`messages`" in str(refusal({"model": "tiny"}))


@pytest.mark.parametrize(
    "neutral",
    [
        {"tools": []},
        {"tools": None, "tool_choice": "none", "functions": [], "function_call": "auto"},
        {"response_format": {"type": "text"}, "modalities": ["text"], "audio": None},
        {"user": "u", "metadata": {"a": "b"}, "store": False, "prediction": {"type": "content", "content": "x"}},
        {"parallel_tool_calls": True, "prompt_cache_key": "k", "safety_identifier": "s", "reasoning_effort": "none"},
        {"stop": None, "n": None, "seed": None, "temperature": None, "logprobs": None, "stream": None},
        {"stop": [], "logit_bias": {}},
    ],
)
def test_what_changes_nothing_is_accepted(neutral: dict[str, Any]) -> None:
    assert convert({**CHAT, **neutral}, ChatCompletionRequest)


def test_every_field_of_openai_is_acted_on_ignored_or_refused() -> None:
    assert set(get_type_hints(chat_params.CompletionCreateParamsNonStreaming)) <= set(
        ChatCompletionRequest.__struct_fields__
    )
    assert set(get_type_hints(text_params.CompletionCreateParamsNonStreaming)) <= set(
        CompletionRequest.__struct_fields__
    )


def test_the_table_of_treatments_is_as_documented() -> None:
    assert ignored_fields(ChatCompletionRequest) == {
        "user",
        "metadata",
        "safety_identifier",
        "prompt_cache_key",
        "prompt_cache_options",
        "prediction",
    }
    assert set(refused_fields(ChatCompletionRequest)) == {
        "functions",
        "function_call",
        "modalities",
        "audio",
        "web_search_options",
        "moderation",
        "reasoning_effort",
        "verbosity",
    }
    assert ignored_fields(CompletionRequest) == {"user"}
    assert set(refused_fields(CompletionRequest)) == {"best_of", "suffix"}
    assert set(refused_fields(AssistantMessage)) == {"refusal", "audio", "function_call"}
