"""Responses, the journal of their loop and their events."""

from __future__ import annotations

from pathlib import Path

import pytest

from appliance.core.errors import ConflictError, InvalidRequestError, NotFoundError
from appliance.core.sessions import Step
from tests.sessions.boxes import response, room, said, texts

pytestmark = pytest.mark.anyio


async def test_a_response_is_what_was_begun(tmp_path: Path) -> None:
    begun = response(request={"model": "m"}, body={"id": "resp_1"}, input=[said("hi", "i0")], background=True)
    async with room(tmp_path) as each:
        await each.responses.begin(begun)
        with pytest.raises(ConflictError):
            await each.responses.begin(begun)
    async with room(tmp_path) as each:
        assert each.responses.get("resp_1", tenant="a") == begun
        assert each.responses.unfinished() == [begun]


async def test_the_journal_has_no_holes_and_no_number_twice(tmp_path: Path) -> None:
    steps = [Step(0, "model", {"text": "x"}), Step(1, "call", {"name": "f"}), Step(2, "result", {})]
    async with room(tmp_path) as each:
        await each.responses.begin(response())
        for step in steps:
            await each.responses.add_step("resp_1", step)
        for number in (2, 4, -1):
            with pytest.raises(ConflictError, match="3 steps"):
                await each.responses.add_step("resp_1", Step(number, "call", {}))
        assert each.responses.steps("resp_1") == steps


async def test_events_are_read_from_any_number(tmp_path: Path) -> None:
    async with room(tmp_path) as each:
        await each.responses.begin(response())
        events = [{"sequence_number": number, "type": "delta"} for number in range(5)]
        await each.responses.add_events("resp_1", events[:2])
        await each.responses.add_events("resp_1", events[2:4])
        with pytest.raises(ConflictError):
            await each.responses.add_events("resp_1", [events[4], events[3]])
        assert each.responses.events("resp_1", tenant="a") == events[:4]
        assert each.responses.events("resp_1", tenant="a", after=2) == events[3:4]
        await each.responses.end("resp_1", "completed", {}, events=events[4:])
        assert each.responses.events("resp_1", tenant="a", after=3) == events[4:]


async def test_a_response_ends_once(tmp_path: Path) -> None:
    async with room(tmp_path) as each:
        made = await each.conversations.create(tenant="a")
        await each.responses.begin(response(conversation=made.id))
        with pytest.raises(InvalidRequestError, match="in_progress"):
            await each.responses.end("resp_1", "in_progress", {})
        await each.responses.end("resp_1", "completed", {"n": 1}, append=[said("x", "i0")], after="")
        with pytest.raises(ConflictError, match="is completed"):
            await each.responses.end("resp_1", "failed", {"n": 2}, append=[said("y", "i1")])
        ended = each.responses.get("resp_1", tenant="a")
        assert (ended.status, ended.body) == ("completed", {"n": 1})
        assert texts(each.conversations.items(made.id, tenant="a")[0]) == ["x"]
        assert each.responses.unfinished() == []


async def test_a_conflict_at_the_end_changes_nothing(tmp_path: Path) -> None:
    async with room(tmp_path) as each:
        made = await each.conversations.create(tenant="a", items=[said("0", "i0")])
        await each.responses.begin(response(conversation=made.id))
        await each.conversations.append(made.id, [said("other", "i1")], tenant="a")
        event = {"sequence_number": 0}
        with pytest.raises(ConflictError, match="i1"):
            await each.responses.end("resp_1", "completed", {}, append=[said("x")], after="i0", events=[event])
        assert each.responses.get("resp_1", tenant="a").status == "in_progress"
        assert each.responses.events("resp_1", tenant="a") == []
        assert texts(each.conversations.items(made.id, tenant="a")[0]) == ["0", "other"]


async def test_who_was_overtaken_ends_in_a_fork_which_the_response_belongs_to(tmp_path: Path) -> None:
    async with room(tmp_path) as each:
        made = await each.conversations.create(tenant="a", items=[said("0", "i0")])
        body = {"conversation": {"id": made.id}}
        for name in ("resp_1", "resp_2"):
            await each.responses.begin(response(name, conversation=made.id))
        kept = await each.responses.end("resp_1", "completed", body, append=[said("1", "i1")], after="i0", fork=True)
        assert kept == body, "nobody came before it"
        kept = await each.responses.end("resp_2", "completed", body, append=[said("2", "i2")], after="i0", fork=True)
        fork = kept["conversation"]["id"]
        ended = each.responses.get("resp_2", tenant="a")
        assert (ended.body, ended.conversation) == (kept, fork)
        assert texts(each.conversations.items(made.id, tenant="a")[0]) == ["0", "1"]
        assert texts(each.conversations.items(fork, tenant="a")[0]) == ["0", "2"]
        assert each.conversations.get(fork, tenant="a").forked_from == made.id


async def test_another_key_has_none_of_it(tmp_path: Path) -> None:
    async with room(tmp_path) as each:
        made = await each.conversations.create(tenant="a")
        await each.responses.begin(response())
        for read in (each.responses.get, each.responses.past, each.responses.events):
            with pytest.raises(NotFoundError, match="resp_1"):
                read("resp_1", tenant="b")
        with pytest.raises(NotFoundError, match="resp_1"):
            await each.responses.delete("resp_1", tenant="b")
        with pytest.raises(NotFoundError, match="resp_1"):
            await each.responses.begin(response("resp_2", tenant="b", previous="resp_1"))
        with pytest.raises(NotFoundError, match=made.id):
            await each.responses.begin(response("resp_2", tenant="b", conversation=made.id))
        assert [one.id for one in each.responses.unfinished()] == ["resp_1"]


async def test_the_past_is_that_of_all_before_it(tmp_path: Path) -> None:
    async with room(tmp_path) as each:
        for name, previous in (("resp_1", ""), ("resp_2", "resp_1"), ("resp_3", "resp_1")):
            await each.responses.begin(response(name, previous=previous, input=[said(f"ask {name}")]))
            await each.responses.end(name, "completed", {"output": [said(f"say {name}")]})
        assert texts(each.responses.past("resp_3", tenant="a")) == [
            "ask resp_1",
            "say resp_1",
            "ask resp_3",
            "say resp_3",
        ]
