"""The tool `file_search`."""

from __future__ import annotations

from typing import Any

import pytest

from appliance.agents.file_search import FileSearch, FileSearchTools, read_filter
from appliance.core.errors import DeadlineExceededError, InvalidRequestError, NotFoundError
from appliance.core.retrieval import Comparison, Compound, Hit, SearchRequest, SearchResult, VectorStore

pytestmark = pytest.mark.anyio


class Stores:
    """Two stores, each with hits of its own."""

    def __init__(self) -> None:
        self.searches: list[SearchRequest] = []
        self.failure: Exception | None = None

    def get(self, store: str, *, tenant: str) -> VectorStore:
        if store not in ("vs_1", "vs_2") or tenant != "me":
            raise NotFoundError(f"There is no vector store {store!r}.")
        return None  # type: ignore[return-value]

    async def search(self, request: SearchRequest) -> SearchResult:
        self.searches.append(request)
        if self.failure is not None:
            raise self.failure
        best = 0.9 if request.store == "vs_1" else 0.8
        hits = [
            Hit(f"file-{request.store}-{n}", "f.txt", best - n / 4, "text", 0, 4, None, (), {"lang": "en"})
            for n in range(2)
        ]
        return SearchResult(hits, False, ["keyword"])


async def tool(stores: Stores, tenant: str = "me", **fields: Any) -> FileSearch:
    definition = {"type": "file_search", "vector_store_ids": ["vs_1"], **fields}
    return await FileSearchTools(stores)(definition, tenant=tenant, request_id="r")


async def call(tool: FileSearch, **arguments: Any) -> Any:
    return await tool.call("file_search", arguments, tenant="me", deadline_s=2.0, request_id="r")


async def test_hits_of_all_stores_come_best_first_and_as_many_as_wanted() -> None:
    stores = Stores()
    result = await call(await tool(stores, vector_store_ids=["vs_1", "vs_2", "vs_1"], max_num_results=3), query="pump")
    assert result.kind == "ok"
    assert [each["file_id"] for each in result.details["results"]] == ["file-vs_1-0", "file-vs_2-0", "file-vs_1-1"]
    assert result.details["results"][0]["attributes"] == {"lang": "en"}
    assert [(each.store, each.queries, each.tenant, each.limit) for each in stores.searches] == [
        ("vs_1", ("pump",), "me", 3),
        ("vs_2", ("pump",), "me", 3),
    ]
    assert stores.searches[0].deadline_s == 2.0


async def test_passages_are_numbered_on_from_call_to_call() -> None:
    searching = await tool(Stores())
    searching.number_from(7)
    first, second = await call(searching, query="a"), await call(searching, query="b")
    assert [each["number"] for each in first.details["citations"]] == [7, 8]
    assert [each["number"] for each in second.details["citations"]] == [9, 10]
    assert "[9] f.txt" in second.output


async def test_openais_options_reach_the_search() -> None:
    stores = Stores()
    options = {"ranker": "none", "score_threshold": 0.25, "hybrid_search": {"embedding_weight": 1, "text_weight": 0}}
    where = {
        "type": "and",
        "filters": [{"type": "eq", "key": "a", "value": 1}, {"type": "in", "key": "b", "value": ["c"]}],
    }
    await call(await tool(stores, ranking_options=options, filters=where), query="a")
    (search,) = stores.searches
    assert search.filters == Compound("and", (Comparison("eq", "a", 1), Comparison("in", "b", ("c",))))
    assert (search.threshold, search.rerank) == (0.25, False)


@pytest.mark.parametrize(
    "fields",
    [
        {"vector_store_ids": []},
        {"vector_store_ids": ["vs_1"] * 9},
        {"vector_store_ids": "vs_1"},
        {"max_num_results": 51},
        {"max_num_results": 0},
        {"ranking_options": {"score_threshold": 2}},
        {"filters": {"type": "eq", "key": "a"}},
        {"filters": {"type": "and", "filters": []}},
        {"filters": {"type": "or", "filters": ["x"]}},
        {"filters": {"type": "in", "key": "a", "value": [[]]}},
        {"filters": {"type": "like", "key": "a", "value": "b"}},
        {"surprise": 1},
    ],
)
async def test_a_definition_that_will_not_do_is_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        await tool(Stores(), **fields)
    assert caught.value.param == "tools"


async def test_a_filter_nested_too_deeply_is_refused() -> None:
    deep: dict[str, Any] = {"type": "eq", "key": "a", "value": True}
    for _ in range(7):
        deep = {"type": "or", "filters": [deep]}
    assert isinstance(read_filter(deep), Compound)
    with pytest.raises(InvalidRequestError):
        read_filter({"type": "or", "filters": [deep]})


async def test_a_store_of_somebody_else_is_not_there() -> None:
    for fields in ({"tenant": "you"}, {"vector_store_ids": ["vs_1", "vs_3"]}):
        with pytest.raises(NotFoundError) as caught:
            await tool(Stores(), **fields)
        assert caught.value.param == "tools"


async def test_bad_arguments_and_slow_searches_are_typed_results() -> None:
    stores = Stores()
    searching = await tool(stores)
    assert not searching.needs_approval("file_search")
    for query in ({}, {"query": " "}, {"query": 3}, {"query": "x" * 5000}):
        assert (await call(searching, **query)).kind == "bad_arguments"
    stores.failure = DeadlineExceededError("It took longer than 2 s.")
    assert (await call(searching, query="a")).kind == "timeout"
