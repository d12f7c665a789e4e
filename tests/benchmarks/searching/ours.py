"""The appliance's room of documents, in a process of its own on one core: `python -m tests.benchmarks.searching.ours`.

The database is filled as ingest fills it; what derives from it is then made, and searched, by the room itself, with
the settings' defaults. Vectors of queries are known already: their embedding is measured elsewhere.
"""

from __future__ import annotations

import asyncio
import hashlib
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any, cast

import msgspec
import numpy as np

from appliance.core.clock import SystemClock
from appliance.core.retrieval import Comparison, SearchRequest
from appliance.core.settings import Settings
from appliance.core.types import EmbeddingRequest, Embeddings
from appliance.retrieval.documents import Documents
from appliance.retrieval.lexical import KeywordIndex
from appliance.retrieval.room import open_documents
from appliance.retrieval.schema import open_retrieval
from appliance.retrieval.truth import StoredTexts, StoredVectors
from appliance.retrieval.vectors import VectorIndexes
from appliance.store.database import Connection
from tests.benchmarks.searching.corpus import TEXTS_A_FILE, Corpus, Ids, K, attribute, recall
from tests.benchmarks.searching.jobs import Clock, Job, Kind, Made, Searched, Times, memory, on_one_core, timed
from tests.benchmarks.searching.vectors import Floats

STORE = "vs_benchmark"
MODEL = "model:1"
KEY = 1
_ROWS = 10_000


def make(kind: Kind, corpus: Corpus, home: Path) -> Made:
    """Fill the database, derive an index from it alone, or make the next generation of the vectors."""
    settings = Settings(data_dir=home)
    began = time.perf_counter()
    if kind == "fill":
        _fill(corpus, settings)
    elif kind == "keywords":
        _make_keywords(settings)
    else:
        with _vectors(settings) as vectors:
            (vectors.rebuild if kind == "vectors" else vectors.compact)(KEY)
    return Made(time.perf_counter() - began, memory().peak)


@contextmanager
def _vectors(settings: Settings) -> Iterator[VectorIndexes]:
    database = open_retrieval(settings.retrieval_path)
    vectors = VectorIndexes(
        settings.vector_indexes_dir, StoredVectors(database), memory_bytes=settings.index_memory_bytes
    )
    try:
        yield vectors
    finally:
        vectors.close()
        database.close()


def _make_keywords(settings: Settings) -> None:
    database = open_retrieval(settings.retrieval_path)
    keywords = KeywordIndex(settings.keyword_index_dir)
    try:
        texts = StoredTexts(database)
        keywords.rebuild(texts.rows(texts.ids()))
    finally:
        keywords.close()
        database.close()


def _fill(corpus: Corpus, settings: Settings) -> None:
    database = open_retrieval(settings.retrieval_path)
    texts, start = corpus.texts(), 0

    def begin(connection: Connection) -> None:
        sql = """
            INSERT INTO stores (key, id, tenant, name, description, metadata, created, last_active, model, dimensions)
            VALUES (?, ?, '', '', '', '{}', 0, ?, ?, ?)
        """
        connection.execute(sql, (KEY, STORE, int(time.time()) + 86_400, MODEL, corpus.query_vectors().shape[1]))

    try:
        database.write_blocking(begin)
        for rows in corpus.vectors(_ROWS):
            block, first = list(islice(texts, len(rows))), start
            database.write_blocking(lambda each, *given: _insert(each, first, block, rows))  # noqa: B023  (it is done)
            start += len(rows)
    finally:
        database.close()


