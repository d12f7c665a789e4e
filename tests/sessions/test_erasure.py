"""Deletion is erasure: of what only the deleted had, no byte is left in any file."""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import Collection
from pathlib import Path

import pytest

from appliance.core.errors import NotFoundError, StorageError
from appliance.core.sessions import Step, Summary
from tests.sessions.boxes import files_with, response, room, said, texts

pytestmark = pytest.mark.anyio

SECRETS = ("xylophonesecret", "秘密的滤网", "zymurgytitle", "quincemetadata", "kumquatsummary")


async def test_a_deleted_conversation_leaves_no_byte(tmp_path: Path) -> None:
    async with room(tmp_path) as each:
        await each.conversations.create(tenant="a", items=[said("ordinary words " * 20) for _ in range(200)])
        made = await each.conversations.create(
            tenant="a", items=[said("start", "i0")], title=SECRETS[2], metadata={"k": SECRETS[3]}
        )
        for _ in range(10):
            await each.conversations.append(made.id, [said(f"{SECRETS[0]} {SECRETS[1]} " * 50)], tenant="a")
        await each.conversations.keep_summary(made.id, Summary("i0", SECRETS[4], "m"), tenant="a")
        assert {word for _, word in files_with(tmp_path, *SECRETS)} == set(SECRETS)
        await each.conversations.delete(made.id, tenant="a")
        assert files_with(tmp_path, *SECRETS, made.id) == []
        assert each.conversations.search(f"{SECRETS[0]} 秘密", tenant="a", limit=9) == []
        with pytest.raises(NotFoundError, match=made.id):
            each.conversations.get(made.id, tenant="a")
        assert len(each.conversations.search("ordinary", tenant="a", limit=500)) == 200
    with sqlite3.connect(tmp_path / "sessions.db") as connection:
        connection.execute("INSERT INTO search (search) VALUES ('integrity-check')")
        assert connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
    connection.close()


async def test_its_responses_go_with_it(tmp_path: Path) -> None:
    async with room(tmp_path) as each:
        made = await each.conversations.create(tenant="a")
        secret = SECRETS[0]
        begun = response(conversation=made.id, request={"input": secret}, input=[said(secret, "i0")])
        await each.responses.begin(begun)
        await each.responses.begin(response("resp_other", input=[said("other")]))
        await each.responses.add_step("resp_1", Step(0, "model", {"text": secret}))
        await each.responses.add_events("resp_1", [{"sequence_number": n, "delta": secret} for n in range(1200)])
        await each.conversations.delete(made.id, tenant="a")
        assert files_with(tmp_path, secret, "resp_1") == []
        with pytest.raises(NotFoundError, match="resp_1"):  # its stream was going on
            await each.responses.end("resp_1", "completed", {}, append=[said("late")])
        assert [one.id for one in each.responses.unfinished()] == ["resp_other"]


async def test_what_a_fork_holds_stays_and_goes_with_the_last(tmp_path: Path) -> None:
    async with room(tmp_path) as each:
        made = await each.conversations.create(tenant="a", items=[said("kept", "i0"), said("sharedsecret", "i1")])
        await each.conversations.append(made.id, [said("ownsecret", "i2")], tenant="a")
        forks = [await each.conversations.fork(made.id, tenant="a", at=at) for at in ("i0", "i1")]
        await each.conversations.delete(made.id, tenant="a")
        assert {word for _, word in files_with(tmp_path, "sharedsecret", "ownsecret")} == {"sharedsecret"}
        [found] = each.conversations.search("sharedsecret", tenant="a", limit=9)
        assert found.conversation == forks[1].id
        await each.conversations.remove_item(forks[1].id, "i1", tenant="a")
        assert files_with(tmp_path, "sharedsecret") == []
        assert texts(each.conversations.items(forks[1].id, tenant="a")[0]) == ["kept"]
        for fork in forks:
            await each.conversations.delete(fork.id, tenant="a")
        count = each.conversations._database.read(
            lambda connection: connection.execute("SELECT count(*) FROM messages").fetchone()[0]
        )
        assert count == 0


