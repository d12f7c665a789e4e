"""Retention: what is too old or too many goes, and what is at work stays."""

from __future__ import annotations

import asyncio
from collections.abc import Collection
from pathlib import Path

import pytest

from tests.sessions.boxes import DAY_S, HandClock, files_with, response, room, said, texts

pytestmark = pytest.mark.anyio


async def test_conversations_go_some_days_after_their_last_change(tmp_path: Path) -> None:
    clock = HandClock()
    async with room(tmp_path, clock, conversation_days=7) as each:
        old = await each.conversations.create(tenant="a", items=[said("oldsecret")])
        used = await each.conversations.create(tenant="a", items=[said("used")])
        busy = await each.conversations.create(tenant="b", items=[said("busy")])
        await each.responses.begin(response(conversation=busy.id, tenant="b"))
        clock.now += 5 * DAY_S
        await each.conversations.append(used.id, [said("again")], tenant="a")
        await each.upkeep.once()
        assert len(each.conversations.list(tenant="a", limit=9, after="", newest_first=True)[0]) == 2
        clock.now += 3 * DAY_S
        await each.upkeep.once()
        left = each.conversations.list(tenant="a", limit=9, after="", newest_first=True)[0]
        assert [one.id for one in left] == [used.id]
        assert files_with(tmp_path, "oldsecret", old.id) == []
        assert each.conversations.get(busy.id, tenant="b").id == busy.id


async def test_of_too_many_those_longest_unchanged_go(tmp_path: Path) -> None:
    clock = HandClock()
    async with room(tmp_path, clock, max_conversations=3) as each:
        made = []
        for number in range(30):
            clock.now += 1
            made.append(await each.conversations.create(tenant="a", title=str(number)))
        clock.now += 1
        await each.conversations.append(made[0].id, [said("used")], tenant="a")
        await each.conversations.create(tenant="b", title="theirs")
        await each.upkeep.once()
        left = each.conversations.list(tenant="a", limit=99, after="", newest_first=False)[0]
        assert [one.title for one in left] == ["28", "29", "0"]
        assert len(each.conversations.list(tenant="b", limit=9, after="", newest_first=True)[0]) == 1


async def test_without_limits_nothing_goes(tmp_path: Path) -> None:
    clock = HandClock()
    async with room(tmp_path, clock, response_days=0) as each:
        made = await each.conversations.create(tenant="a")
        await each.responses.begin(response())
        await each.responses.end("resp_1", "completed", {})
        clock.now += 10_000 * DAY_S
        await each.upkeep.once()
        assert each.conversations.get(made.id, tenant="a") == made
        assert each.responses.get("resp_1", tenant="a").status == "completed"


async def test_old_responses_go_unless_a_younger_one_follows_or_they_are_at_work(tmp_path: Path) -> None:
    clock = HandClock()
    async with room(tmp_path, clock, response_days=30) as each:
        young = clock.now + 20 * DAY_S
        chain = (("resp_1", "", 0), ("resp_2", "resp_1", 0), ("resp_3", "resp_1", young), ("resp_4", "", 0))
        for name, previous, created in chain:
            begun = response(name, previous=previous, created=int(created or clock.now), input=[said(f"{name}secret")])
            await each.responses.begin(begun)
            if name != "resp_4":
                await each.responses.end(name, "completed", {})
        clock.now += 31 * DAY_S
        await each.upkeep.once()
        assert files_with(tmp_path, "resp_2secret") == []
        assert texts(each.responses.past("resp_3", tenant="a")) == ["resp_1secret", "resp_3secret"]
        assert [one.id for one in each.responses.unfinished()] == ["resp_4"]
        clock.now += 20 * DAY_S
        await each.upkeep.once()
        assert files_with(tmp_path, "resp_1secret", "resp_3secret") == []


async def test_it_goes_on_when_the_disk_fails_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("appliance.sessions.upkeep.EVERY_S", 0.01)
    async with room(tmp_path, max_conversations=1) as each:
        database = each.conversations._database
        for _ in range(2):
            await each.conversations.create(tenant="a")
        database.write_blocking(
            lambda one: one.execute(
                "CREATE TRIGGER fault BEFORE DELETE ON conversations BEGIN SELECT raise(ABORT, 'fault'); END"
            ).close()
        )
        async with asyncio.timeout(30), asyncio.TaskGroup() as tasks:
            running = tasks.create_task(each.upkeep.run())
            while "fault" not in caplog.text:  # noqa: ASYNC110
                await asyncio.sleep(0.01)
            await database.write(lambda one: one.execute("DROP TRIGGER fault").close())
            while len(each.conversations.list(tenant="a", limit=9, after="", newest_first=True)[0]) > 1:  # noqa: ASYNC110
                await asyncio.sleep(0.01)
            running.cancel()


async def test_the_models_forget_what_retention_takes_out(tmp_path: Path) -> None:
    clock, told = HandClock(), set[str]()

    async def forget(sessions: Collection[str]) -> None:
        told.update(sessions)

    async with room(tmp_path, clock, forget, conversation_days=1, response_days=1) as each:
        made = await each.conversations.create(tenant="a", items=[said("old")])
        await each.responses.begin(response())
        await each.responses.end("resp_1", "completed", {})
        clock.now += 3 * DAY_S
        await each.upkeep.once()
    assert told == {made.id, "resp_1"}
