"""Searches on the real truth and both real indexes; the embedder knows a few words' meanings."""

from __future__ import annotations

import asyncio
import hashlib
from array import array
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import msgspec
import numpy as np
import pytest

from appliance.core.encoders import ClassificationRequest, Classifications, Ranking, RerankRequest
from appliance.core.errors import (
    ApplianceError,
    DeadlineExceededError,
    InvalidRequestError,
    NotFoundError,
    StorageError,
    UnavailableError,
)
from appliance.core.retrieval import Comparison, Hit, SearchRequest, SearchResult
from appliance.core.types import EmbeddingRequest, Embeddings
from appliance.retrieval.lexical import KeywordIndex
from appliance.retrieval.passages import Passages
from appliance.retrieval.schema import open_retrieval
from appliance.retrieval.search import LONGEST_QUERY, MOST_HITS, MOST_QUERIES, Reranking, Search
from appliance.retrieval.truth import StoredTexts, StoredVectors
from appliance.retrieval.vectors import VectorIndexes
from appliance.store.database import Connection, Database

pytestmark = pytest.mark.anyio

DEADLINE_S = 20.0
MODEL = "meanings:1"
DIMENSIONS = 32
MEANINGS = {"car": 0, "automobile": 0, "vehicle": 0, "pump": 1, "leaks": 2, "drips": 2, "oil": 3, "holiday": 4, "泵": 1}

TEXTS = {
    "car.txt": ["The automobile needs new tyres.", "Its brakes were changed in May."],
    "pump.txt": ["The pump of line 7 leaks oil.", "Part XR-4500 seals it.", "Order it from the store room."],
    "rules.txt": ["Ask for a holiday two weeks ahead.", "The pump of line 7 leaks oil."],
    "中文.txt": ["七号线的水泵漏油，请更换密封件。"],
}
ATTRIBUTES: Mapping[str, Mapping[str, Any]] = {
    "car.txt": {"year": 2020},
    "pump.txt": {"year": 2024, "kind": "manual"},
    "rules.txt": {"kind": "rule"},
    "中文.txt": {},
}


def vector(text: str) -> array[float]:
    numbers = np.zeros(DIMENSIONS, np.float32)
    for word in text.lower().replace(".", " ").replace("?", " ").split():
        numbers[MEANINGS.get(word, 5)] += 1.0 if word in MEANINGS else 0.0
    numbers[6 + int(hashlib.sha256(text.encode()).hexdigest(), 16) % 26] += 0.05
    return array("f", (numbers / np.linalg.norm(numbers)).tobytes())


@dataclass
class Embedder:
    errors: list[ApplianceError] = field(default_factory=list)
    gate: asyncio.Event | None = None

    async def embed(self, request: EmbeddingRequest) -> Embeddings:
        assert request.model == MODEL
        assert request.truncate
        if self.gate is not None:
            await self.gate.wait()
        if self.errors:
            raise self.errors.pop(0)
        return Embeddings(MODEL, [vector(str(each)) for each in request.inputs], [1] * len(request.inputs))


@dataclass
class Reranker:
    """Likes long texts."""

    errors: list[ApplianceError] = field(default_factory=list)
    gate: asyncio.Event | None = None
    asked: list[RerankRequest] = field(default_factory=list)

    async def rerank(self, request: RerankRequest) -> Ranking:
        self.asked.append(request)
        if self.gate is not None:
            await self.gate.wait()
        if self.errors:
            raise self.errors.pop(0)
        return Ranking("judge:1", "cross-encoder", [len(each) / 100 for each in request.documents], [])

    async def classify(self, request: ClassificationRequest) -> Classifications:
        raise NotImplementedError


@dataclass
class Shelf:
    database: Database
    keywords: KeywordIndex
    vectors: VectorIndexes
    embedder: Embedder
    reranker: Reranker
    search: Search

    async def ask(self, *queries: str, **options: Any) -> SearchResult:
        async with asyncio.timeout(DEADLINE_S):
            return await self.search.search(SearchRequest("vs_1", queries, **options))

    def write(self, sql: str, *values: object) -> None:
        self.database.write_blocking(lambda each: each.execute(sql, values))

    def without_vectors(self) -> None:
        self.write("UPDATE chunks SET vector = NULL")
        self.write("UPDATE stores SET model = ''")

    def with_reranker(self, timeout_s: float = DEADLINE_S, candidates: int = 24) -> None:
        self.search._reranking = Reranking("judge", candidates, timeout_s)


