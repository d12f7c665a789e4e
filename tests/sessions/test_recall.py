"""Search over one's own history, in English and Chinese alike."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from appliance.core.errors import NotFoundError
from appliance.core.words import VERSION
from appliance.sessions import words
from appliance.sessions.texts import MOST_INDEXED, PASSAGE, passage, text_of
from tests.sessions.boxes import room, said, texts

SAID = [
    "The heat pumps of unit 3 need a new filter.",
    "热泵的滤网应当每三个月更换一次。",
    "The part is XR-4500/b, 冷凝器 included.",
    "It's 10:30, isn't it? \"Yes\" – 99.5 % sure * OR NEAR(x)",
    "Nothing of that kind.",
]


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("query", "expected"),
    [
        ("pumping heat", 0),
        ("滤网更换", 1),
        ("滤", 1),
        ("xr4500b", 2),
        ("XR-4500", 2),
        ("冷凝器", 2),
        ("10:30", 3),
        ("99.5", 3),
        ('" OR near : *', 3),
    ],
)
async def test_words_are_found_in_every_language(tmp_path: Path, query: str, expected: int) -> None:
    async with room(tmp_path) as each:
        made = await each.conversations.create(tenant="a", items=[said(text) for text in SAID])
        await each.conversations.create(tenant="b", items=[said(text) for text in SAID])
        found = each.conversations.search(query, tenant="a", limit=1)
        assert [(one.conversation, one.text) for one in found] == [(made.id, SAID[expected])]
        assert texts([found[0].item]) == [SAID[expected]]
        assert texts(each.conversations.memory(made.id, query, tenant="a", before="", limit=1)) == [SAID[expected]]


@pytest.mark.anyio
@pytest.mark.parametrize("query", ["", "  ", "?!", "🙂", "unheardof", "\x00", '"""'])
async def test_a_question_without_known_words_finds_nothing(tmp_path: Path, query: str) -> None:
    async with room(tmp_path) as each:
        made = await each.conversations.create(tenant="a", items=[said(text) for text in SAID])
        assert each.conversations.search(query, tenant="a", limit=9) == []
        assert each.conversations.memory(made.id, query, tenant="a", before="", limit=9) == []


@pytest.mark.anyio
async def test_memory_is_of_the_past_of_one_conversation_alone(tmp_path: Path) -> None:
    async with room(tmp_path) as each:
        made = await each.conversations.create(tenant="a", items=[said(f"filter {n}", f"i{n}") for n in range(4)])
        await each.conversations.create(tenant="a", items=[said("filter elsewhere")])
        fork = await each.conversations.fork(made.id, tenant="a", at="i1")
        await each.conversations.append(fork.id, [said("filter forked", "i9")], tenant="a")

        def found(name: str, before: str) -> set[str]:
            return set(texts(each.conversations.memory(name, "filter", tenant="a", before=before, limit=9)))

        assert found(fork.id, "") == {"filter 0", "filter 1", "filter forked"}
        assert found(fork.id, "i9") == {"filter 0", "filter 1"}
        assert found(made.id, "i1") == {"filter 0"}
        await each.conversations.remove_item(made.id, "i0", tenant="a")
        assert found(made.id, "i2") == {"filter 1"}
        assert found(fork.id, "i1") == {"filter 0"}
        with pytest.raises(NotFoundError, match="i7"):
            found(made.id, "i7")


@pytest.mark.anyio
async def test_frequent_words_are_left_out_beside_rare_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(words, "POSTING_BUDGET", 3)
    async with room(tmp_path) as each:
        many = [said(f"filter number{n}") for n in range(6)]
        await each.conversations.create(tenant="a", items=[*many, said("a rare filter")])
        assert texts(one.item for one in each.conversations.search("rare filter", tenant="a", limit=9)) == [
            "a rare filter"
        ]
        assert len(each.conversations.search("filter", tenant="a", limit=9)) == 7


@pytest.mark.anyio
async def test_an_index_of_another_version_is_made_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with room(tmp_path) as each:
        await each.upkeep.once()
        made = await each.conversations.create(tenant="a", items=[said("kept words", "i0")])
        fork = await each.conversations.fork(made.id, tenant="a")
        await each.conversations.delete(made.id, tenant="a")
        monkeypatch.setattr(words, "VERSION", VERSION + 1)
        monkeypatch.setattr(words, "passage_terms", lambda _: ["other"])
        await each.upkeep.once()
        assert each.conversations.search("kept", tenant="a", limit=1) == []
        [found] = each.conversations.search("other", tenant="a", limit=2)
        assert found.conversation == fork.id


@pytest.mark.parametrize(
    ("item", "expected"),
    [
        (said("one"), "one"),
        ({"type": "message", "content": "plain"}, "plain"),
        ({"type": "message", "content": [{"type": "refusal", "refusal": "no"}, "odd", {"text": 7}]}, "no"),
        ({"type": "function_call", "name": "f", "arguments": "{}"}, "f\n\n{}"),
        ({"type": "function_call_output", "output": "ok"}, "ok"),
        ({"type": "function_call_output", "output": [{"type": "input_text", "text": "ok"}]}, "ok"),
        ({"type": "reasoning", "summary": [{"text": "short"}], "content": [{"text": "long"}]}, "long\n\nshort"),
        ({"type": "mcp_call", "name": "f", "arguments": "", "output": None, "error": "bad"}, "f\n\nbad"),
        ({"type": "odd", "content": {"text": "x"}, "name": 3}, ""),
    ],
)
def test_the_words_of_an_item(item: dict[str, Any], expected: str) -> None:
    assert text_of(item) == expected


def test_no_item_is_too_long_to_be_found() -> None:
    assert len(text_of(said("x" * (MOST_INDEXED + 1)))) == MOST_INDEXED


def test_the_passage_is_where_the_words_are() -> None:
    text = "a " * 300 + "the filter of the pump " + "b " * 300
    found = passage(text, frozenset({"filter", "pump"}))
    assert "filter of the pump" in found
    assert len(found) <= PASSAGE
    assert passage(text, frozenset()) == text[:PASSAGE].strip()
    assert passage("short", frozenset({"x"})) == "short"
