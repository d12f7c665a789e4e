"""Vector stores, their files and batches, and search, by the official client; and what the door refuses."""

from __future__ import annotations

import io
from collections.abc import AsyncIterator
from typing import Any

import openai
import pytest
from openai.types import VectorStore

from appliance.core.errors import StorageError
from appliance.core.retrieval import Comparison, Compound
from tests.api.boxes import ScriptedBox, scripted_box

pytestmark = pytest.mark.anyio


@pytest.fixture
async def client(box: ScriptedBox) -> AsyncIterator[openai.AsyncOpenAI]:
    async with openai.AsyncOpenAI(base_url=f"{box.url}/v1", api_key="any", max_retries=0, timeout=60) as each:
        yield each


@pytest.fixture
async def store(client: openai.AsyncOpenAI) -> VectorStore:
    return await client.vector_stores.create(name="manuals")


async def upload(client: openai.AsyncOpenAI, text: str = "heat pumps move heat", name: str = "a.txt") -> str:
    return (await client.files.create(file=(name, text.encode()), purpose="assistants")).id


async def test_a_store_is_made_shown_changed_and_erased(client: openai.AsyncOpenAI) -> None:
    made = await client.vector_stores.create(
        name="manuals",
        description="of the north",
        metadata={"site": "north"},
        expires_after={"anchor": "last_active_at", "days": 7},
    )
    assert made.id.startswith("vs_")
    assert (made.object, made.name, made.status, made.usage_bytes) == ("vector_store", "manuals", "completed", 0)
    assert made.metadata == {"site": "north"}
    assert made.expires_after is not None
    assert made.expires_after.days == 7
    assert made.expires_at == (made.last_active_at or 0) + 7 * 86_400
    assert made.file_counts.total == 0
    assert await client.vector_stores.retrieve(made.id) == made
    changed = await client.vector_stores.update(made.id, name="old", expires_after=None)
    assert (changed.name, changed.expires_after, changed.expires_at) == ("old", None, None)
    assert changed.metadata == {"site": "north"}
    assert (await client.vector_stores.update(made.id, metadata={})).metadata == {}
    gone = await client.vector_stores.delete(made.id)
    assert (gone.id, gone.deleted, gone.object) == (made.id, True, "vector_store.deleted")
    with pytest.raises(openai.NotFoundError, match=made.id):
        await client.vector_stores.retrieve(made.id)


async def test_stores_are_listed_in_pages(client: openai.AsyncOpenAI) -> None:
    made = [(await client.vector_stores.create(name=str(each))).id for each in range(5)]
    assert [each.id async for each in client.vector_stores.list(limit=2, order="asc")] == made
    assert [each.id async for each in client.vector_stores.list(limit=2)] == made[::-1]


async def test_a_store_without_a_body_is_a_store_without_a_name(box: ScriptedBox) -> None:
    reply = await box.ask("POST", "/v1/vector_stores")
    assert (reply.status, reply.json()["name"]) == (200, "")


async def test_a_store_can_be_made_of_files(client: openai.AsyncOpenAI) -> None:
    files = [await upload(client) for _ in range(2)]
    made = await client.vector_stores.create(file_ids=[*files, files[0]])
    assert made.file_counts.total == 2
    assert {each.id async for each in client.vector_stores.files.list(made.id)} == set(files)


async def test_a_store_of_a_file_that_is_not_there_is_not_made(client: openai.AsyncOpenAI, box: ScriptedBox) -> None:
    with pytest.raises(openai.NotFoundError, match="file-none"):
        await client.vector_stores.create(file_ids=[await upload(client), "file-none"])
    file = await upload(client)
    box.stores.failures.append(StorageError("The disk is full."))
    with pytest.raises(openai.InternalServerError):
        await client.vector_stores.create(file_ids=[file])
    assert [each async for each in client.vector_stores.list()] == []


