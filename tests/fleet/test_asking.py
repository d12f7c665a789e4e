"""Questions to the hub and their answers."""

from __future__ import annotations

import asyncio

import msgspec
import pytest

from appliance.core.errors import UnavailableError
from appliance.core.fleet import Answer, Question, down
from appliance.core.messaging import Message
from appliance.fleet.asking import MOST_AT_ONCE, Questions
from tests.fleet.links import KeptLink

pytestmark = pytest.mark.anyio


def answer(question: Message, data: bytes) -> Message:
    return Message(down("box", "res"), msgspec.msgpack.encode(Answer(True, data)), correlation=question.correlation)


async def test_each_question_gets_its_own_answer_in_whatever_order_they_come() -> None:
    link = KeptLink()
    questions = Questions("box", link)
    async with asyncio.timeout(10), asyncio.TaskGroup() as tasks:
        asked = [tasks.create_task(questions.ask(Question("file", path=str(n)))) for n in range(4)]
        await link.wait_for(4)
        for message in reversed(link.sent):
            path = msgspec.json.decode(message.payload, type=Question).path
            await questions.handle("res", answer(message, path.encode()))
    assert [each.result().data for each in asked] == [b"0", b"1", b"2", b"3"]
    assert len({message.correlation for message in link.sent}) == 4
    assert {(each.topic, each.response_topic) for each in link.sent} == {("ea/1/up/box/req", "ea/1/dn/box/res")}


async def test_a_silent_hub_is_given_up_and_its_late_answer_is_dropped() -> None:
    link = KeptLink()
    questions = Questions("box", link)
    with pytest.raises(UnavailableError, match=r"did not answer the question 'time' within 0\.01 s") as caught:
        await questions.ask(Question("time"), timeout_s=0.01)
    assert caught.value.code == "hub_silent"
    await questions.handle("res", answer(link.sent[0], b"late"))
    async with asyncio.timeout(10), asyncio.TaskGroup() as tasks:
        asked = tasks.create_task(questions.ask(Question("time")))
        await link.wait_for(2)
        await questions.handle("res", answer(link.sent[0], b"late"))
        assert not asked.done()
        await questions.handle("res", answer(link.sent[1], b"in time"))
        await questions.handle("res", answer(link.sent[1], b"a second time"))
    assert asked.result().data == b"in time"


@pytest.mark.parametrize("payload", [b"", b"\xc1", b"\x91" * 100_000, msgspec.msgpack.encode({"ok": "yes"})])
async def test_what_is_no_answer_leaves_the_question_open(payload: bytes) -> None:
    link = KeptLink()
    questions = Questions("box", link)
    async with asyncio.timeout(10), asyncio.TaskGroup() as tasks:
        asked = tasks.create_task(questions.ask(Question("time")))
        await link.wait_for(1)
        await questions.handle("res", Message("x", payload, correlation=link.sent[0].correlation))
        await questions.handle("res", Message("x", answer(link.sent[0], b"").payload))  # without correlation
        assert not asked.done()
        await questions.handle("res", answer(link.sent[0], b"real"))
    assert asked.result().data == b"real"


async def test_no_more_questions_than_turns_are_on_their_way() -> None:
    link = KeptLink()
    questions = Questions("box", link)
    async with asyncio.timeout(10), asyncio.TaskGroup() as tasks:
        asked = [tasks.create_task(questions.ask(Question("time"))) for _ in range(MOST_AT_ONCE + 1)]
        await link.wait_for(MOST_AT_ONCE)
        for _ in range(10):
            await asyncio.sleep(0)
        assert len(link.sent) == MOST_AT_ONCE
        await questions.handle("res", answer(link.sent[0], b""))
        await link.wait_for(MOST_AT_ONCE + 1)
        for message in link.sent[1:]:
            await questions.handle("res", answer(message, b""))
    assert all(each.result().ok for each in asked)


async def test_without_a_connection_a_question_is_refused_at_once() -> None:
    link = KeptLink()
    link.connected = False
    with pytest.raises(UnavailableError, match="no connection"):
        await Questions("box", link).ask(Question("time"))