def fill(connection: Connection) -> None:
    connection.execute(
        "INSERT INTO stores (key, id, tenant, name, description, metadata, created, last_active, model, dimensions)"
        " VALUES (1, 'vs_1', '', '', '', '{}', 0, 0, ?, ?)",
        (MODEL, DIMENSIONS),
    )
    for key, (name, texts) in enumerate(TEXTS.items(), 1):
        connection.execute(
            "INSERT INTO files (key, id, tenant, filename, purpose, size, media_type, created)"
            " VALUES (?, ?, '', ?, 'assistants', 1, 'text/plain', 0)",
            (key, f"file-{key}", name),
        )
        connection.execute(
            "INSERT INTO store_files (key, store, file, created, status, stage, attributes, most_tokens,"
            " overlap_tokens, batch) VALUES (?, 1, ?, 0, 'completed', 'done', ?, 320, 40, '')",
            (key, key, msgspec.json.encode(ATTRIBUTES[name]).decode()),
        )
        start = 0
        for position, text in enumerate(texts):
            add_chunk(connection, key, position, text, start)
            start += len(text) + 2


def add_chunk(connection: Connection, store_file: int, position: int, text: str, start: int) -> None:
    digest = hashlib.sha256(text.encode()).digest()
    connection.execute("INSERT OR IGNORE INTO vectors (text_hash, model, vector) VALUES (?, ?, ?)",
        (digest, MODEL, vector(text).tobytes()))  # fmt: skip
    connection.execute(
        'INSERT INTO chunks (store, store_file, position, text, start, "end", page, heading, tokens, text_hash,'
        " vector) SELECT 1, ?, ?, ?, ?, ?, 3, '[\"Chapter\"]', ?, ?, id FROM vectors WHERE text_hash = ?",
        (store_file, position, text, start, start + len(text), len(text.split()), digest, digest),
    )
    connection.execute(
        "UPDATE store_files SET chunks = chunks + 1, first_chunk = coalesce(first_chunk, last_insert_rowid())"
        " WHERE key = ?",
        (store_file,),
    )


@pytest.fixture
async def shelf(tmp_path: Path) -> AsyncIterator[Shelf]:
    database = open_retrieval(tmp_path / "retrieval.db")
    await database.write(fill)
    keywords = KeywordIndex(tmp_path / "keywords")
    rows = database.read(lambda each: [tuple(row) for row in each.execute("SELECT id, text FROM chunks")])
    keywords.add(1, rows)
    vectors = VectorIndexes(tmp_path / "vectors", StoredVectors(database), memory_bytes=2**26)
    embedder, reranker = Embedder(), Reranker()
    search = Search(Passages(database), keywords=keywords, vectors=vectors, embedders=embedder, rerankers=reranker)
    yield Shelf(database, keywords, vectors, embedder, reranker, search)
    vectors.close()
    keywords.close()
    database.close()


def texts(hits: Sequence[Hit]) -> list[str]:
    return [each.text for each in hits]


# What is found


async def test_a_word_and_its_meaning_are_found_by_the_leg_that_knows_them(shelf: Shelf) -> None:
    for query, text in (("Where is the vehicle?", TEXTS["car.txt"][0]), ("XR-4500", TEXTS["pump.txt"][1])):
        result = await shelf.ask(query)
        assert result.hits[0].text == text
        assert list(result.legs) == ["keyword", "semantic"]
    assert (await shelf.ask("vehicle", mode="keyword")).hits == []
    assert (await shelf.ask("水泵漏油")).hits[0].filename == "中文.txt"


async def test_a_hit_says_where_it_stands(shelf: Shelf) -> None:
    hit = (await shelf.ask("automobile tyres")).hits[0]
    assert (hit.file, hit.filename, hit.page, hit.heading) == ("file-1", "car.txt", 3, ("Chapter",))
    assert (hit.start, hit.end, hit.attributes) == (0, len(hit.text), {"year": 2020})
    assert hit.explanation is None


async def test_an_explanation_has_the_ranks_of_both_legs(shelf: Shelf) -> None:
    hit = (await shelf.ask("pump oil", explain=True)).hits[0]
    assert hit.explanation is not None
    assert (hit.explanation.keyword_rank, hit.explanation.semantic_rank) == (1, 1)
    assert hit.explanation.fused_score == pytest.approx(hit.score) == pytest.approx(1.0)
    only = (await shelf.ask("pump oil", explain=True, mode="keyword")).hits[0].explanation
    assert only is not None
    assert (only.semantic_rank, only.semantic_score) == (None, None)


async def test_the_same_text_in_two_files_is_one_hit(shelf: Shelf) -> None:
    found = texts((await shelf.ask("pump leaks oil")).hits)
    assert sum(TEXTS["rules.txt"][1] in each for each in found) == 1


async def test_neighbours_are_one_passage(shelf: Shelf) -> None:
    found = texts((await shelf.ask("automobile tyres brakes May", mode="keyword")).hits)
    assert found == ["\n\n".join(TEXTS["car.txt"])]