async def test_what_one_removed_goes_when_the_other_who_had_it_does(tmp_path: Path) -> None:
    async with room(tmp_path) as each:
        made = await each.conversations.create(tenant="a", items=[said("sharedsecret", "i0"), said("rest", "i1")])
        fork = await each.conversations.fork(made.id, tenant="a")
        await each.conversations.remove_item(made.id, "i0", tenant="a")
        assert files_with(tmp_path, "sharedsecret") != []
        assert each.conversations.search("sharedsecret", tenant="a", limit=1)[0].conversation == fork.id
        await each.conversations.delete(fork.id, tenant="a")
        assert files_with(tmp_path, "sharedsecret") == []
        assert texts(each.conversations.items(made.id, tenant="a")[0]) == ["rest"]


async def test_what_a_fork_removed_goes_with_the_conversation_it_was_forked_from(tmp_path: Path) -> None:
    async with room(tmp_path) as each:
        items = [said("sharedsecret", "i0"), said("othersecret", "i1"), said("rest", "i2")]
        made = await each.conversations.create(tenant="a", items=items)
        fork = await each.conversations.fork(made.id, tenant="a")
        further = await each.conversations.fork(fork.id, tenant="a", at="i1")
        for conversation, item in ((fork, "i0"), (further, "i0"), (fork, "i1")):
            await each.conversations.remove_item(conversation.id, item, tenant="a")
        assert len(each.conversations.search("sharedsecret", tenant="a", limit=9)) == 1
        await each.conversations.delete(made.id, tenant="a")
        assert files_with(tmp_path, "sharedsecret") == []
        assert each.conversations.search("sharedsecret", tenant="a", limit=9) == []
        assert files_with(tmp_path, "othersecret") != [], "one fork still has it"
        assert texts(each.conversations.items(fork.id, tenant="a")[0]) == ["rest"]
        assert texts(each.conversations.items(further.id, tenant="a")[0]) == ["othersecret"]
        await each.conversations.delete(further.id, tenant="a")
        assert files_with(tmp_path, "othersecret") == []
        assert each.conversations.wrong(fork.id, tenant="a") == ""


async def test_a_removed_item_is_taken_out_of_the_response_that_said_it(tmp_path: Path) -> None:
    async with room(tmp_path) as each:
        made = await each.conversations.create(tenant="a")
        asked, answered = said("question", "i0"), said("answersecret", "i1", "assistant")
        await each.responses.begin(response(conversation=made.id, request={"input": "question"}, input=[asked]))
        await each.responses.add_step("resp_1", Step(0, "model", {"text": "answersecret"}))
        await each.responses.add_events("resp_1", [{"sequence_number": 0, "delta": "answersecret"}])
        await each.responses.end("resp_1", "completed", {"output": [answered]}, append=[asked, answered])
        await each.conversations.remove_item(made.id, "i1", tenant="a")
        assert files_with(tmp_path, "answersecret") == []
        assert texts(each.responses.past("resp_1", tenant="a")) == ["question"]
        await each.conversations.remove_item(made.id, "i0", tenant="a")
        assert files_with(tmp_path, "question") == []


async def test_a_response_that_ended_in_a_fork_goes_with_the_fork_and_its_items(tmp_path: Path) -> None:
    async with room(tmp_path) as each:
        made = await each.conversations.create(tenant="a", items=[said("start", "i0")])
        asked, answered = said("question", "i1"), said("answersecret", "i2", "assistant")
        await each.responses.begin(response(conversation=made.id, request={"input": "question"}, input=[asked]))
        await each.responses.add_step("resp_1", Step(0, "model", {"text": "answersecret"}))
        await each.conversations.append(made.id, [said("quick")], tenant="a")
        body = await each.responses.end(
            "resp_1", "completed", {"output": [answered]}, append=[asked, answered], after="i0", fork=True
        )
        fork = body["conversation"]["id"]
        await each.conversations.remove_item(fork, "i2", tenant="a")
        assert files_with(tmp_path, "answersecret") == []
        assert texts(each.responses.past("resp_1", tenant="a")) == ["question"]
        await each.conversations.delete(fork, tenant="a")
        assert files_with(tmp_path, "question", "resp_1") == []
        assert texts(each.conversations.items(made.id, tenant="a")[0]) == ["start", "quick"]


