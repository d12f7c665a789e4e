"""Who is served how soon: API keys' shares and tiers, and the time limits of single requests."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from appliance.core.types import Priority
from tests.api.boxes import Box, Reply, ScriptedBox, events, real_box, scripted_box

pytestmark = pytest.mark.anyio


async def chat_as(box: Box, secret: str, **fields: object) -> Reply:
    document = {"model": "tiny", "messages": [{"role": "user", "content": "Hello"}], **fields}
    return await box.ask("POST", "/v1/chat/completions", document, headers={"authorization": f"Bearer {secret}"})


async def test_on_an_open_box_every_tier_is_allowed_even_to_those_who_send_a_key(box: ScriptedBox) -> None:
    assert box.keys is not None
    key, secret = box.keys.create("camera", ["inference"], weight=3.0)
    for sender in ("none", secret):
        reply = await chat_as(box, sender, service_tier="priority")
        assert reply.json()["service_tier"] == "priority"
    open_one, known_one = box.models.requests
    assert (open_one.tenant, open_one.weight) == ("", 1.0)
    assert (known_one.tenant, known_one.weight) == (key.id, 3.0)


@pytest.mark.parametrize(
    ("highest", "asked", "used"),
    [
        (Priority.DEFAULT, "priority", "default"),
        (Priority.DEFAULT, "fast", "default"),
        (Priority.DEFAULT, "flex", "flex"),
        (Priority.DEFAULT, None, "default"),
        (Priority.PRIORITY, "priority", "priority"),
        (Priority.PRIORITY, "auto", "default"),
        (Priority.FLEX, "default", "flex"),
        (Priority.FLEX, None, "flex"),
    ],
)
async def test_a_request_above_its_keys_tier_is_served_in_that_tier_and_told_so(
    tmp_path: Path, highest: Priority, asked: str | None, used: str
) -> None:
    async with scripted_box(tmp_path, require_api_key=True) as box:
        assert box.keys is not None
        key, secret = box.keys.create("camera", ["inference"], weight=0.5, highest_tier=highest)
        reply = await chat_as(box, secret, service_tier=asked)
        assert reply.status == 200
        assert reply.json()["service_tier"] == used
        [request] = box.models.requests
        assert (request.tenant, request.weight, request.priority) == (key.id, 0.5, Priority[used.upper()])
        streamed = await chat_as(box, secret, service_tier=asked, stream=True)
        assert {each["service_tier"] for each in events(streamed.body)[:-1]} == {used}
        headers = {"authorization": f"Bearer {secret}"}
        text = {"model": "tiny", "prompt": "Hello", "service_tier": asked}
        assert (await box.ask("POST", "/v1/completions", text, headers=headers)).json()["service_tier"] == used


async def test_a_caller_may_ask_for_less_time_but_not_for_more(tmp_path: Path) -> None:
    async with scripted_box(tmp_path, request_timeout_s=20.0) as box:
        for asked, given in ((5, 5.0), (0.25, 0.25), (20, 20.0), (21, 20.0), (None, 20.0)):
            assert (await box.chat(timeout_s=asked)).status == 200
            assert (await box.complete(timeout_s=asked)).status == 200
            assert [each.deadline_s for each in box.models.requests[-2:]] == [given, given]


@pytest.mark.parametrize("limit", [0, -1, "1", 1e99])
async def test_a_time_limit_that_is_none_is_refused(box: ScriptedBox, limit: object) -> None:
    for reply in (await box.chat(timeout_s=limit), await box.complete(timeout_s=limit)):
        assert (reply.status, reply.error["param"]) == (400, "timeout_s")
    assert box.models.requests == []


async def test_a_request_that_is_not_accepted_within_its_own_time_is_a_503(box: ScriptedBox) -> None:
    box.models.gate = asyncio.Event()
    for reply in (await box.chat(timeout_s=0.05), await box.complete(timeout_s=0.05)):
        assert (reply.status, reply.error["code"]) == (503, "deadline_exceeded")
        assert "0.05 s" in reply.error["message"]
        assert "timeout_s" in reply.error["message"]
    assert box.models.requests == []


async def test_an_answer_that_is_not_complete_within_its_own_time_ends_with_the_error_and_others_go_on(
    tmp_path: Path, tiny_model_path: Path
) -> None:
    async with real_box(tmp_path, tiny_model_path) as box:
        assert (await box.chat(max_tokens=2)).status == 200  # the model is loaded now
        endless: dict[str, Any] = {"max_tokens": 480, "ignore_eos": True, "n": 4}
        reply = await box.chat(timeout_s=0.02, **endless)
        assert (reply.status, reply.error["code"]) == (503, "deadline_exceeded")
        streamed = await box.chat(timeout_s=0.02, stream=True, **endless)
        # On a machine that is busy enough, the time is over before the stream begins.
        error = events(streamed.body)[-1]["error"] if streamed.status == 200 else streamed.error
        assert error["code"] == "deadline_exceeded"
        assert (await box.chat(max_tokens=2)).status == 200