async def test_a_file_is_uploaded_and_taken_in_with_one_call(client: openai.AsyncOpenAI, store: VectorStore) -> None:
    taken = await client.vector_stores.files.upload_and_poll(
        vector_store_id=store.id,
        file=("pump.txt", io.BytesIO(b"heat pumps move heat")),
        attributes={"unit": "pump 3", "year": 2024, "weight": 1.5, "old": False},
        chunking_strategy={"type": "static", "static": {"max_chunk_size_tokens": 200, "chunk_overlap_tokens": 100}},
        poll_interval_ms=10,
    )
    assert (taken.object, taken.status, taken.last_error) == ("vector_store.file", "completed", None)
    assert taken.vector_store_id == store.id
    assert taken.attributes == {"unit": "pump 3", "year": 2024, "weight": 1.5, "old": False}
    assert taken.chunking_strategy is not None
    assert taken.chunking_strategy.to_dict() == {
        "type": "static",
        "static": {"max_chunk_size_tokens": 200, "chunk_overlap_tokens": 100},
    }
    counts = (await client.vector_stores.retrieve(store.id)).file_counts
    assert (counts.completed, counts.total) == (1, 1)


async def test_a_file_in_a_store_is_shown_changed_read_and_taken_out(
    client: openai.AsyncOpenAI, store: VectorStore
) -> None:
    file = await upload(client)
    added = await client.vector_stores.files.create(store.id, file_id=file)
    assert (added.id, added.status, added.attributes) == (file, "in_progress", {})
    assert (await client.vector_stores.files.retrieve(file, vector_store_id=store.id)).status == "completed"
    changed = await client.vector_stores.files.update(file, vector_store_id=store.id, attributes={"year": 2025})
    assert changed.attributes == {"year": 2025}
    content = [each async for each in client.vector_stores.files.content(file, vector_store_id=store.id)]
    assert [(each.type, each.text) for each in content] == [("text", "heat pumps move heat")]
    gone = await client.vector_stores.files.delete(file, vector_store_id=store.id)
    assert (gone.id, gone.deleted, gone.object) == (file, True, "vector_store.file.deleted")
    with pytest.raises(openai.NotFoundError, match=file):
        await client.vector_stores.files.retrieve(file, vector_store_id=store.id)
    assert (await client.files.retrieve(file)).id == file


async def test_files_of_a_store_are_listed_by_status(
    client: openai.AsyncOpenAI, box: ScriptedBox, store: VectorStore
) -> None:
    box.stores.held = True
    files = [await upload(client) for _ in range(3)]
    for each in files:
        await client.vector_stores.files.create(store.id, file_id=each)
    listed = [each.id async for each in client.vector_stores.files.list(store.id, filter="in_progress", limit=2)]
    assert listed == files[::-1]
    assert [each async for each in client.vector_stores.files.list(store.id, filter="completed")] == []
    assert (await client.vector_stores.retrieve(store.id)).status == "in_progress"


async def test_a_batch_is_uploaded_and_taken_in_with_one_call(client: openai.AsyncOpenAI, store: VectorStore) -> None:
    batch = await client.vector_stores.file_batches.upload_and_poll(
        store.id, files=[(f"{each}.txt", f"text {each}".encode()) for each in range(4)], poll_interval_ms=10
    )
    assert (batch.object, batch.status) == ("vector_store.files_batch", "completed")
    assert (batch.file_counts.completed, batch.file_counts.total) == (4, 4)
    listed = [
        each.id
        async for each in client.vector_stores.file_batches.list_files(batch.id, vector_store_id=store.id, limit=3)
    ]
    assert len(set(listed)) == 4


async def test_the_files_of_a_batch_may_have_attributes_of_their_own(
    client: openai.AsyncOpenAI, store: VectorStore
) -> None:
    files = [await upload(client) for _ in range(2)]
    await client.vector_stores.file_batches.create(
        store.id,
        files=[
            {"file_id": files[0], "attributes": {"year": 2024}},
            {"file_id": files[1], "chunking_strategy": {"type": "auto"}},
        ],
    )
    found = {each.id: each.attributes async for each in client.vector_stores.files.list(store.id)}
    assert found == {files[0]: {"year": 2024}, files[1]: {}}


async def test_a_batch_can_be_cancelled(client: openai.AsyncOpenAI, box: ScriptedBox, store: VectorStore) -> None:
    box.stores.held = True
    file = await upload(client)
    batch = await client.vector_stores.file_batches.create(store.id, file_ids=[file])
    assert batch.status == "in_progress"
    cancelled = await client.vector_stores.file_batches.cancel(batch.id, vector_store_id=store.id)
    assert (cancelled.status, cancelled.file_counts.cancelled) == ("cancelled", 1)
    found = await client.vector_stores.file_batches.retrieve(batch.id, vector_store_id=store.id)
    assert found.status == "cancelled"


