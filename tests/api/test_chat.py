"""`POST /v1/chat/completions`: what is acted on, and the exact stream."""

from __future__ import annotations

import asyncio
import re
from pathlib import Path
from typing import Any

import pytest

from appliance.core.errors import InvalidRequestError
from appliance.core.types import ChatMessage, Delta, FinishReason, Priority, SamplingParams, TokenLogprob
from tests.api.boxes import Reply, ScriptedBox, events, post, scripted_box, wire
from tests.api.scripted import say

pytestmark = pytest.mark.anyio

CALL = {"id": "call_1", "type": "function", "function": {"name": "thermometer", "arguments": "{}"}}
CHAT = {"model": "tiny", "messages": [{"role": "user", "content": "Hello"}]}


async def stream(box: ScriptedBox, **fields: Any) -> list[Any]:
    reply = await box.chat(stream=True, **fields)
    assert reply.status == 200
    assert reply.headers["content-type"] == "text/event-stream; charset=utf-8"
    return events(reply.body)


async def test_defaults_are_openais(box: ScriptedBox) -> None:
    await box.chat()
    (request,) = box.models.requests
    assert request.sampling == SamplingParams(temperature=1.0, top_p=1.0, max_tokens=None, top_logprobs=None)
    assert (request.n, request.priority, request.tenant, request.deadline_s) == (1, Priority.DEFAULT, "", 600.0)
    assert request.request_id.startswith("req-")


async def test_every_sampling_field_reaches_the_engine(box: ScriptedBox) -> None:
    reply = await box.chat(
        temperature=0.5,
        top_p=0.9,
        top_k=40,
        min_p=0.05,
        typical_p=0.8,
        repeat_penalty=1.1,
        frequency_penalty=0.25,
        presence_penalty=-0.5,
        repeat_last_n=32,
        logit_bias={"17": -100, "4": 2.5},
        seed=-7,
        stop=["\n", "停"],
        stop_token_ids=[2, 3],
        max_completion_tokens=9,
        logprobs=True,
        top_logprobs=3,
        ignore_eos=True,
        n=3,
        service_tier="flex",
    )
    assert reply.status == 200
    (request,) = box.models.requests
    assert request.sampling == SamplingParams(
        temperature=0.5,
        top_p=0.9,
        top_k=40,
        min_p=0.05,
        typical_p=0.8,
        repeat_penalty=1.1,
        frequency_penalty=0.25,
        presence_penalty=-0.5,
        repeat_last_n=32,
        logit_bias={17: -100.0, 4: 2.5},
        seed=-7,
        stop=("\n", "停"),
        stop_token_ids=(2, 3),
        max_tokens=9,
        top_logprobs=3,
        ignore_eos=True,
    )
    assert request.n == 3
    assert request.priority is Priority.FLEX
    assert reply.json()["service_tier"] == "flex"


@pytest.mark.parametrize(
    ("fields", "sampling"),
    [
        ({"top_p": 0}, {"top_p": 1e-6}),
        ({"stop": "end"}, {"stop": ("end",)}),
        ({"stop": None, "temperature": None}, {}),
        ({"logprobs": True}, {"top_logprobs": 0}),
        ({"logprobs": False}, {}),
        ({"max_tokens": 5}, {"max_tokens": 5}),
        ({"max_tokens": 5, "max_completion_tokens": 5}, {"max_tokens": 5}),
    ],
)
async def test_forms_of_a_field(box: ScriptedBox, fields: dict[str, Any], sampling: dict[str, Any]) -> None:
    assert (await box.chat(**fields)).status == 200
    assert box.models.requests[0].sampling == SamplingParams(**sampling)


@pytest.mark.parametrize(
    ("tier", "used"),
    [("auto", "default"), ("default", "default"), ("flex", "flex"), ("priority", "priority"), ("fast", "priority")],
)
async def test_the_service_tier_is_the_priority(box: ScriptedBox, tier: str, used: str) -> None:
    reply = await box.chat(service_tier=tier)
    assert reply.json()["service_tier"] == used
    assert box.models.requests[0].priority is Priority[used.upper()]