async def test_nothing_relevant_is_an_empty_answer(shelf: Shelf) -> None:
    result = await shelf.ask("Who painted the Mona Lisa in line with Florentine taste?")
    assert (result.hits, result.more, list(result.legs)) == ([], False, ["keyword", "semantic"])


async def test_several_phrasings_find_what_any_of_them_finds(shelf: Shelf) -> None:
    result = await shelf.ask("XR-4500", "automobile")
    assert {each.filename for each in result.hits} >= {"pump.txt", "car.txt"}


# Filters, pages, limits


async def test_a_filter_decides_before_the_search_and_holds_for_every_leg(shelf: Shelf) -> None:
    for mode in ("hybrid", "keyword", "semantic"):
        result = await shelf.ask("pump oil", filters=Comparison("eq", "kind", "rule"), mode=mode)
        assert [each.filename for each in result.hits] == ["rules.txt"], mode
    nothing = await shelf.ask("pump oil", filters=Comparison("eq", "kind", "none"))
    assert nothing.hits == []


async def test_attributes_hold_from_the_moment_they_change(shelf: Shelf) -> None:
    shelf.write("UPDATE store_files SET attributes = '{}' WHERE key = 3")
    result = await shelf.ask("pump oil", filters=Comparison("eq", "kind", "rule"))
    assert result.hits == []


async def test_pages_follow_each_other(shelf: Shelf) -> None:
    whole = await shelf.ask("pump oil line part order holiday automobile brakes", mode="keyword")
    pages: list[Hit] = []
    more = True
    while more:
        page = await shelf.ask(
            "pump oil line part order holiday automobile brakes", mode="keyword", limit=1, after=len(pages)
        )
        pages += page.hits
        more = page.more
    assert pages == list(whole.hits)
    assert len(pages) >= 2
    assert (await shelf.ask("pump", after=100)).hits == []


async def test_the_threshold_and_the_budget_leave_out_what_is_too_much(shelf: Shelf) -> None:
    whole = (await shelf.ask("pump oil line part")).hits
    best = (await shelf.ask("pump oil line part", threshold=whole[0].score)).hits
    assert texts(best) == [TEXTS["pump.txt"][0]]
    assert (await shelf.ask("pump oil line part", most_tokens=0)).hits == []
    small = (await shelf.ask("pump oil line part", most_tokens=8)).hits
    assert sum(len(each.text.split()) for each in small) <= 8


@pytest.mark.parametrize(
    "request_",
    [
        SearchRequest("vs_1", ()),
        SearchRequest("vs_1", ("a",) * (MOST_QUERIES + 1)),
        SearchRequest("vs_1", (" \n",)),
        SearchRequest("vs_1", ("a" * (LONGEST_QUERY + 1),)),
        SearchRequest("vs_1", ("a",), limit=0),
        SearchRequest("vs_1", ("a",), limit=MOST_HITS + 1),
        SearchRequest("vs_1", ("a",), after=-1),
        SearchRequest("vs_1", ("a",), threshold=1.1),
        SearchRequest("vs_1", ("a",), rerank=True),
        SearchRequest("vs_1", ("a",), filters=Comparison("gt", "a", True)),
    ],
)
async def test_a_request_that_will_not_do_is_refused(shelf: Shelf, request_: SearchRequest) -> None:
    with pytest.raises(InvalidRequestError):
        await shelf.search.search(request_)


async def test_a_store_of_another_key_is_not_there(shelf: Shelf) -> None:
    with pytest.raises(NotFoundError):
        await shelf.ask("pump", tenant="somebody")


# What is gone


async def test_a_file_is_found_no_more_from_the_moment_its_row_is_gone(shelf: Shelf) -> None:
    shelf.write("DELETE FROM store_files WHERE key = 1")
    assert shelf.keywords.search(1, "automobile", 10), "the index knows it still"
    for mode in ("hybrid", "keyword", "semantic"):
        assert all(each.filename != "car.txt" for each in (await shelf.ask("automobile tyres", mode=mode)).hits)


# Legs that fail


@pytest.mark.parametrize("error", [UnavailableError("No model."), NotFoundError("No model."), StorageError("Broken.")])
async def test_without_its_embedder_a_hybrid_search_uses_words_and_says_so(shelf: Shelf, error: ApplianceError) -> None:
    shelf.embedder.errors.append(error)
    result = await shelf.ask("pump oil")
    assert list(result.legs) == ["keyword"]
    assert result.hits[0].text == TEXTS["pump.txt"][0]


async def test_a_semantic_search_without_its_embedder_is_an_error(shelf: Shelf) -> None:
    shelf.embedder.errors.append(UnavailableError("No model."))
    with pytest.raises(UnavailableError):
        await shelf.ask("pump oil", mode="semantic")