async def test_passages_are_found_with_their_citations(
    client: openai.AsyncOpenAI, box: ScriptedBox, store: VectorStore
) -> None:
    for text, year in (("heat pumps move heat", 2024), ("filters catch dust", 2025), ("heat rises", 2025)):
        file = await upload(client, text, f"{year}.txt")
        await client.vector_stores.files.create(store.id, file_id=file, attributes={"year": year})
    found = await client.vector_stores.search(
        store.id, query="heat pumps", ranking_options={"ranker": "none", "score_threshold": 0.2}
    )
    assert [each.content[0].text for each in found.data] == ["heat pumps move heat", "heat rises"]
    best = found.data[0]
    assert (best.filename, best.attributes, best.score, best.content[0].type) == ("2024.txt", {"year": 2024}, 1, "text")
    assert best.model_extra == {"page": 3, "heading": ["Manual", "Filter"], "start": 0, "end": 20}
    assert found.object == "vector_store.search_results.page"
    assert found.model_extra == {
        "search_query": ["heat pumps"],
        "has_more": False,
        "next_page": None,
        "legs": ["keyword", "semantic"],
    }
    asked = box.stores.searches[-1]
    assert (asked.rerank, asked.threshold, asked.limit, asked.mode, asked.explain) == (False, 0.2, 10, "hybrid", False)
    assert asked.request_id.startswith("req-")


async def test_pages_follow_each_other(client: openai.AsyncOpenAI, box: ScriptedBox, store: VectorStore) -> None:
    files = [await upload(client, f"heat {each}") for each in range(5)]
    await client.vector_stores.file_batches.create(store.id, file_ids=files)
    seen: list[str] = []
    after: dict[str, str | None] = {}
    for _ in range(3):
        document = {"query": ["heat", "warmth"], "max_num_results": 2, **after}
        answer = (await box.ask("POST", f"/v1/vector_stores/{store.id}/search", document)).json()
        assert answer["search_query"] == ["heat", "warmth"]
        seen += [each["file_id"] for each in answer["data"]]
        after = {"after": answer["next_page"]}
        assert answer["has_more"] is (answer["next_page"] is not None)
    assert (sorted(seen), after) == (sorted(files), {"after": None})


async def test_filters_reach_the_search(client: openai.AsyncOpenAI, box: ScriptedBox, store: VectorStore) -> None:
    for year in (2024, 2025):
        file = await upload(client, "heat")
        await client.vector_stores.files.create(store.id, file_id=file, attributes={"year": year, "old": year < 2025})
    found = await client.vector_stores.search(
        store.id, query="heat", filters={"type": "eq", "key": "year", "value": 2024}
    )
    assert [each.attributes for each in found.data] == [{"year": 2024, "old": True}]
    inner: Any = {"type": "or", "filters": [{"type": "in", "key": "year", "value": [2024, "2025"]}]}
    outer: Any = {"type": "and", "filters": [{"type": "ne", "key": "old", "value": True}, inner]}
    await client.vector_stores.search(store.id, query="heat", filters=outer)
    assert box.stores.searches[-1].filters == Compound(
        "and",
        (Comparison("ne", "old", True), Compound("or", (Comparison("in", "year", (2024, "2025")),))),
    )