async def test_messages_reach_the_chat_template(box: ScriptedBox) -> None:
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "developer", "content": "Be kind.", "name": "ops"},
        {"role": "user", "content": [{"type": "text", "text": "热泵"}, {"type": "text", "text": "?"}], "name": "Li"},
        {"role": "assistant", "content": "Yes.", "refusal": None, "tool_calls": None, "annotations": []},
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        {"role": "tool", "content": "21 °C", "tool_call_id": "call_1"},
    ]
    reply = await box.ask("POST", "/v1/chat/completions", {"model": "tiny:1", "messages": messages})
    assert reply.status == 200
    assert box.models.requests[0].prompt == (
        ChatMessage("system", "Be brief."),
        ChatMessage("developer", "Be kind.", {"name": "ops"}),
        ChatMessage("user", "热泵\n?", {"name": "Li"}),
        ChatMessage("assistant", "Yes."),
        ChatMessage("assistant", "", {"tool_calls": [CALL]}),
        ChatMessage("tool", "21 °C", {"tool_call_id": "call_1"}),
    )


@pytest.mark.parametrize(
    ("fields", "param", "code"),
    [
        ({"n": 9}, "n", "invalid_value"),
        ({"n": 65}, "n", "invalid_value"),
        ({"max_tokens": 5, "max_completion_tokens": 6}, "max_tokens", "invalid_value"),
        ({"top_logprobs": 1}, "top_logprobs", "invalid_value"),
        ({"top_logprobs": 1, "logprobs": False}, "top_logprobs", "invalid_value"),
        ({"stream_options": {"include_usage": True}}, "stream_options", "invalid_value"),
        ({"stream_options": {}, "stream": False}, "stream_options", "invalid_value"),
        ({"store": True}, "store", "unsupported_parameter"),
        ({"logit_bias": {"x": 1}}, "logit_bias", "invalid_value"),
        ({"logit_bias": {"-1": 1}}, "logit_bias", "invalid_value"),
        ({"logit_bias": {"٣": 1}}, "logit_bias", "invalid_value"),
        ({"logit_bias": {"9" * 30: 1}}, "logit_bias", "invalid_value"),
        ({"stop_token_ids": [-1]}, "stop_token_ids[0]", "invalid_value"),
    ],
)
async def test_fields_that_contradict_each_other_or_a_limit_are_refused(
    box: ScriptedBox, fields: dict[str, Any], param: str, code: str
) -> None:
    reply = await box.chat(**fields)
    assert (reply.status, reply.error["param"], reply.error["code"]) == (400, param, code)
    assert box.models.generations == []


async def test_n_over_the_setting_is_refused_with_both_figures(tmp_path: Path) -> None:
    async with scripted_box(tmp_path, max_choices=2) as box:
        reply = await box.chat(n=3)
        assert "n is 3; at most 2" in reply.error["message"]
        assert (await box.chat(n=2)).status == 200


async def test_the_stream_is_exactly_as_documented(box: ScriptedBox) -> None:
    chunks = await stream(box, stream_options={"include_usage": True})
    *with_choices, last, done = chunks
    assert done == "[DONE]"
    same = {key: last[key] for key in ("id", "object", "created", "model", "service_tier", "system_fingerprint")}
    assert all(same.items() <= chunk.items() for chunk in with_choices)
    assert re.fullmatch(r"chatcmpl-[0-9a-f]{24}", same["id"])
    assert (same["object"], same["model"]) == ("chat.completion.chunk", "tiny:1")
    assert all(chunk["usage"] is None and "timings" not in chunk for chunk in with_choices)
    first, *content, end = [chunk["choices"][0] for chunk in with_choices]
    assert first == {
        "index": 0,
        "delta": {"role": "assistant", "content": ""},
        "logprobs": None,
        "finish_reason": None,
    }
    assert "".join(each["delta"]["content"] for each in content) == "Hello, 世界!"
    assert all(set(each["delta"]) == {"content"} and each["finish_reason"] is None for each in content)
    assert end == {"index": 0, "delta": {}, "logprobs": None, "finish_reason": "stop"}
    assert last["choices"] == []
    assert last["usage"] == {
        "prompt_tokens": 5,
        "completion_tokens": 4,
        "total_tokens": 9,
        "prompt_tokens_details": {"cached_tokens": 2},
    }
    assert last["timings"] == {"queue_s": 0.25, "prefill_s": 0.5, "decode_s": 1.5}


async def test_usage_is_not_mentioned_unless_asked_for(box: ScriptedBox) -> None:
    *chunks, done = await stream(box)
    assert done == "[DONE]"
    assert all(chunk["choices"] and "usage" not in chunk for chunk in chunks)


async def test_every_choice_has_its_own_role_text_and_end(box: ScriptedBox) -> None:
    *chunks, _ = await stream(box, n=3)
    for index in range(3):
        mine = [each["choices"][0] for each in chunks if each["choices"][0]["index"] == index]
        assert mine[0]["delta"].get("role") == "assistant"
        assert "".join(each["delta"].get("content", "") for each in mine) == "Hello, 世界!"
        assert [each["finish_reason"] for each in mine if each["finish_reason"]] == ["stop"]