async def test_a_deleted_response_leaves_no_byte_and_those_behind_it_keep_their_own(tmp_path: Path) -> None:
    async with room(tmp_path) as each:
        previous = ""
        for number in range(4):
            name = f"resp_{number}"
            await each.responses.begin(response(name, previous=previous, input=[said(f"question{number}")]))
            await each.responses.end(name, "completed", {"output": [said(f"answer{number}")]})
            previous = name
        for gone, left in ((1, "023"), (2, "03"), (0, "3")):
            await each.responses.delete(f"resp_{gone}", tenant="a")
            assert files_with(tmp_path, f"question{gone}", f"answer{gone}") == []
            expected = [text for number in left for text in (f"question{number}", f"answer{number}")]
            assert texts(each.responses.past("resp_3", tenant="a")) == expected


async def test_an_erasure_waits_for_whoever_reads_the_log(tmp_path: Path) -> None:
    async with room(tmp_path) as each:
        made = await each.conversations.create(tenant="a", items=[said(SECRETS[0])])
        reader = sqlite3.connect(tmp_path / "sessions.db")
        reader.execute("BEGIN")
        reader.execute("SELECT count(*) FROM messages").fetchone()
        async with asyncio.timeout(60), asyncio.TaskGroup() as tasks:
            deletion = tasks.create_task(each.conversations.delete(made.id, tenant="a"))
            done, _ = await asyncio.wait({deletion}, timeout=0.5)
            assert not done
            reader.close()
        assert files_with(tmp_path, SECRETS[0]) == []


async def test_an_erasure_that_was_cut_off_is_gone_on_with(tmp_path: Path) -> None:
    async with room(tmp_path) as each:
        made = await each.conversations.create(tenant="a", items=[said(SECRETS[0])])
        reader = sqlite3.connect(tmp_path / "sessions.db")
        reader.execute("BEGIN")
        reader.execute("SELECT count(*) FROM messages").fetchone()
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.5):
                await each.conversations.delete(made.id, tenant="a")
        reader.close()
        assert files_with(tmp_path, SECRETS[0]) != []
    async with room(tmp_path) as each:
        await each.upkeep.once()
        assert files_with(tmp_path, SECRETS[0]) == []


class Models:
    """Note what they are to forget, or fail to."""

    def __init__(self, *, fails: bool = False) -> None:
        self.fails = fails
        self.told: list[set[str]] = []

    async def forget(self, sessions: Collection[str]) -> None:
        if self.fails:
            raise StorageError("The disk is gone.")
        self.told.append(set(sessions))


async def test_the_models_forget_the_conversation_whatever_of_it_is_deleted(tmp_path: Path) -> None:
    models = Models()
    async with room(tmp_path, forget=models.forget) as each:
        made = await each.conversations.create(tenant="a", items=[said("text", "i0")])
        await each.responses.begin(response(conversation=made.id))
        fork = await each.conversations.fork(made.id, tenant="a")
        await each.conversations.remove_item(made.id, "i0", tenant="a")
        await each.responses.delete("resp_1", tenant="a")
        await each.conversations.delete(fork.id, tenant="a")
        assert models.told == [{made.id}, {made.id}, {fork.id}]


async def test_the_models_forget_responses_that_follow_each_other_by_their_first(tmp_path: Path) -> None:
    models, previous = Models(), ""
    async with room(tmp_path, forget=models.forget) as each:
        for name in ("resp_0", "resp_1", "resp_2"):
            await each.responses.begin(response(name, previous=previous))
            previous = name
        assert [each.responses.first(name, tenant="a") for name in ("resp_0", "resp_2")] == ["resp_0", "resp_0"]
        await each.responses.delete("resp_1", tenant="a")
        await each.responses.delete("resp_0", tenant="a")
        assert each.responses.first("resp_2", tenant="a") == "resp_2"
        await each.responses.delete("resp_2", tenant="a")
        assert models.told == [{"resp_0"}, {"resp_0"}, {"resp_2"}]


async def test_what_the_models_could_not_forget_they_forget_later(tmp_path: Path) -> None:
    models = Models(fails=True)
    async with room(tmp_path, forget=models.forget) as each:
        made = await each.conversations.create(tenant="a")
        with pytest.raises(StorageError, match="gone"):
            await each.conversations.delete(made.id, tenant="a")
    models.fails = False
    async with room(tmp_path, forget=models.forget) as each:
        await each.upkeep.once()
        assert models.told == [{made.id}]
        assert files_with(tmp_path, made.id) == []
        await each.upkeep.once()
        assert models.told == [{made.id}], "the record is gone"