async def test_a_hit_can_be_explained(client: openai.AsyncOpenAI, store: VectorStore) -> None:
    await client.vector_stores.files.create(store.id, file_id=await upload(client, "heat"))
    found = await client.vector_stores.search(store.id, query="heat", extra_body={"explain": True})
    assert (found.data[0].model_extra or {})["explanation"] == {
        "keyword_rank": 1,
        "keyword_score": 2.5,
        "semantic_rank": None,
        "semantic_score": None,
        "fused_score": 1.0,
        "rerank_score": None,
    }


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"mode": "keyword"}, {"mode": "keyword"}),
        ({"ranking_options": {"hybrid_search": {"embedding_weight": 1, "text_weight": 1}}}, {"mode": "hybrid"}),
        ({"ranking_options": {"hybrid_search": {"embedding_weight": 0, "text_weight": 0.5}}}, {"mode": "keyword"}),
        ({"ranking_options": {"hybrid_search": {"embedding_weight": 0.5, "text_weight": 0}}}, {"mode": "semantic"}),
        ({"ranking_options": {"ranker": "auto"}}, {"rerank": None}),
        ({"rewrite_query": False, "max_tokens": 500, "timeout_s": 2}, {"most_tokens": 500, "deadline_s": 2}),
    ],
)
async def test_options_reach_the_search(
    box: ScriptedBox, store: VectorStore, fields: dict[str, Any], expected: dict[str, Any]
) -> None:
    reply = await box.ask("POST", f"/v1/vector_stores/{store.id}/search", {"query": "heat", **fields})
    assert reply.status == 200
    asked = box.stores.searches[-1]
    assert {name: getattr(asked, name) for name in expected} == expected


def nested(depth: int) -> dict[str, Any]:
    found: dict[str, Any] = {"type": "eq", "key": "a", "value": 1}
    for _ in range(depth):
        found = {"type": "and", "filters": [found]}
    return found


ONE = {"type": "eq", "key": "a", "value": 1}
BAD_SEARCHES: list[tuple[dict[str, Any], str, str]] = [
    ({}, "", "invalid_value"),
    ({"query": ""}, "query", "invalid_value"),
    ({"query": []}, "query", "invalid_value"),
    ({"query": ["a"] * 9}, "query", "invalid_value"),
    ({"query": "a", "max_num_results": 0}, "max_num_results", "invalid_value"),
    ({"query": "a", "max_num_results": 51}, "max_num_results", "invalid_value"),
    ({"query": "a", "rewrite_query": True}, "rewrite_query", "unsupported_parameter"),
    ({"query": "a", "after": "-1"}, "after", "invalid_value"),
    ({"query": "a", "after": "1001"}, "after", "invalid_value"),
    ({"query": "a", "colour": "red"}, "colour", "unknown_parameter"),
    ({"query": "a", "ranking_options": {"ranker": "best"}}, "ranking_options.ranker", "invalid_value"),
    (
        {"query": "a", "ranking_options": {"hybrid_search": {"embedding_weight": 1, "text_weight": 2}}},
        "ranking_options.hybrid_search",
        "unsupported_parameter",
    ),
    (
        {"query": "a", "ranking_options": {"hybrid_search": {"embedding_weight": 0, "text_weight": 0}}},
        "ranking_options.hybrid_search",
        "unsupported_parameter",
    ),
    ({"query": "a", "filters": nested(8)}, "filters", "invalid_value"),
    ({"query": "a", "filters": nested(300)}, "filters", "invalid_value"),
    ({"query": "a", "filters": {"type": "or", "filters": [ONE] * 64}}, "filters", "invalid_value"),
    ({"query": "a", "filters": {"type": "or", "filters": []}}, "filters.filters", "invalid_value"),
    ({"query": "a", "filters": {"type": "or"}}, "filters", "invalid_value"),
    ({"query": "a", "filters": {**ONE, "filters": [ONE]}}, "filters", "invalid_value"),
    ({"query": "a", "filters": {"type": "and", "filters": [ONE], "key": "a"}}, "filters", "invalid_value"),
    ({"query": "a", "filters": {"type": "eq", "key": "a"}}, "filters", "invalid_value"),
    ({"query": "a", "filters": {"type": "eq", "key": "a", "value": [1]}}, "filters", "invalid_value"),
    ({"query": "a", "filters": {"type": "in", "key": "a", "value": 1}}, "filters", "invalid_value"),
    ({"query": "a", "filters": {"type": "gt", "key": "a", "value": True}}, "filters", "invalid_value"),
    ({"query": "a", "filters": {"type": "like", "key": "a", "value": "x"}}, "filters.type", "invalid_value"),
    ({"query": "a", "filters": {"type": "eq", "key": "k" * 65, "value": 1}}, "filters.key", "invalid_value"),
]


