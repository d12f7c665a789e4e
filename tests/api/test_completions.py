"""`POST /v1/completions`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from appliance.core.types import Delta, FinishReason, GenerationRequest, TokenLogprob
from tests.api.boxes import ScriptedBox, events, scripted_box
from tests.api.scripted import say

pytestmark = pytest.mark.anyio


@pytest.mark.parametrize(
    ("prompt", "prompts"),
    [
        ("Hello", ["Hello"]),
        (["Hello"], ["Hello"]),
        (["One", "二"], ["One", "二"]),
        ([1, 2, 3], [(1, 2, 3)]),
        ([[1, 2], [3]], [(1, 2), (3,)]),
    ],
)
async def test_every_form_of_a_prompt(box: ScriptedBox, prompt: Any, prompts: list[Any]) -> None:
    reply = await box.complete(prompt, n=2)
    assert [each.prompt for each in box.models.requests] == prompts
    choices = reply.json()["choices"]
    assert [each["index"] for each in choices] == list(range(2 * len(prompts)))
    assert {each["text"] for each in choices} == {"Hello, 世界!"}


@pytest.mark.parametrize(
    ("prompt", "param"),
    [
        ("", "prompt"),
        ([], "prompt"),
        ([""], "prompt[0]"),
        ([[]], "prompt[0]"),
        (["One", 2], "prompt"),
        ([[1], "Two"], "prompt"),
        ([1, [2]], "prompt"),
        ([1.5], "prompt[0]"),
        ([-1], "prompt[0]"),
        ([2**31], "prompt[0]"),
        ([True], "prompt[0]"),
        (None, "prompt"),
        ({"text": "x"}, "prompt"),
        ("a\0b", "prompt"),
    ],
)
async def test_a_prompt_that_will_not_do_is_refused(box: ScriptedBox, prompt: Any, param: str) -> None:
    reply = await box.complete(prompt)
    assert (reply.status, reply.error["param"], reply.error["code"]) == (400, param, "invalid_value")
    assert box.models.generations == []


async def test_as_many_prompts_as_fit_the_queue_and_no_more(tmp_path: Path) -> None:
    for changes, limit in (({"max_prompts": 3}, 3), ({"queue_size": 2}, 2), ({"queue_size": 0}, 1)):
        async with scripted_box(tmp_path, **changes) as box:
            assert (await box.complete(["x"] * limit)).status == 200
            before = len(box.models.generations)
            reply = await box.complete(["x"] * (limit + 1))
            assert (reply.status, reply.error["param"]) == (400, "prompt")
            assert f"{limit} are allowed" in reply.error["message"]
            assert len(box.models.generations) == before


async def test_sixteen_tokens_unless_more_are_asked_for(box: ScriptedBox) -> None:
    await box.complete()
    await box.complete(max_tokens=99)
    assert [each.sampling.max_tokens for each in box.models.requests] == [16, 99]


@pytest.mark.parametrize(
    ("prompt", "echoes"), [("热泵", ["热泵"]), ([[72, 105], [33]], ["Hi", "!"]), (["a", "b"], ["a", "b"])]
)
async def test_the_prompt_is_echoed_in_front(box: ScriptedBox, prompt: Any, echoes: list[str]) -> None:
    expected = [f"{echo}Hello, 世界!" for echo in echoes for _ in range(2)]
    reply = await box.complete(prompt, echo=True, n=2)
    assert [each["text"] for each in reply.json()["choices"]] == expected
    streamed = [""] * len(expected)
    for chunk in events((await box.complete(prompt, echo=True, n=2, stream=True)).body)[:-1]:
        for choice in chunk["choices"]:
            streamed[choice["index"]] += choice["text"]
    assert streamed == expected


@pytest.mark.parametrize(
    ("fields", "param", "code"),
    [
        ({"echo": True, "logprobs": 1}, "echo", "unsupported_parameter"),
        ({"best_of": 2}, "best_of", "unsupported_parameter"),
        ({"suffix": "tail"}, "suffix", "unsupported_parameter"),
        ({"logprobs": 21}, "logprobs", "invalid_value"),
        ({"logprobs": True}, "logprobs", "invalid_value"),
        ({"messages": []}, "messages", "unknown_parameter"),
        ({"n": 9}, "n", "invalid_value"),
    ],
)
async def test_what_would_change_the_answer_is_refused(
    box: ScriptedBox, fields: dict[str, Any], param: str, code: str
) -> None:
    reply = await box.complete(**fields)
    assert (reply.status, reply.error["param"], reply.error["code"]) == (400, param, code)
    assert box.models.generations == []


async def test_what_changes_nothing_is_accepted(box: ScriptedBox) -> None:
    assert (await box.complete(best_of=1, suffix="", echo=False, user="u", logprobs=None)).status == 200


async def test_log_probabilities_have_the_older_form(box: ScriptedBox) -> None:
    world = "世".encode()
    tokens = [
        TokenLogprob(1, b"Hi ", -0.25, ((1, b"Hi ", -0.25), (9, b"Ho", -1.5))),
        TokenLogprob(2, world[:2], -1.0),
        TokenLogprob(3, world[2:], -2.0),
        TokenLogprob(4, b"!", -0.5),
    ]
    texts = ["Hi ", "", "世", "!"]

    def script(_: GenerationRequest) -> list[Delta]:
        deltas = [Delta(0, text, 1, logprobs=(token,)) for text, token in zip(texts, tokens, strict=True)]
        return [*deltas, Delta(0, "", 0, finish_reason=FinishReason.STOP)]

    box.models.script = script
    logprobs = (await box.complete(logprobs=1)).json()["choices"][0]["logprobs"]
    assert logprobs["tokens"] == ["Hi ", r"bytes:\xe4\xb8", r"bytes:\x96", "!"]
    assert logprobs["token_logprobs"] == [-0.25, -1.0, -2.0, -0.5]
    assert logprobs["text_offset"] == [0, 3, 3, 4]
    assert logprobs["top_logprobs"][0] == {"Hi ": -0.25, "Ho": -1.5}
    streamed: dict[str, list[Any]] = {name: [] for name in logprobs}
    for chunk in events((await box.complete(logprobs=1, stream=True)).body)[:-1]:
        for name, values in (chunk["choices"][0]["logprobs"] or {}).items():
            streamed[name] += values
    assert streamed == logprobs


async def test_the_stream_ends_each_choice_with_an_empty_text(box: ScriptedBox) -> None:
    box.models.script = lambda _: say("Hello", reason=FinishReason.LENGTH)
    chunks = events((await box.complete(stream=True, stream_options={"include_usage": True})).body)
    first, end, last, done = chunks
    assert first["choices"] == [{"index": 0, "text": "Hello", "finish_reason": None, "logprobs": None}]
    assert end["choices"] == [{"index": 0, "text": "", "finish_reason": "length", "logprobs": None}]
    assert first["usage"] is end["usage"] is None
    assert last["choices"] == []
    assert last["usage"]["completion_tokens"] == 1
    assert done == "[DONE]"
    assert {each["object"] for each in chunks[:-1]} == {"text_completion"}
