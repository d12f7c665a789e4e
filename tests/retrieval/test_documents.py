"""All parts together: what is uploaded is found by its words and by its meaning, and is gone when it is deleted."""

from __future__ import annotations

import asyncio
import re
from array import array
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest

from appliance.core.clock import SystemClock
from appliance.core.errors import NotFoundError
from appliance.core.retrieval import NewStoreFile, SearchRequest
from appliance.core.settings import Settings
from appliance.core.types import EmbeddingRequest, Embeddings
from appliance.retrieval.chunks import cut
from appliance.retrieval.documents import Documents
from appliance.retrieval.lexical import KeywordIndex
from appliance.retrieval.parsing.parser import DocumentParser
from appliance.retrieval.passages import Passages
from appliance.retrieval.schema import open_retrieval
from appliance.retrieval.search import Search
from appliance.retrieval.truth import StoredVectors
from appliance.retrieval.vectors import VectorIndexes
from appliance.store.database import Database
from tests.retrieval.boxes import DEADLINE_S, files_with, once

pytestmark = pytest.mark.anyio

MEANINGS = {"automobile": "car", "vehicle": "car", "fix": "repair", "mend": "repair", "engine": "motor"}
"""Words that mean the same to the embedder below, and share no letters with each other for the keyword index."""


class Thesaurus:
    """An embedder to which texts are alike that have words of the same meaning."""

    async def embed(self, request: EmbeddingRequest) -> Embeddings:
        return Embeddings("thesaurus:1", [self._vector(str(each)) for each in request.inputs], [1])

    async def count_tokens(self, model: str, texts: Sequence[str]) -> Sequence[int]:
        return [len(each.split()) + 2 for each in texts]

    async def longest_input(self, model: str) -> int:
        return 4096

    def _vector(self, text: str) -> array[float]:
        total = np.zeros(64, np.float32)
        for word in re.findall("[a-z]+", text.lower()):
            seed = int.from_bytes(MEANINGS.get(word, word).encode()[:8].ljust(8), "big")
            total += np.random.default_rng(seed).standard_normal(64).astype(np.float32)
        return array("f", (total / np.linalg.norm(total)).tobytes())


@dataclass
class Whole:
    database: Database
    documents: Documents

    async def until_through(self, store: str) -> None:
        async with asyncio.timeout(DEADLINE_S):
            while self.documents.stores.get(store, tenant="").counts.in_progress:  # noqa: ASYNC110  (it is polled)
                await asyncio.sleep(0.01)


@asynccontextmanager
async def whole(folder: Path) -> AsyncIterator[Whole]:
    settings = Settings(data_dir=folder, embedding_model="thesaurus")
    database = open_retrieval(folder / "retrieval.db")
    keywords = KeywordIndex(folder / "keywords")
    vectors = VectorIndexes(folder / "vectors", StoredVectors(database), memory_bytes=2**26)
    parser, embedder = DocumentParser(settings), Thesaurus()
    nothing = cast("Any", None)
    search = Search(Passages(database), keywords=keywords, vectors=vectors, embedders=embedder, rerankers=nothing)
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
        searcher=search,
    )
    async with asyncio.TaskGroup() as tasks:
        work = tasks.create_task(documents.run())
        try:
            yield Whole(database, documents)
        finally:
            work.cancel()
            await parser.close()
            keywords.close()
            vectors.close()
    database.close()


TEXTS = {
    "garage.txt": "How to repair the motor of a car.",
    "garden.md": "# Roses\n\nRoses want sun and water.\n\n# Weeds\n\nPull them out by the roots, xylophonesecret.",
    "valves.csv": "valve,bar\nB7,4\nC9,6\n",
}


async def test_a_file_is_found_by_word_and_by_meaning_and_is_gone_when_deleted(tmp_path: Path) -> None:
    async with whole(tmp_path) as each:
        files, stores = each.documents.files, each.documents.stores
        made = {
            name: await files.create(name, "assistants", once(text.encode()), tenant="") for name, text in TEXTS.items()
        }
        assert [made[name].media_type for name in TEXTS] == ["text/plain", "text/markdown", "text/csv"]
        store = stores.create(tenant="", name="house").id
        new = [NewStoreFile(file.id, {"name": name}) for name, file in made.items()]
        batch, _ = await asyncio.to_thread(stores.add, store, new, tenant="", batch=True)
        await each.until_through(store)
        assert stores.get_batch(store, batch, tenant="").counts.completed == 3

        by_word = await stores.search(SearchRequest(store, ["B7"], mode="keyword"))
        assert [hit.filename for hit in by_word.hits] == ["valves.csv"]
        by_meaning = await stores.search(SearchRequest(store, ["mend automobile engine"], mode="semantic"))
        assert by_meaning.hits[0].filename == "garage.txt"
        both = await stores.search(SearchRequest(store, ["water for roses"]))
        assert both.hits[0].heading == ("Roses",)
        assert set(both.legs) == {"keyword", "semantic"}

        await files.delete(made["garden.md"].id, tenant="")
        assert list(files_with(tmp_path, b"xylophonesecret")) == []
        after = await stores.search(SearchRequest(store, ["xylophonesecret roses"]))
        assert "garden.md" not in [hit.filename for hit in after.hits]
        await stores.delete(store, tenant="")
        with pytest.raises(NotFoundError):
            await stores.search(SearchRequest(store, ["B7"]))

    async with whole(tmp_path) as each:
        store = each.documents.stores.create(tenant="").id
        await asyncio.to_thread(
            each.documents.stores.add, store, [NewStoreFile(made["garage.txt"].id)], tenant="", batch=False
        )
        await each.until_through(store)
        found = await each.documents.stores.search(SearchRequest(store, ["fix vehicle"], mode="semantic"))
        assert [hit.text for hit in found.hits] == [TEXTS["garage.txt"]]


async def test_what_was_taken_in_is_found_after_a_restart(tmp_path: Path) -> None:
    async with whole(tmp_path) as each:
        file = await each.documents.files.create("a.txt", "assistants", once(b"The pump needs oil."), tenant="")
        store = each.documents.stores.create(tenant="").id
        await asyncio.to_thread(each.documents.stores.add, store, [NewStoreFile(file.id)], tenant="", batch=False)
        await each.until_through(store)
    async with whole(tmp_path) as each:
        await each.documents.check_keywords()
        for mode in ("keyword", "semantic"):
            found = await each.documents.stores.search(SearchRequest(store, ["pump oil"], mode=mode))
            assert [hit.text for hit in found.hits] == ["The pump needs oil."]