@pytest.mark.parametrize(("document", "param", "code"), BAD_SEARCHES)
async def test_a_bad_search_is_refused_at_the_door(
    box: ScriptedBox, store: VectorStore, document: dict[str, Any], param: str, code: str
) -> None:
    reply = await box.ask("POST", f"/v1/vector_stores/{store.id}/search", document)
    assert (reply.status, reply.error["code"], reply.error["param"] or "") == (400, code, param)
    assert box.stores.searches == []


async def test_a_filter_without_a_bottom_is_refused(box: ScriptedBox, store: VectorStore) -> None:
    deep = b'{"type": "and", "filters": [' * 5000 + b"1" + b"]}" * 5000
    body = b'{"query": "a", "filters": ' + deep + b"}"
    reply = await box.ask("POST", f"/v1/vector_stores/{store.id}/search", body=body)
    assert reply.status == 400


MANY = {f"k{each}": "v" for each in range(17)}
STATIC = {"type": "static", "static": {"max_chunk_size_tokens": 200, "chunk_overlap_tokens": 100}}
BAD_STORES: list[tuple[dict[str, Any], str]] = [
    ({"metadata": MANY}, "metadata"),
    ({"metadata": {"k" * 65: "v"}}, "metadata"),
    ({"metadata": {"": "v"}}, "metadata"),
    ({"metadata": {"k": "v" * 513}}, "metadata"),
    ({"metadata": {"k": 1}}, "metadata"),
    ({"expires_after": {"anchor": "created_at", "days": 1}}, "expires_after.anchor"),
    ({"expires_after": {"anchor": "last_active_at", "days": 366}}, "expires_after.days"),
    ({"name": "n" * 257}, "name"),
    ({"file_ids": [""]}, "file_ids"),
    ({"file_ids": ["f"] * 2001}, "file_ids"),
    ({"chunking_strategy": {"type": "semantic"}}, "chunking_strategy"),
    ({"chunking_strategy": {"type": "static"}}, "chunking_strategy"),
    ({"chunking_strategy": {"type": "static", "static": STATIC["static"] | {"max_chunk_size_tokens": 99}}}, "chunk"),  # type: ignore[operator]
    ({"chunking_strategy": {"type": "static", "static": STATIC["static"] | {"max_chunk_size_tokens": 4097}}}, "chunk"),  # type: ignore[operator]
    ({"chunking_strategy": {"type": "static", "static": STATIC["static"] | {"chunk_overlap_tokens": 101}}}, "chunk"),  # type: ignore[operator]
]


@pytest.mark.parametrize(("document", "param"), BAD_STORES)
async def test_a_bad_store_is_refused_and_not_made(box: ScriptedBox, document: dict[str, Any], param: str) -> None:
    reply = await box.ask("POST", "/v1/vector_stores", document)
    assert (reply.status, reply.error["code"]) == (400, "invalid_value")
    assert (reply.error["param"] or "").startswith(param)
    assert (await box.ask("GET", "/v1/vector_stores")).json()["data"] == []


BAD_FILES: list[dict[str, Any]] = [
    {},
    {"file_id": "f", "attributes": MANY},
    {"file_id": "f", "attributes": {"k": "v" * 513}},
    {"file_id": "f", "attributes": {"k": None}},
    {"file_id": "f", "attributes": {"k": ["v"]}},
    {"file_id": "f", "attributes": {"k": 2**63}},
    {"file_id": "f", "attributes": {'a"b': 1}},
    {"file_id": "f", "attributes": {"a\\b": 1}},
    {"file_id": "f", "attributes": {"a\tb": 1}},
    {"file_id": "f", "attributes": {"a": "b\0"}},
]


@pytest.mark.parametrize("document", BAD_FILES)
async def test_a_bad_file_of_a_store_is_refused(box: ScriptedBox, store: VectorStore, document: dict[str, Any]) -> None:
    for reply in (
        await box.ask("POST", f"/v1/vector_stores/{store.id}/files", document),
        await box.ask("POST", f"/v1/vector_stores/{store.id}/file_batches", {"files": [document]}),
    ):
        assert (reply.status, reply.error["code"]) == (400, "invalid_value")
    assert (await box.ask("GET", f"/v1/vector_stores/{store.id}/files")).json()["data"] == []


