"""Conversations: appended to, forked, listed, changed, exported; each key sees its own."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from appliance.core.errors import ConflictError, InvalidRequestError, NotFoundError
from appliance.core.sessions import Summary
from tests.sessions.boxes import HandClock, room, said, texts

pytestmark = pytest.mark.anyio


async def test_what_was_appended_is_there_after_a_restart(tmp_path: Path) -> None:
    async with room(tmp_path) as each:
        made = await each.conversations.create(tenant="a", items=[said("one")], metadata={"k": "v"}, title="First")
        await each.conversations.append(made.id, [said("two"), said("three", "msg_3")], tenant="a")
    async with room(tmp_path) as each:
        found = each.conversations.get(made.id, tenant="a")
        items, more = each.conversations.items(made.id, tenant="a")
        assert (found.title, found.metadata, found.last, found.forked_from) == ("First", {"k": "v"}, "msg_3", "")
        assert (texts(items), more) == (["one", "two", "three"], False)
        assert each.conversations.item(made.id, items[1]["id"], tenant="a") == items[1]


@pytest.mark.parametrize("name", ["", "a b", "x" * 65, 7, "a\n"])
async def test_a_bad_id_is_refused_and_nothing_is_appended(tmp_path: Path, name: Any) -> None:
    async with room(tmp_path) as each:
        made = await each.conversations.create(tenant="a")
        with pytest.raises(InvalidRequestError, match="no id of an item"):
            await each.conversations.append(made.id, [said("good"), {**said("bad"), "id": name}], tenant="a")
        with pytest.raises(InvalidRequestError, match="no `type`"):
            await each.conversations.append(made.id, [{"role": "user"}], tenant="a")
        assert each.conversations.items(made.id, tenant="a") == ([], False)


async def test_items_are_read_in_pages_from_both_ends(tmp_path: Path) -> None:
    async with room(tmp_path) as each:
        made = await each.conversations.create(tenant="a", items=[said(str(n), f"i{n}") for n in range(3)])
        fork = await each.conversations.fork(made.id, tenant="a")
        await each.conversations.append(fork.id, [said(str(n), f"i{n}") for n in range(3, 6)], tenant="a")
        for newest_first, order in ((False, "012345"), (True, "543210")):
            seen, after, more = "", "", True
            while more:
                items, more = each.conversations.items(
                    fork.id, tenant="a", limit=2, after=after, newest_first=newest_first
                )
                seen, after = seen + "".join(texts(items)), items[-1]["id"]
            assert seen == order
        with pytest.raises(NotFoundError, match="i3"):
            each.conversations.items(made.id, tenant="a", after="i3")


async def test_of_two_who_append_at_once_one_wins(tmp_path: Path) -> None:
    async with room(tmp_path) as each:
        made = await each.conversations.create(tenant="a", items=[said("start", "i0")])
        results = await asyncio.gather(
            *(each.conversations.append(made.id, [said(text)], tenant="a", after="i0") for text in "xy"),
            return_exceptions=True,
        )
        conflicts = [result for result in results if isinstance(result, ConflictError)]
        assert [conflict.code for conflict in conflicts] == ["conversation_changed"]
        assert len(each.conversations.items(made.id, tenant="a")[0]) == 2


async def test_the_other_goes_on_in_a_fork_if_he_likes(tmp_path: Path) -> None:
    async with room(tmp_path) as each:
        made = await each.conversations.create(tenant="a", items=[said("start", "i0")], title="T", metadata={"k": "v"})
        first, _ = await each.conversations.append(made.id, [said("x")], tenant="a", after="i0", fork=True)
        second, _ = await each.conversations.append(made.id, [said("y", "iy")], tenant="a", after="i0", fork=True)
        assert first.id == made.id
        assert (second.forked_from, second.title, second.metadata, second.last) == (made.id, "T", {"k": "v"}, "iy")
        assert texts(each.conversations.items(made.id, tenant="a")[0]) == ["start", "x"]
        assert texts(each.conversations.items(second.id, tenant="a")[0]) == ["start", "y"]
        third, _ = await each.conversations.append(made.id, [said("z")], tenant="a", after="", fork=True)
        assert texts(each.conversations.items(third.id, tenant="a")[0]) == ["z"]
        with pytest.raises(NotFoundError, match="nowhere"):
            await each.conversations.append(made.id, [said("z")], tenant="a", after="nowhere", fork=True)


async def test_an_append_can_be_repeated(tmp_path: Path) -> None:
    async with room(tmp_path) as each:
        made = await each.conversations.create(tenant="a")
        for _ in range(2):
            longer, kept = await each.conversations.append(
                made.id, [said("x", "ix"), said("y", "iy"), said("twice", "iy")], tenant="a", after=""
            )
            assert texts(kept) == ["x", "y", "y"]
            assert longer.last == "iy"
        assert texts(each.conversations.items(made.id, tenant="a")[0]) == ["x", "y"]
        _, kept = await each.conversations.append(made.id, [said("other", "ix"), said("new", "in")], tenant="a")
        assert texts(kept) == ["x", "new"]


async def test_a_repeated_fork_takes_what_only_the_other_has(tmp_path: Path) -> None:
    async with room(tmp_path) as each:
        made = await each.conversations.create(tenant="a", items=[said("0", "i0"), said("1", "i1")])
        fork, kept = await each.conversations.append(
            made.id, [said("again", "i1"), said("2", "i2")], tenant="a", after="i0", fork=True
        )
        assert texts(kept) == ["again", "2"]
        assert texts(each.conversations.items(fork.id, tenant="a")[0]) == ["0", "again", "2"]


async def test_another_key_has_none_of_it(tmp_path: Path) -> None:
    async with room(tmp_path) as each:
        made = await each.conversations.create(tenant="a", items=[said("secret", "i0")])
        conversations = each.conversations
        reads = (
            lambda: conversations.get(made.id, tenant="b"),
            lambda: conversations.items(made.id, tenant="b"),
            lambda: conversations.item(made.id, "i0", tenant="b"),
            lambda: conversations.export(made.id, tenant="b"),
            lambda: conversations.summary(made.id, tenant="b"),
            lambda: conversations.memory(made.id, "secret", tenant="b", before="", limit=1),
            lambda: conversations.list(tenant="b", limit=1, after=made.id, newest_first=True),
        )
        for read in reads:
            with pytest.raises(NotFoundError, match=made.id):
                read()
        writes = (
            conversations.append(made.id, [said("x")], tenant="b"),
            conversations.change(made.id, tenant="b", title="x"),
            conversations.delete(made.id, tenant="b"),
            conversations.remove_item(made.id, "i0", tenant="b"),
            conversations.fork(made.id, tenant="b"),
            conversations.keep_summary(made.id, Summary("i0", "x", "m"), tenant="b"),
        )
        for write in writes:
            with pytest.raises(NotFoundError, match=made.id):
                await write
        assert conversations.search("secret", tenant="b", limit=9) == []
        assert conversations.list(tenant="b", limit=9, after="", newest_first=True) == ([], False)
        assert conversations.get(made.id, tenant="a") == made


async def test_conversations_are_listed_by_their_last_change(tmp_path: Path) -> None:
    clock = HandClock()
    async with room(tmp_path, clock) as each:
        made = [await each.conversations.create(tenant="a", title=str(number)) for number in range(4)]
        clock.now += 1
        await each.conversations.append(made[1].id, [said("x")], tenant="a")
        clock.now += 1
        changed = await each.conversations.change(made[0].id, tenant="a", title="new", metadata={"k": "v"})
        assert (changed.title, changed.metadata, changed.updated) == ("new", {"k": "v"}, clock.now)
        titles, after, more = "", "", True
        while more:
            page, more = each.conversations.list(tenant="a", limit=3, after=after, newest_first=True)
            titles, after = titles + " ".join(one.title for one in page) + "|", page[-1].id
        assert titles == "new 1 3|2|"
        page, more = each.conversations.list(tenant="a", limit=2, after=made[2].id, newest_first=False)
        assert ([one.title for one in page], more) == (["3", "1"], True)


async def test_forks_of_forks_share_their_past(tmp_path: Path) -> None:
    async with room(tmp_path) as each:
        last = await each.conversations.create(tenant="a", items=[said("0", "i0")])
        for number in range(1, 30):
            fork = await each.conversations.fork(last.id, tenant="a")
            last, _ = await each.conversations.append(fork.id, [said(str(number), f"i{number}")], tenant="a")
        assert texts(each.conversations.items(last.id, tenant="a")[0]) == [str(number) for number in range(30)]
        middle = await each.conversations.fork(last.id, tenant="a", at="i7")
        assert (middle.last, middle.forked_from) == ("i7", last.id)
        assert texts(each.conversations.items(middle.id, tenant="a")[0]) == [str(number) for number in range(8)]
        page, _ = each.conversations.items(last.id, tenant="a", limit=3, newest_first=True)
        assert texts(page) == ["29", "28", "27"]
        assert each.conversations.wrong(last.id, tenant="a") == ""


async def test_a_summary_counts_while_all_that_it_covers_is_there(tmp_path: Path) -> None:
    async with room(tmp_path) as each:
        made = await each.conversations.create(tenant="a", items=[said(str(n), f"i{n}") for n in range(5)])
        assert each.conversations.summary(made.id, tenant="a") is None
        early, late = Summary("i1", "early", "m:1"), Summary("i3", "late", "m:1")
        for summary in (early, late):
            await each.conversations.keep_summary(made.id, summary, tenant="a")
        with pytest.raises(NotFoundError, match="i9"):
            await each.conversations.keep_summary(made.id, Summary("i9", "none", "m:1"), tenant="a")
        fork = await each.conversations.fork(made.id, tenant="a", at="i2")
        assert each.conversations.summary(made.id, tenant="a") == late
        assert each.conversations.summary(fork.id, tenant="a") == early
        await each.conversations.remove_item(made.id, "i4", tenant="a")
        assert each.conversations.summary(made.id, tenant="a") == late
        await each.conversations.remove_item(made.id, "i2", tenant="a")
        assert each.conversations.summary(made.id, tenant="a") == early
        await each.conversations.remove_item(made.id, "i0", tenant="a")
        assert each.conversations.summary(made.id, tenant="a") is None
        assert each.conversations.summary(fork.id, tenant="a") == early


async def test_a_removed_item_stays_in_forks_and_a_new_fork_does_not_have_it(tmp_path: Path) -> None:
    async with room(tmp_path) as each:
        made = await each.conversations.create(tenant="a", items=[said(str(n), f"i{n}") for n in range(3)])
        fork = await each.conversations.fork(made.id, tenant="a")
        changed = await each.conversations.remove_item(made.id, "i2", tenant="a")
        assert changed.last == "i1"
        again = await each.conversations.fork(made.id, tenant="a")
        for conversation, expected in ((made, ["0", "1"]), (again, ["0", "1"]), (fork, ["0", "1", "2"])):
            assert texts(each.conversations.items(conversation.id, tenant="a")[0]) == expected
            assert each.conversations.wrong(conversation.id, tenant="a") == ""
        with pytest.raises(NotFoundError, match="i2"):
            await each.conversations.remove_item(made.id, "i2", tenant="a")
        for name in ("i0", "i1"):
            changed = await each.conversations.remove_item(made.id, name, tenant="a")
        assert changed.last == ""
        await each.conversations.append(made.id, [said("new", "i9")], tenant="a", after="")
        assert texts(each.conversations.items(made.id, tenant="a")[0]) == ["new"]
        assert each.conversations.wrong(made.id, tenant="a") == ""


async def test_an_export_can_be_imported_by_another(tmp_path: Path) -> None:
    async with room(tmp_path) as each:
        made = await each.conversations.create(tenant="a", items=[said("0", "i0")], metadata={"k": "v"}, title="T")
        fork = await each.conversations.fork(made.id, tenant="a")
        await each.conversations.append(fork.id, [said("1", "i1")], tenant="a")
        document = each.conversations.export(fork.id, tenant="a")
        copy = await each.conversations.import_(document, tenant="b")
        assert copy.id not in (made.id, fork.id)
        assert (copy.title, copy.metadata, copy.last) == ("T", {"k": "v"}, "i1")
        assert texts(each.conversations.items(copy.id, tenant="b")[0]) == ["0", "1"]
        await each.conversations.import_(document, tenant="b")


GOOD: dict[str, Any] = {"object": "conversation.export", "version": 1, "conversation": {}, "items": []}


@pytest.mark.parametrize(
    "change",
    [
        {"object": "list"},
        {"version": 2},
        {"conversation": None},
        {"conversation": {"title": "x" * 513}},
        {"conversation": {"metadata": {"k": 1}}},
        {"conversation": {"metadata": {str(number): "" for number in range(17)}}},
        {"items": [7]},
        {"items": [{"id": "i0"}]},
        {"items": [said("x", "../i")]},
        {"items": [said("x", "i0"), said("y", "i0")]},
    ],
)
async def test_what_is_no_export_is_refused_and_nothing_is_made(tmp_path: Path, change: dict[str, Any]) -> None:
    async with room(tmp_path) as each:
        with pytest.raises(InvalidRequestError):
            await each.conversations.import_({**GOOD, **change}, tenant="a")
        assert each.conversations.list(tenant="a", limit=1, after="", newest_first=True) == ([], False)


async def test_a_changed_past_is_seen(tmp_path: Path) -> None:
    async with room(tmp_path) as each:
        made = await each.conversations.create(tenant="a", items=[said(str(n), f"i{n}") for n in range(3)])
        database = each.conversations._database

        def change(sql: str) -> str:
            database.write_blocking(lambda connection: connection.execute(sql).close())
            return each.conversations.wrong(made.id, tenant="a")

        assert "position 2 is not" in change("UPDATE messages SET item = replace(item, '\"1\"', '\"7\"')")
        assert change("DELETE FROM messages WHERE position = 2") == "Position 2 is missing."
        assert change("DELETE FROM messages WHERE position >= 2") == "Position 2 is missing."