def with_logprobs() -> list[Delta]:
    first = TokenLogprob(1, b"Hi", -0.25, ((1, b"Hi", -0.25), (2, b"Ho", -1.5)))
    return [
        Delta(0, "Hi", 1, logprobs=(first,)),
        Delta(0, "", 1, logprobs=(TokenLogprob(3, "世".encode()[:1], -2.0),)),
        Delta(0, "", 0, finish_reason=FinishReason.LENGTH),
    ]


HI = {
    "token": "Hi",
    "logprob": -0.25,
    "bytes": [72, 105],
    "top_logprobs": [
        {"token": "Hi", "logprob": -0.25, "bytes": [72, 105]},
        {"token": "Ho", "logprob": -1.5, "bytes": [72, 111]},
    ],
}


async def test_log_probabilities_stand_beside_the_text(box: ScriptedBox) -> None:
    box.models.script = lambda _: with_logprobs()
    reply = await box.chat(logprobs=True, top_logprobs=2)
    (choice,) = reply.json()["choices"]
    assert choice["finish_reason"] == "length"
    assert choice["logprobs"]["content"][0] == HI
    assert choice["logprobs"]["content"][1]["bytes"] == [0xE4]
    assert choice["logprobs"]["refusal"] is None
    *chunks, _ = await stream(box, logprobs=True, top_logprobs=2)
    told = [each["choices"][0]["logprobs"] for each in chunks]
    assert [token for each in told if each for token in each["content"]] == choice["logprobs"]["content"]


async def test_an_answer_without_tokens_has_empty_log_probabilities(box: ScriptedBox) -> None:
    box.models.script = lambda _: say()
    assert (await box.chat(logprobs=True)).json()["choices"][0]["logprobs"] == {"content": [], "refusal": None}
    assert (await box.chat()).json()["choices"][0]["logprobs"] is None


async def test_a_silent_stream_is_kept_alive_by_comments(tmp_path: Path) -> None:
    async with scripted_box(tmp_path, stream_keep_alive_s=0.02) as box, wire(box) as client:
        go = asyncio.Event()
        box.models.script = lambda _: [go, *say("Hello")]
        await client.send(post("/v1/chat/completions", {**CHAT, "stream": True}, "Connection: close"))
        for _ in range(3):
            await client.read_until(b": keep-alive\n\n")
        go.set()
        assert b"data: [DONE]" in await client.read_to_end()


async def test_a_refusal_before_the_first_chunk_has_a_status_of_its_own(box: ScriptedBox) -> None:
    box.models.refusals = [
        InvalidRequestError(
            "The prompt has 600 tokens; the context has 512.", code="context_length_exceeded", param="prompt"
        )
    ]
    reply = await box.chat(stream=True)
    assert (reply.status, reply.error["code"]) == (400, "context_length_exceeded")
    assert reply.error["param"] == "messages"
    assert reply.headers["content-type"] == "application/json"


async def test_a_mistake_of_ours_in_a_stream_ends_it_with_an_error_and_without_done(
    box: ScriptedBox, caplog: pytest.LogCaptureFixture
) -> None:
    box.models.script = lambda _: [*say("Half")[:1], ZeroDivisionError("secret")]
    reply = await box.chat(stream=True)
    *_, last = events(reply.body)
    assert last["error"]["code"] == "internal_error"
    assert reply.headers["x-request-id"] in last["error"]["message"]
    assert b"secret" not in reply.body
    assert b"[DONE]" not in reply.body
    assert "ZeroDivisionError" in caplog.text


async def test_a_mistake_of_ours_is_a_500_that_tells_nothing(
    box: ScriptedBox, caplog: pytest.LogCaptureFixture
) -> None:
    box.models.script = lambda _: [ZeroDivisionError("secret")]
    reply = await box.chat()
    assert (reply.status, reply.error["type"], reply.error["code"]) == (500, "server_error", "internal_error")
    assert b"secret" not in reply.body
    assert "secret" in caplog.text


async def test_large_bodies_are_read_in_full(box: ScriptedBox) -> None:
    text = "热泵 " * 500_000
    assert (await box.chat(text)).status == 200
    assert box.models.requests[0].prompt == (ChatMessage("user", text),)
    broken: Reply = await box.ask("POST", "/v1/chat/completions", body=b'{"model": "' + b"x" * 2_000_000)
    assert (broken.status, broken.error["code"]) == (400, "invalid_json")
