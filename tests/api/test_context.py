"""Histories beyond the window, through the door: a token is a byte here, and the window has 512."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable
from pathlib import Path
from typing import Any

import anyio
import pytest

from appliance.core.errors import InvalidRequestError
from appliance.core.sessions import Summary
from appliance.core.types import ChatMessage, GenerationRequest, Priority
from tests.api.boxes import ScriptedBox, scripted_box
from tests.api.scripted import Step, say
from tests.api.test_responses import answer, ask, stream

pytestmark = pytest.mark.anyio

WINDOW = 512
KEPT = 64
ROOM = WINDOW - KEPT


def sums_up(request: GenerationRequest) -> bool:
    return request.priority is Priority.FLEX


def speak(request: GenerationRequest) -> Iterable[Step]:
    return say("") if sums_up(request) else say("Yes. " * 8)


@pytest.fixture
async def box(tmp_path: Path) -> AsyncIterator[ScriptedBox]:
    async with scripted_box(tmp_path) as box:
        box.models.context_length = WINDOW
        box.models.script = speak
        yield box


async def conversation(box: ScriptedBox) -> str:
    return str((await box.ask("POST", "/v1/conversations", {})).json()["id"])


async def converse(box: ScriptedBox, text: str, name: str, **fields: Any) -> Any:
    return await answer(box, text, conversation=name, truncation="auto", max_output_tokens=KEPT, **fields)


def shown(box: ScriptedBox) -> list[ChatMessage]:
    last = [each for each in box.models.requests if not sums_up(each)][-1]
    return [each for each in last.prompt if isinstance(each, ChatMessage)]


def size(box: ScriptedBox) -> int:
    return sum(len(each.content) for each in shown(box))


async def test_a_history_that_fits_is_shown_whole(box: ScriptedBox) -> None:
    name = await conversation(box)
    await converse(box, "My cat is called Ada.", name)
    body = await converse(box, "And my dog is Bob.", name)
    assert [each.role for each in shown(box)] == ["user", "assistant", "user"]
    assert body["context"] == {
        "items_left_out": 0,
        "input_tokens": size(box),
        "context_length": WINDOW,
        "answer_tokens": KEPT,
        "summary": False,
        "memory_items": 0,
    }


async def test_a_long_conversation_goes_on_and_is_told_what_was_left_out(box: ScriptedBox) -> None:
    name = await conversation(box)
    for number in range(20):
        body = await converse(box, f"Turn {number} of a long conversation.", name, instructions="Be kind.")
        assert size(box) <= ROOM
        assert shown(box)[0] == ChatMessage("system", "Be kind.")
        assert shown(box)[1].role == "user"
        assert shown(box)[-1].content.endswith(f"Turn {number} of a long conversation.")
    assert body["context"]["items_left_out"] >= 20
    assert body["context"]["input_tokens"] == size(box)


async def test_what_was_left_out_is_told_in_the_stream_from_its_beginning(box: ScriptedBox) -> None:
    name = await conversation(box)
    for _ in range(8):
        await converse(box, "Something to say that is long enough.", name)
    events = await stream(box, "And?", conversation=name, truncation="auto", max_output_tokens=KEPT)
    told = [each["response"]["context"]["items_left_out"] for each in events if "response" in each]
    assert len(told) == 3
    assert set(told) != {0}
    assert len(set(told)) == 1


async def test_the_beginning_of_the_prompt_rarely_changes(box: ScriptedBox) -> None:
    name = await conversation(box)
    begins = []
    for number in range(24):
        await converse(box, f"z{number:02}", name)
        begins.append(shown(box)[0])
    # a turn has some 43 tokens, a window ten of them: to cut just enough would move it with each of the last 14
    assert 3 <= len({each.content for each in begins}) <= 7


async def test_memory_of_what_was_left_out_stands_in_the_newest_turn(box: ScriptedBox) -> None:
    name = await conversation(box)
    await converse(box, "My parrot is called Humboldt.", name)
    for _ in range(12):
        await converse(box, "Something else to talk about.", name)
    body = await converse(box, "What was the parrot called?", name)
    assert body["context"]["memory_items"] == 1
    assert "user: My parrot is called Humboldt." in shown(box)[-1].content
    assert all("Humboldt" not in each.content for each in shown(box)[:-1])


async def test_a_summary_stands_for_what_it_covers(box: ScriptedBox) -> None:
    assert box.sessions is not None
    name = await conversation(box)
    for number in range(10):
        await converse(box, f"z{number:02} is said here at some length.", name)
    items, _ = box.sessions.conversations.items(name, tenant="")
    summary = Summary(items[17]["id"], "They counted.", "tiny:1")
    await box.sessions.conversations.keep_summary(name, summary, tenant="")
    body = await converse(box, "z10", name)
    assert (body["context"]["summary"], body["context"]["items_left_out"]) == (True, 18)
    assert "They counted." in shown(box)[0].content
    assert shown(box)[0].content.endswith("z09 is said here at some length.")
    await box.sessions.conversations.remove_item(name, items[0]["id"], tenant="")
    body = await converse(box, "z11", name)
    assert body["context"]["summary"] is False
    assert all("They counted." not in each.content for each in shown(box))


async def test_a_chain_of_responses_without_a_conversation_is_cut_too(box: ScriptedBox) -> None:
    previous = None
    for _ in range(12):
        fields: dict[str, Any] = {"previous_response_id": previous} if previous else {}
        body = await answer(box, "Something that is said.", truncation="auto", max_output_tokens=KEPT, **fields)
        previous = body["id"]
        assert size(box) <= ROOM
    assert body["context"]["items_left_out"] > 0


async def test_a_turn_that_cannot_fit_is_refused_with_the_figures_and_nothing_is_changed(box: ScriptedBox) -> None:
    name = await conversation(box)
    await converse(box, "Hello", name)
    fields = {"conversation": name, "truncation": "auto", "max_output_tokens": KEPT, "instructions": "x" * 100}
    reply = await ask(box, "y" * 400, **fields)
    assert (reply.status, reply.error["code"]) == (400, "context_length_exceeded")
    assert all(each in reply.error["message"] for each in ("400", "512", "100", "64"))
    items = (await box.ask("GET", f"/v1/conversations/{name}/items")).json()["data"]
    assert len(items) == 2
    assert len(box.models.requests) == 1


async def test_without_truncation_all_is_sent_and_the_refusal_says_how_to_go_on(box: ScriptedBox) -> None:
    name = await conversation(box)
    for _ in range(12):
        body = await answer(box, "Something that is said.", conversation=name, max_output_tokens=KEPT)
    assert size(box) > WINDOW
    assert body["context"] is None
    box.models.refusals.append(
        InvalidRequestError("The prompt has 600 tokens; the context has 512.", code="context_length_exceeded")
    )
    reply = await ask(box, "More.", conversation=name)
    assert "600" in reply.error["message"]
    assert "truncation" in reply.error["message"]


async def test_what_the_box_counted_wrongly_is_cut_further(box: ScriptedBox, monkeypatch: pytest.MonkeyPatch) -> None:
    honest = box.models.prompt_size

    async def longer(request: GenerationRequest) -> Any:
        found = await honest(request)
        return type(found)(found.tokens + 3 * (len(request.prompt) - 1), found.context_length, found.model)

    monkeypatch.setattr(box.models, "prompt_size", longer)
    name = await conversation(box)
    for number in range(14):
        await converse(box, f"z{number:02} is said here at some length.", name)
        assert size(box) + 3 * (len(shown(box)) - 1) <= ROOM


async def kept_summary(box: ScriptedBox, name: str) -> Summary:
    assert box.sessions is not None
    with anyio.fail_after(60):
        while True:
            found = box.sessions.conversations.summary(name, tenant="")
            if found is not None:
                return found
            await asyncio.sleep(0.01)


def speak_or_sum_up(request: GenerationRequest) -> Iterable[Step]:
    return say("They counted.") if sums_up(request) else speak(request)


async def test_a_summary_is_written_when_the_box_is_quiet_and_used_when_it_is_needed(box: ScriptedBox) -> None:
    box.models.script = speak_or_sum_up
    name = await conversation(box)
    for number in range(8):
        await converse(box, f"z{number:02}", name)
    summary = await kept_summary(box, name)
    assert (summary.text, summary.model) == ("They counted.", "tiny:1")
    (asked,) = [each for each in box.models.requests if sums_up(each)]
    assert isinstance(asked.prompt[0], ChatMessage)
    assert asked.prompt[0].content == "z00"
    for number in range(8, 12):
        body = await converse(box, f"z{number:02}", name)
    assert body["context"]["summary"] is True
    assert "They counted." in shown(box)[0].content


async def test_a_summary_that_is_in_anyones_way_is_given_up_at_once_and_written_later(box: ScriptedBox) -> None:
    begun, never = asyncio.Event(), asyncio.Event()

    def hang(request: GenerationRequest) -> Iterable[Step]:
        if not sums_up(request):
            yield from speak(request)
            return
        begun.set()
        yield never

    box.models.script = hang
    name = await conversation(box)
    for number in range(8):
        await converse(box, f"z{number:02}", name)
    with anyio.fail_after(60):
        await begun.wait()
    (writing,) = [each for each in box.models.generations if sums_up(each.request)]
    box.models.script = speak_or_sum_up
    assert (await box.chat("Hello")).status == 200
    assert writing.cancelled.is_set()
    assert (await kept_summary(box, name)).text == "They counted."


async def test_a_summary_of_an_item_that_was_removed_meanwhile_is_not_kept(box: ScriptedBox) -> None:
    assert box.sessions is not None
    begun, go_on = asyncio.Event(), asyncio.Event()

    def wait(request: GenerationRequest) -> Iterable[Step]:
        if sums_up(request):
            begun.set()
            yield go_on
        yield from speak_or_sum_up(request)

    box.models.script = wait
    name = await conversation(box)
    for number in range(8):
        await converse(box, f"z{number:02}", name)
    with anyio.fail_after(60):
        await begun.wait()
    items, _ = box.sessions.conversations.items(name, tenant="")
    await box.sessions.conversations.remove_item(name, items[0]["id"], tenant="")
    go_on.set()
    for number in range(8, 11):
        await converse(box, f"z{number:02}", name)
    summary = await kept_summary(box, name)
    asked = [each for each in box.models.requests if sums_up(each)]
    assert summary.text == "They counted."
    assert len(asked) >= 2
    assert "z00" not in "".join(each.content for each in asked[-1].prompt if isinstance(each, ChatMessage))
