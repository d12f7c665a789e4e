"""Conversations by the official client; the extensions; and what the door refuses."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import openai
import pytest

from appliance.api.openai.items import MOST_DEPTH
from tests.api.boxes import ScriptedBox, scripted_box

pytestmark = pytest.mark.anyio

PATH = "/v1/conversations"
HELLO = {"type": "message", "role": "user", "content": "Hello"}


@pytest.fixture
async def client(box: ScriptedBox) -> AsyncIterator[openai.AsyncOpenAI]:
    async with openai.AsyncOpenAI(base_url=f"{box.url}/v1", api_key="any", max_retries=0, timeout=60) as each:
        yield each


async def begin(box: ScriptedBox, *texts: str, **fields: Any) -> dict[str, Any]:
    """Begin a conversation with messages `i0`, `i1`, …"""
    items = [{"id": f"i{n}", "role": "user", "content": text} for n, text in enumerate(texts)]
    reply = await box.ask("POST", PATH, {"items": items, **fields})
    assert reply.status == 200, reply.json()
    made: dict[str, Any] = reply.json()
    return made


async def test_a_conversation_is_made_shown_changed_and_erased(client: openai.AsyncOpenAI) -> None:
    made = await client.conversations.create(metadata={"site": "north"}, items=[{"role": "user", "content": "Hello"}])
    assert made.id.startswith("conv_")
    assert (made.object, made.metadata) == ("conversation", {"site": "north"})
    assert await client.conversations.retrieve(made.id) == made
    changed = await client.conversations.update(made.id, metadata={}, extra_body={"title": "Filters"})
    assert (changed.metadata, (changed.model_extra or {})["title"]) == ({}, "Filters")
    gone = await client.conversations.delete(made.id)
    assert (gone.id, gone.deleted, gone.object) == (made.id, True, "conversation.deleted")
    with pytest.raises(openai.NotFoundError, match=made.id):
        await client.conversations.retrieve(made.id)


async def test_items_are_appended_listed_shown_and_erased(client: openai.AsyncOpenAI) -> None:
    made = await client.conversations.create()
    for number in range(3):
        added = await client.conversations.items.create(
            made.id,
            items=[
                {"type": "message", "role": "user", "content": [{"type": "input_text", "text": f"ask {number}"}]},
                {"type": "message", "role": "assistant", "content": f"say {number}"},
            ],
            include=["file_search_call.results", "reasoning.encrypted_content"],
        )
        assert [each.type for each in added.data] == ["message", "message"]
        assert (added.first_id, added.last_id) == (added.data[0].id, added.data[1].id)
    listed = [each async for each in client.conversations.items.list(made.id, limit=4, order="asc")]
    said = [each.content[0].text for each in listed if each.type == "message"]  # type: ignore[union-attr]
    assert said == ["ask 0", "say 0", "ask 1", "say 1", "ask 2", "say 2"]
    assert [each.id async for each in client.conversations.items.list(made.id)] == [each.id for each in listed][::-1]
    last = listed[-1]
    assert last.id is not None
    assert await client.conversations.items.retrieve(last.id, conversation_id=made.id) == last
    assert last.type == "message"
    assert (last.role, last.status, last.content[0].type) == ("assistant", "completed", "output_text")
    changed = await client.conversations.items.delete(last.id, conversation_id=made.id)
    assert (changed.id, (changed.model_extra or {})["last_item_id"]) == (made.id, listed[-2].id)
    with pytest.raises(openai.NotFoundError, match=last.id):
        await client.conversations.items.retrieve(last.id, conversation_id=made.id)


ITEMS: list[dict[str, Any]] = [
    {
        "type": "message",
        "role": "assistant",
        "content": [
            {
                "type": "output_text",
                "text": "See there.",
                "annotations": [{"type": "file_citation", "file_id": "file-1", "filename": "a.txt", "index": 3}],
            },
            {"type": "refusal", "refusal": "No."},
        ],
        "status": "incomplete",
    },
    {"type": "function_call", "call_id": "call_1", "name": "f", "arguments": "{}"},
    {"type": "function_call_output", "call_id": "call_1", "output": "7"},
    {"type": "function_call_output", "call_id": "call_1", "output": [{"type": "input_text", "text": "7"}]},
    {"type": "reasoning", "summary": [{"type": "summary_text", "text": "short"}]},
    {"type": "reasoning", "summary": [], "content": [{"type": "reasoning_text", "text": "long"}]},
    {
        "type": "file_search_call",
        "queries": ["q"],
        "status": "completed",
        "results": [{"file_id": "file-1", "filename": "a", "score": 0.5, "text": "t", "attributes": {"k": 1}}],
    },
    {"type": "mcp_call", "server_label": "s", "name": "f", "arguments": "{}", "output": "7"},
    {"type": "mcp_list_tools", "server_label": "s", "tools": [{"name": "f", "input_schema": {"type": "object"}}]},
    {"type": "mcp_approval_request", "server_label": "s", "name": "f", "arguments": "{}"},
    {"type": "mcp_approval_response", "approval_request_id": "mcpr_1", "approve": True},
]


@pytest.mark.parametrize("item", ITEMS, ids=lambda each: each["type"])
async def test_every_kind_of_item_comes_back_as_it_was(
    box: ScriptedBox, client: openai.AsyncOpenAI, item: dict[str, Any]
) -> None:
    made = await begin(box)
    reply = await box.ask("POST", f"{PATH}/{made['id']}/items", {"items": [{**item, "id": None}]})
    [kept] = reply.json()["data"]
    assert item.items() <= {**kept, "content": item.get("content", kept.get("content"))}.items()
    [shown] = [each async for each in client.conversations.items.list(made["id"])]
    assert (shown.id, shown.type) == (kept["id"], item["type"])
    again = await box.ask("POST", f"{PATH}/{made['id']}/items", {"items": [kept]})
    assert again.json()["data"] == [kept]
    exported = (await box.ask("GET", f"{PATH}/{made['id']}/export")).json()
    assert exported["items"] == [kept]
    copy = (await box.ask("POST", f"{PATH}/import", exported)).json()
    assert (await box.ask("GET", f"{PATH}/{copy['id']}/items/{kept['id']}")).json() == kept


def nested(levels: int) -> dict[str, Any]:
    value: dict[str, Any] = {}
    for _ in range(levels):
        value = {"a": value}
    return value


@pytest.mark.parametrize(
    ("item", "param", "words"),
    [
        ({"type": "custom_tool_call", "input": "x"}, "items[0].type", "custom_tool_call"),
        ({"type": "image_generation_call"}, "items[0].type", "image_generation_call"),
        ({**HELLO, "content": [{"type": "input_image", "image_url": "x"}]}, "items[0].content[0].type", "input_image"),
        ({**HELLO, "content": [{"type": "input_file", "file_id": "x"}]}, "items[0].content[0].type", "read text"),
        (
            {"type": "function_call_output", "call_id": "c", "output": [{"type": "input_image"}]},
            "items[0].output[0].type",
            "read text",
        ),
        ({**HELLO, "role": "critic"}, "items[0].role", "critic"),
        ({**HELLO, "id": "a b"}, "items[0].id", ""),
        ({**HELLO, "content": "\x00"}, "items[0].content", "NUL"),
        ({**HELLO, "colour": "red"}, "items[0].colour", "colour"),
        ({"content": "no role"}, "items[0]", "type"),
        (7, "items[0]", "object"),
        (
            {
                "type": "mcp_list_tools",
                "server_label": "s",
                "tools": [{"name": "f", "input_schema": nested(MOST_DEPTH)}],
            },
            "items",
            "deep",
        ),
    ],
)
async def test_what_cannot_be_kept_is_refused_by_name_and_nothing_is_appended(
    box: ScriptedBox, item: Any, param: str, words: str
) -> None:
    made = await begin(box, "start")
    for path, document in (
        (f"{PATH}/{made['id']}/items", {}),
        (PATH, {}),
        (f"{PATH}/import", {"object": "conversation.export", "version": 1, "conversation": {}}),
    ):
        reply = await box.ask("POST", path, {**document, "items": [item]})
        assert reply.status == 400
        assert reply.error["param"] == param
        assert words in reply.error["message"]
    assert (await box.ask("GET", PATH)).json()["data"] == [made]
    assert len((await box.ask("GET", f"{PATH}/{made['id']}/items")).json()["data"]) == 1


async def test_of_two_clients_one_wins_and_the_other_may_fork(box: ScriptedBox) -> None:
    made = await begin(box, "start")
    path = f"{PATH}/{made['id']}/items"
    assert made["last_item_id"] == "i0"
    assert (await box.ask("POST", path, {"items": [HELLO], "after": "i0"})).status == 200
    refused = await box.ask("POST", path, {"items": [HELLO], "after": "i0"})
    assert (refused.status, refused.error["code"], refused.error["param"]) == (409, "conversation_changed", "after")
    forked = (await box.ask("POST", path, {"items": [HELLO], "after": "i0", "fork": True})).json()
    assert forked["conversation_id"] != made["id"]
    fork = (await box.ask("GET", f"{PATH}/{forked['conversation_id']}")).json()
    assert fork["forked_from"] == made["id"]
    items = (await box.ask("GET", f"{PATH}/{fork['id']}/items?order=asc")).json()["data"]
    assert [each["id"] for each in items] == ["i0", forked["first_id"]]


async def test_a_conversation_is_forked_at_an_item(box: ScriptedBox) -> None:
    made = await begin(box, "0", "1", "2", title="T")
    for body, last in (({"at": "i1"}, "i1"), ({}, "i2"), (None, "i2"), ({"at": ""}, None)):
        fork = (await box.ask("POST", f"{PATH}/{made['id']}/fork", body)).json()
        assert (fork["last_item_id"], fork["forked_from"], fork["title"]) == (last, made["id"], "T")
    assert (await box.ask("POST", f"{PATH}/{made['id']}/fork", {"at": "i9"})).status == 404


async def test_conversations_are_listed_in_pages(box: ScriptedBox) -> None:
    made = [(await begin(box, title=str(number)))["id"] for number in range(3)]
    page = (await box.ask("GET", f"{PATH}?limit=2")).json()
    assert ([each["id"] for each in page["data"]], page["has_more"]) == (made[:0:-1], True)
    page = (await box.ask("GET", f"{PATH}?limit=2&after={page['last_id']}")).json()
    assert ([each["id"] for each in page["data"]], page["has_more"]) == (made[:1], False)
    for query in ("limit=0", "limit=101", "order=up", "colour=red", "limit=1&limit=2"):
        assert (await box.ask("GET", f"{PATH}?{query}")).status == 400


async def test_words_are_found_in_ones_own_conversations(box: ScriptedBox) -> None:
    made = await begin(box, "The filter of unit 3", "热泵的滤网应当更换")
    for query, expected in (("filters", "i0"), ("滤网更换", "i1")):
        [found] = (await box.ask("POST", f"{PATH}/search", {"query": query})).json()["data"]
        assert (found["conversation_id"], found["item"]["id"]) == (made["id"], expected)
        assert found["text"] == found["item"]["content"][0]["text"]
    assert (await box.ask("POST", f"{PATH}/search", {"query": "turbine"})).json()["data"] == []
    assert (await box.ask("POST", f"{PATH}/search", {"query": ""})).status == 400


async def test_what_is_no_export_is_refused(box: ScriptedBox) -> None:
    good = {"object": "conversation.export", "version": 1, "conversation": {}, "items": []}
    for change in (
        {"object": "x"},
        {"version": 2},
        {"conversation": {"title": 7}},
        {"items": 7},
        {"items": [{**HELLO, "id": "i0"}, {**HELLO, "id": "i0"}]},
        {"more": 1},
    ):
        assert (await box.ask("POST", f"{PATH}/import", {**good, **change})).status == 400
    assert (await box.ask("GET", PATH)).json()["data"] == []


async def test_each_key_has_its_own(tmp_path: Path) -> None:
    async with scripted_box(tmp_path, require_api_key=True) as box:
        assert box.keys is not None
        first, second = (
            {"authorization": f"Bearer {box.keys.create(name, ['inference'])[1]}"} for name in ("first", "second")
        )
        body = {"items": [{"id": "i0", "role": "user", "content": "secret"}]}
        made = (await box.ask("POST", PATH, body, headers=first)).json()
        one = f"{PATH}/{made['id']}"
        for method, path, document in (
            ("GET", one, None),
            ("POST", one, {"title": "mine"}),
            ("DELETE", one, None),
            ("POST", f"{one}/fork", None),
            ("GET", f"{one}/export", None),
            ("GET", f"{one}/items", None),
            ("POST", f"{one}/items", {"items": [HELLO]}),
            ("GET", f"{one}/items/i0", None),
            ("DELETE", f"{one}/items/i0", None),
            ("GET", f"{PATH}?after={made['id']}", None),
        ):
            assert (await box.ask(method, path, document, headers=second)).status == 404, (method, path)
            assert (await box.ask(method, path, document)).status == 401
        assert (await box.ask("GET", PATH, headers=second)).json()["data"] == []
        assert (await box.ask("POST", f"{PATH}/search", {"query": "secret"}, headers=second)).json()["data"] == []
        assert (await box.ask("GET", one, headers=first)).json() == made