@pytest.mark.parametrize(
    "document",
    [
        {},
        {"file_ids": [], "files": []},
        {"file_ids": ["a"], "files": [{"file_id": "b"}]},
        {"files": [{"file_id": "b"}], "attributes": {}},
        {"file_ids": ["a", "a"]},
        {"file_ids": ["a"] * 2001},
    ],
)
async def test_a_bad_batch_is_refused(box: ScriptedBox, store: VectorStore, document: dict[str, Any]) -> None:
    reply = await box.ask("POST", f"/v1/vector_stores/{store.id}/file_batches", document)
    assert (reply.status, reply.error["code"]) == (400, "invalid_value")


@pytest.mark.parametrize(
    ("method", "path", "document"),
    [
        ("GET", "", None),
        ("POST", "", {}),
        ("DELETE", "", None),
        ("POST", "/search", {"query": "heat"}),
        ("GET", "/files", None),
        ("POST", "/files", {"file_id": "file-none"}),
        ("GET", "/files/file-none", None),
        ("POST", "/files/file-none", {"attributes": {}}),
        ("DELETE", "/files/file-none", None),
        ("GET", "/files/file-none/content", None),
        ("POST", "/file_batches", {"file_ids": ["file-none"]}),
        ("GET", "/file_batches/vsfb_none", None),
        ("POST", "/file_batches/vsfb_none/cancel", None),
        ("GET", "/file_batches/vsfb_none/files", None),
        ("POST", "/rebuild", None),
        ("POST", "/reembed", None),
        ("GET", "/verify", None),
    ],
)
async def test_what_is_not_there_is_404_and_what_is_anothers_is_not_there(
    box: ScriptedBox, store: VectorStore, method: str, path: str, document: Any
) -> None:
    reply = await box.ask(method, f"/v1/vector_stores/vs_none{path}", document)
    assert (reply.status, reply.error["code"]) == (404, "not_found")
    if "none" in f"{path}{document}":
        reply = await box.ask(method, f"/v1/vector_stores/{store.id}{path}", document)
        assert (reply.status, reply.error["code"]) == (404, "not_found")
    assert box.keys is not None
    _, secret = box.keys.create("other", ["admin"])
    other = {"authorization": f"Bearer {secret}"}
    expected = 200 if path in ("/rebuild", "/verify") else 404  # an administrator looks after everybody's indexes
    assert (await box.ask(method, f"/v1/vector_stores/{store.id}{path}", document, headers=other)).status == expected
    assert (await box.ask("GET", "/v1/vector_stores", headers=other)).json()["data"] == []


async def test_a_store_is_embedded_again_by_its_owner(box: ScriptedBox, store: VectorStore) -> None:
    answer = (await box.ask("POST", f"/v1/vector_stores/{store.id}/reembed")).json()
    assert (answer["id"], answer["reembedding"]) == (store.id, {"model": "", "done": 0, "total": 4})
    assert box.stores.reembedded == [store.id]
    assert (await box.ask("GET", f"/v1/vector_stores/{store.id}")).json()["reembedding"] is None


async def test_a_store_can_be_verified_and_rebuilt_by_an_admin_only(tmp_path: Any) -> None:
    async with scripted_box(tmp_path, require_api_key=True) as box:
        assert box.keys is not None
        user, admin = (
            {"authorization": f"Bearer {box.keys.create(each, [each])[1]}"} for each in ("inference", "admin")
        )
        mine = (await box.ask("POST", "/v1/vector_stores", headers=admin)).json()["id"]
        path = f"/v1/vector_stores/{mine}"
        assert (await box.ask("POST", f"{path}/rebuild", headers=user)).status == 403
        assert (await box.ask("GET", f"{path}/verify", headers=user)).status == 403
        assert box.stores.rebuilt == []
        assert (await box.ask("POST", f"{path}/rebuild", headers=admin)).json()["id"] == mine
        assert box.stores.rebuilt == [mine]
        answer = (await box.ask("GET", f"{path}/verify", headers=admin)).json()
        assert answer == {"id": mine, "object": "vector_store.verification", "valid": True, "problems": []}
        box.stores.problems = ["A chunk is missing."]
        answer = (await box.ask("GET", f"{path}/verify", headers=admin)).json()
        assert (answer["valid"], answer["problems"]) == (False, ["A chunk is missing."])
