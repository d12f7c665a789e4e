"""The room as it is built: searches go on while files come, stores go, and indexes are damaged."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from appliance.core.clock import SystemClock
from appliance.core.errors import NotFoundError
from appliance.core.retrieval import NewStoreFile, SearchRequest
from appliance.core.settings import Settings
from appliance.core.types import EmbeddingRequest, Embeddings
from appliance.retrieval.documents import Documents
from appliance.retrieval.room import open_documents
from tests.retrieval.boxes import once, vector_of

pytestmark = [pytest.mark.anyio, pytest.mark.timeout(120)]

DEADLINE_S = 60.0
NOBODY: Any = None
"""Nothing here is reranked, and nothing is a scan."""
FILES, PASSAGES = 12, 40


class Embedder:
    """Embeds by hashes, whoever asks."""

    async def embed(self, request: EmbeddingRequest) -> Embeddings:
        await asyncio.sleep(0)
        texts = [str(each) for each in request.inputs]
        return Embeddings("embedder:1", [vector_of(each, 16) for each in texts], [1] * len(texts))

    async def count_tokens(self, model: str, texts: Any) -> list[int]:
        return [len(each.split()) for each in texts]

    async def longest_input(self, model: str) -> int:
        return 512


@asynccontextmanager
async def room(folder: Path) -> AsyncIterator[Documents]:
    settings, embedder = Settings(data_dir=folder, embedding_model="embedder"), Embedder()
    opened = open_documents(
        settings,
        SystemClock(),
        models=embedder,
        counter=embedder,
        rerankers=NOBODY,
        tensors=NOBODY,
    )
    async with opened as documents, asyncio.TaskGroup() as tasks:
        assert isinstance(documents, Documents), "another process has the folder"
        work = tasks.create_task(documents.run())
        try:
            yield documents
        finally:
            work.cancel()


def text_of(file: int) -> str:
    words = ["oil", "filter", "valve", "bearing", "seal", "gasket", "rotor", "stator"]
    lines = (f"Rule {file}x{each}: check the {words[each % 8]} of unit{file}n{each}." for each in range(PASSAGES))
    return "\n\n".join(f"{line} " + f"Note {file} on {line[:12]} " * 20 for line in lines)


async def fill(documents: Documents, first: int = 0, count: int = FILES) -> tuple[str, list[str]]:
    """Queue files to be taken into a new store."""
    store = documents.stores.create(tenant="").id
    files = []
    for number in range(first, first + count):
        content = once(text_of(number).encode())
        files.append((await documents.files.create(f"{number}.txt", "assistants", content, tenant="")).id)
    new = [NewStoreFile(each) for each in files]
    await asyncio.to_thread(documents.stores.add, store, new, tenant="", batch=False)
    return store, files


async def until_through(documents: Documents, store: str) -> None:
    async with asyncio.timeout(DEADLINE_S):
        while documents.stores.get(store, tenant="").counts.in_progress:  # noqa: ASYNC110  (it is in a database)
            await asyncio.sleep(0.01)


async def answers(documents: Documents, store: str, mode: Any) -> list[tuple[str, int]]:
    """Return the best hit of one question a file."""
    found = []
    for number in range(FILES):
        request = SearchRequest(store, [f"unit{number}n7"], mode=mode, limit=3)
        hits = (await documents.stores.search(request)).hits
        found += [(each.filename, each.start) for each in hits[:1]]
    return found


async def test_fifty_searches_at_a_time_go_on_while_files_are_taken_in(tmp_path: Path) -> None:
    async with room(tmp_path) as documents:
        store, _ = await fill(documents)
        rounds, seen = 0, set[str]()
        while documents.stores.get(store, tenant="").counts.in_progress:
            requests = [SearchRequest(store, [f"unit{each % FILES}n{each % PASSAGES}"]) for each in range(50)]
            async with asyncio.timeout(DEADLINE_S):
                results = await asyncio.gather(*(documents.stores.search(each) for each in requests))
            for each in results:
                seen.update(hit.filename for hit in each.hits)
            rounds += 1
        assert rounds > 0
        assert documents.stores.get(store, tenant="").counts.completed == FILES
        found = await answers(documents, store, "keyword")  # the vectors are hashes and mean nothing
        assert [name for name, _ in found] == [f"{number}.txt" for number in range(FILES)]
        assert await documents.stores.verify(store, tenant="") == []
        assert seen <= {f"{number}.txt" for number in range(FILES)}


async def test_two_stores_are_deleted_while_they_are_searched_and_the_third_answers(tmp_path: Path) -> None:
    async with room(tmp_path) as documents:
        stores = [(await fill(documents, count=4))[0] for _ in range(3)]
        for each in stores:
            await until_through(documents, each)
        gone: set[str] = set()
        late = 0

        async def search(store: str) -> None:
            nonlocal late
            for _ in range(30):
                was_gone = store in gone
                try:
                    result = await documents.stores.search(SearchRequest(store, ["unit1n7"]))
                except NotFoundError:
                    assert store != stores[2]
                    return
                late += was_gone
                assert result.hits or store != stores[2]

        async def delete(store: str) -> None:
            await documents.stores.delete(store, tenant="")
            gone.add(store)

        async with asyncio.timeout(DEADLINE_S), asyncio.TaskGroup() as tasks:
            for each in stores * 3:
                tasks.create_task(search(each))
            for each in stores[:2]:
                tasks.create_task(delete(each))
        assert late == 0, "a store that is deleted is not searched"
        assert await documents.stores.verify(stores[2], tenant="") == []


async def test_a_flipped_bit_in_the_keyword_index_is_mended_and_the_answers_are_the_same(tmp_path: Path) -> None:
    """The vector indexes have the same in `test_vectors_faults`: so few vectors as here have no file."""
    modes = ("keyword", "semantic", "hybrid")
    async with room(tmp_path) as documents:
        store, _ = await fill(documents)
        await until_through(documents, store)
        await documents.stores.rebuild(store, tenant="")
        before = [await answers(documents, store, mode) for mode in modes]
    files = [each for each in Settings(data_dir=tmp_path).keyword_index_dir.rglob("*") if each.is_file()]
    largest = max(files, key=lambda each: each.stat().st_size)
    content = bytearray(largest.read_bytes())
    content[len(content) // 2] ^= 4
    largest.write_bytes(content)
    async with room(tmp_path) as documents, asyncio.timeout(DEADLINE_S):
        while await documents.stores.verify(store, tenant=""):  # noqa: ASYNC110  (made anew beside the first searches)
            await asyncio.sleep(0.01)
        assert [await answers(documents, store, mode) for mode in modes] == before