def _insert(connection: Connection, first: int, texts: Sequence[str], rows: Floats) -> None:
    """Insert files of ten texts each; a chunk's id is its number and one."""
    numbers = range(first, first + len(texts))
    files = range(first // TEXTS_A_FILE + 1, (first + len(texts) - 1) // TEXTS_A_FILE + 2)
    connection.executemany(
        """
        INSERT INTO files (key, id, tenant, filename, purpose, size, media_type, created)
        VALUES (?, ?, '', ?, 'assistants', 0, 'text/plain', 0)
        """,
        [(key, f"file-{key}", f"{key}.txt") for key in files],
    )
    connection.executemany(
        """
        INSERT INTO store_files
            (key, store, file, created, status, stage, attributes, most_tokens, overlap_tokens, batch, first_chunk,
            chunks, embedded)
        VALUES (?, ?, ?, 0, 'completed', 'done', ?, 320, 40, '', ?, ?, ?)
        """,
        [
            (key, KEY, key, _attributes(key - 1), 1 + (key - 1) * TEXTS_A_FILE, TEXTS_A_FILE, TEXTS_A_FILE)
            for key in files
        ],
    )
    hashes = [hashlib.sha256(f"{number}".encode()).digest() for number in numbers]
    connection.executemany(
        "INSERT INTO vectors (id, text_hash, model, vector) VALUES (?, ?, ?, ?)",
        [(n + 1, hashed, MODEL, row.tobytes()) for n, hashed, row in zip(numbers, hashes, rows, strict=True)],
    )
    connection.executemany(
        """
        INSERT INTO chunks (id, store, store_file, position, text, start, "end", heading, tokens, text_hash, vector)
        VALUES (?, ?, ?, ?, ?, 0, ?, '[]', 100, ?, ?)
        """,
        [
            (n + 1, KEY, n // TEXTS_A_FILE + 1, n % TEXTS_A_FILE, text, len(text), hashed, n + 1)
            for n, text, hashed in zip(numbers, texts, hashes, strict=True)
        ],
    )


def _attributes(file: int) -> str:
    return msgspec.json.encode({"part": int(attribute(np.array([file * TEXTS_A_FILE]))[0])}).decode()


class KnownQueries:
    """Embeds queries by looking them up."""

    def __init__(self, corpus: Corpus) -> None:
        self._known = dict(zip(corpus.query_texts(), corpus.query_vectors(), strict=True))

    async def embed(self, request: EmbeddingRequest) -> Embeddings:
        """Return the vectors of queries."""
        vectors = [self._known[str(each)] for each in request.inputs]
        return Embeddings(model=MODEL, vectors=vectors, token_counts=[1] * len(vectors))


async def search(corpus: Corpus, home: Path) -> Searched:
    """Search with both legs, with a filter, and for the nearest vectors alone, one query after another."""
    nothing = cast("Any", None)
    embedder = KnownQueries(corpus)
    queries, settings = corpus.query_texts(), Settings(data_dir=home)
    began = time.perf_counter()
    opened = open_documents(
        settings, SystemClock(), models=embedder, counter=nothing, rerankers=nothing, tensors=nothing
    )
    async with opened as room:
        assert isinstance(room, Documents), "another process has the folder"
        await room.check_keywords()
        await _hybrid(room, queries[:1])
        start_s = time.perf_counter() - began
        await _hybrid(room, queries)  # what is lazy and what is read from the disk
        whole = await _hybrid(room, queries)
        filtered = await _hybrid(room, queries, filtered=True)
        found = memory()
    with _vectors(settings) as vectors:
        rows, allowed = corpus.query_vectors(), np.flatnonzero(attribute(np.arange(corpus.count)) == 0) + 1
        nearest = _nearest(vectors, rows)
        nearest = _nearest(vectors, rows)
        passing = _nearest(vectors, rows, allowed)
    return Searched(
        start_s=start_s,
        hybrid=whole,
        filtered=filtered,
        dense=nearest[0],
        dense_filtered=passing[0],
        recall=recall(nearest[1], corpus.exact()),
        recall_filtered=recall(passing[1], corpus.exact(filtered=True)),
        memory=found,
    )


async def _hybrid(room: Documents, queries: Sequence[str], *, filtered: bool = False) -> Times:
    only = Comparison("eq", "part", 0) if filtered else None
    clock = Clock()
    for query in queries:
        with clock:
            await room.stores.search(SearchRequest(STORE, [query], filters=only))
    return clock.times


def _nearest(vectors: VectorIndexes, rows: Floats, allowed: Ids | None = None) -> tuple[Times, list[list[int]]]:
    return timed(lambda row: [each - 1 for each, _ in vectors.search(KEY, row[None], K, allowed)[0]], rows)


def work(job: Job) -> Made | Searched:
    """Do a job here and now."""
    on_one_core()
    corpus = Corpus(Path(job.corpus), job.count, job.queries)
    home = Path(job.home)
    return asyncio.run(search(corpus, home)) if job.kind == "search" else make(job.kind, corpus, home)


if __name__ == "__main__":
    sys.stdout.buffer.write(msgspec.json.encode(work(msgspec.json.decode(sys.stdin.buffer.read(), type=Job))))