async def test_a_store_without_vectors_is_searched_by_words(shelf: Shelf) -> None:
    shelf.without_vectors()
    result = await shelf.ask("pump oil")
    assert (list(result.legs), result.hits[0].filename) == (["keyword"], "pump.txt")
    assert (await shelf.ask("pump oil", mode="semantic")).legs == []


async def test_a_broken_keyword_index_leaves_the_meanings(shelf: Shelf) -> None:
    shelf.keywords.close()
    result = await shelf.ask("pump oil")
    assert (list(result.legs), result.hits[0].text) == (["semantic"], TEXTS["pump.txt"][0])
    shelf.embedder.errors.append(UnavailableError("No model."))
    with pytest.raises(StorageError):
        await shelf.ask("pump oil")


async def test_a_damaged_keyword_index_takes_no_part_until_it_is_rebuilt(shelf: Shelf, tmp_path: Path) -> None:
    folder = tmp_path / "keywords"
    shelf.keywords.close()
    (folder / "manifest.json").write_bytes(b"")
    shelf.keywords = shelf.search._keywords = KeywordIndex(folder)
    assert (await shelf.ask("pump oil")).legs == ["semantic"]
    with pytest.raises(UnavailableError, match="made anew"):
        await shelf.ask("pump oil", mode="keyword")
    texts = StoredTexts(shelf.database)
    shelf.keywords.rebuild(texts.rows(texts.ids()))
    assert (await shelf.ask("pump oil")).legs == ["keyword", "semantic"]


async def test_a_late_semantic_leg_is_left_out(shelf: Shelf) -> None:
    shelf.embedder.gate = asyncio.Event()
    result = await shelf.ask("pump oil", deadline_s=0.5)
    assert list(result.legs) == ["keyword"]
    with pytest.raises(DeadlineExceededError):
        await shelf.ask("pump oil", deadline_s=0.2, mode="semantic")


# Reranking


async def test_the_reranker_orders_the_best_and_gives_the_score(shelf: Shelf) -> None:
    shelf.with_reranker()
    result = await shelf.ask("pump oil holiday", explain=True)
    assert list(result.legs) == ["keyword", "semantic", "rerank"]
    assert [each.score for each in result.hits] == sorted((each.score for each in result.hits), reverse=True)
    assert result.hits[0].explanation is not None
    assert result.hits[0].explanation.rerank_score == pytest.approx(result.hits[0].score)
    assert list((await shelf.ask("pump oil", rerank=False)).legs) == ["keyword", "semantic"]


async def test_no_more_than_the_best_are_read_again(shelf: Shelf) -> None:
    shelf.with_reranker(candidates=2)
    await shelf.ask("pump oil holiday automobile", mode="keyword")
    assert len(shelf.reranker.asked[0].documents) == 2
    await shelf.ask("zebra", mode="keyword")
    assert len(shelf.reranker.asked) == 1, "there is nothing to read"


async def test_a_reranker_that_fails_or_is_late_is_left_out(shelf: Shelf) -> None:
    shelf.with_reranker(timeout_s=0.05)
    plain = await shelf.ask("pump oil", rerank=False)
    shelf.reranker.errors.append(UnavailableError("No model."))
    assert await shelf.ask("pump oil") == plain
    shelf.reranker.gate = asyncio.Event()
    assert await shelf.ask("pump oil") == plain


# Several at once


async def test_reading_passages_begins_with_those_that_were_found(
    shelf: Shelf, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beginning with all files of the store took 70 ms where there were 5,000 of them."""
    plans: list[str] = []

    def read(function: Callable[[Connection], Any]) -> Any:
        return shelf_read(lambda real: function(cast("Connection", Planned(real))))

    class Planned:
        def __init__(self, real: Connection) -> None:
            self.real = real

        def execute(self, sql: str, values: Sequence[Any] = ()) -> Any:
            plans.extend(str(row[3]) for row in self.real.execute(f"EXPLAIN QUERY PLAN {sql}", values))
            return self.real.execute(sql, values)

    shelf_read = shelf.database.read
    monkeypatch.setattr(shelf.database, "read", read)
    await asyncio.to_thread(shelf.search._passages.read, 1, [1, 2], None)
    assert plans[0].startswith("SCAN wanted")
    assert not [each for each in plans[1:] if not each.endswith("USING INTEGER PRIMARY KEY (rowid=?)")]


async def test_fifty_searches_at_once_agree(shelf: Shelf) -> None:
    alone = await shelf.ask("pump oil")
    async with asyncio.TaskGroup() as tasks:
        running = [tasks.create_task(shelf.ask("pump oil")) for _ in range(50)]
    assert all(each.result() == alone for each in running)
