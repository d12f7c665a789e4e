"""How many small files a second become searchable by keyword, with the real parser, chunker and index."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any, cast

from appliance.core.clock import SystemClock
from appliance.core.retrieval import NewStoreFile
from appliance.core.settings import Settings
from appliance.core.types import EmbeddingRequest, Embeddings
from appliance.retrieval.chunks import cut
from appliance.retrieval.documents import Documents
from appliance.retrieval.lexical import KeywordIndex
from appliance.retrieval.parsing.parser import DocumentParser
from appliance.retrieval.schema import open_retrieval
from appliance.retrieval.truth import StoredVectors
from appliance.retrieval.vectors import VectorIndexes

UPLOADED, QUEUED, SEARCHABLE = "uploaded", "queued", "searchable by keyword"
WORDS = [f"word{number}" for number in range(20_000)]


class NeverReady:
    """Counts words, and never comes to embed: only the keyword part is measured."""

    async def embed(self, request: EmbeddingRequest) -> Embeddings:
        await asyncio.Event().wait()
        raise AssertionError(request)

    async def count_tokens(self, model: str, texts: Sequence[str]) -> Sequence[int]:
        return [len(each.split()) for each in texts]

    async def longest_input(self, model: str) -> int:
        return 4096


async def measure(folder: Path, count: int) -> dict[str, float]:
    """Return the files a second of each step."""
    rates = {}
    settings = Settings(data_dir=folder)
    database = open_retrieval(folder / "retrieval.db")
    keywords = KeywordIndex(folder / "keywords")
    vectors = VectorIndexes(folder / "vectors", StoredVectors(database), memory_bytes=2**26)
    parser, embedder, nothing = DocumentParser(settings), NeverReady(), cast("Any", None)
    documents = Documents(
        settings,
        database,
        SystemClock(),
        parser=parser,
        cut=cut,
        counter=embedder,
        models=embedder,
        keywords=keywords,
        vectors=vectors,
        searcher=nothing,
    )
    choose = random.Random(1)
    started = time.perf_counter()
    new = []
    for number in range(count):
        text = " ".join(choose.choices(WORDS, k=120)).encode()
        new.append(
            NewStoreFile((await documents.files.create(f"{number}.txt", "assistants", _once(text), tenant="")).id)
        )
    rates[UPLOADED] = count / (time.perf_counter() - started)
    store = documents.stores.create(tenant="").id
    started = time.perf_counter()
    await asyncio.to_thread(documents.stores.add, store, new, tenant="", batch=True)
    rates[QUEUED] = count / (time.perf_counter() - started)
    started = time.perf_counter()
    async with asyncio.TaskGroup() as tasks:
        work = tasks.create_task(documents.run())
        sql = "SELECT count(*) FROM store_files WHERE stage IN ('queued', 'cut')"
        while database.read(lambda each: each.execute(sql).fetchone()[0]):  # noqa: ASYNC110  (it is polled)
            await asyncio.sleep(0.05)
        rates[SEARCHABLE] = count / (time.perf_counter() - started)
        work.cancel()
    assert len(keywords.chunk_ids()) >= count
    await parser.close()
    keywords.close()
    vectors.close()
    database.close()
    return rates


async def _once(data: bytes) -> AsyncIterator[bytes]:
    yield data
