"""Files and stores on a folder of their own, with real databases and keyword indexes and an embedder that counts."""

from __future__ import annotations

import asyncio
import hashlib
from array import array
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from appliance.core.clock import SystemClock
from appliance.core.errors import ApplianceError, InvalidRequestError
from appliance.core.retrieval import Chunking, NewStoreFile, SearchRequest, SearchResult, StoredFile
from appliance.core.settings import Settings
from appliance.core.types import EmbeddingRequest, Embeddings, Priority
from appliance.retrieval.documents import Documents
from appliance.retrieval.lexical import KeywordIndex
from appliance.retrieval.parsing.document import Block, ParsedDocument
from appliance.retrieval.parts import Count, Ids, Vectors
from appliance.retrieval.schema import open_retrieval
from appliance.retrieval.truth import StoredVectors
from appliance.store.database import Database

DEADLINE_S = 30.0


class PlainParser:
    """Reads UTF-8 text, a paragraph a block."""

    def __init__(self) -> None:
        self.parsed: list[str] = []
        self.gate: asyncio.Event | None = None
        self.errors: list[ApplianceError] = []

    async def parse(self, path: Path, filename: str, media_type: str) -> ParsedDocument:
        if self.gate is not None:
            await self.gate.wait()
        if self.errors:
            raise self.errors.pop(0)
        self.parsed.append(filename)
        text = (await asyncio.to_thread(path.read_bytes)).decode(errors="replace")
        if text.startswith("BAD"):
            raise InvalidRequestError(f"{filename} is damaged.", code="invalid_file")
        return ParsedDocument(tuple(Block("paragraph", each) for each in text.split("\n\n") if each.strip()))


@dataclass(frozen=True)
class Paragraph:
    text: str
    start: int
    end: int
    tokens: int
    page: int | None = None
    heading: tuple[str, ...] = ()


def cut_paragraphs(document: ParsedDocument, chunking: Chunking, count: Count) -> list[Paragraph]:
    """Return each block as a chunk."""
    texts = [each.text for each in document.blocks]
    found, start = [], 0
    for text, tokens in zip(texts, count(texts), strict=True):
        found.append(Paragraph(text, start, start + len(text), tokens))
        start += len(text) + 2
    return found


def vector_of(text: str, dimensions: int) -> array[float]:
    """Return the vector that the embedder below gives a text."""
    seed = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")
    numbers = np.random.default_rng(seed).standard_normal(dimensions).astype(np.float32)
    return array("f", (numbers / np.linalg.norm(numbers)).tobytes())


@dataclass
class CountingEmbedder:
    """Embeds by hashes, and notes every text that it was asked for."""

    log: Path | None = None
    model: str = "embedder:1"
    dimensions: int = 8
    texts: Counter[str] = field(default_factory=Counter)
    errors: list[ApplianceError] = field(default_factory=list)
    poison: str = "\0"
    longest: int = 4096
    gate: asyncio.Event | None = None

    async def embed(self, request: EmbeddingRequest) -> Embeddings:
        if self.gate is not None:
            await self.gate.wait()
        assert request.priority is Priority.FLEX, "interactive work goes first"
        if self.errors:
            raise self.errors.pop(0)
        texts = [str(each) for each in request.inputs]
        if any(self.poison in each for each in texts):
            raise InvalidRequestError("The input cannot be evaluated.")
        self.texts.update(texts)
        if self.log is not None:
            with self.log.open("a", encoding="utf-8") as file:
                file.writelines(f"{each}\n" for each in texts)
        vectors = [vector_of(each, self.dimensions) for each in texts]
        return Embeddings(self.model, vectors, [1] * len(texts))

    async def count_tokens(self, model: str, texts: Sequence[str]) -> Sequence[int]:
        return [len(each.split()) for each in texts]

    async def longest_input(self, model: str) -> int:
        return self.longest


class PlainVectors:
    """Vector indexes in memory, filled from the truth when a store is first looked at."""

    def __init__(self, truth: StoredVectors) -> None:
        self.truth = truth
        self.stores: dict[int, dict[int, np.ndarray]] = {}

    def add(self, store: int, ids: Ids, vectors: Vectors) -> None:
        self.stores.setdefault(store, {}).update(zip(ids.tolist(), vectors, strict=True))

    def remove(self, store: int, ids: Ids) -> None:
        for each in ids.tolist():
            self.stores.get(store, {}).pop(each, None)

    def drop(self, store: int) -> None:
        self.stores.pop(store, None)

    def erase(self, store: int) -> None:
        return

    def rebuild(self, store: int) -> None:
        ids, vectors = self.truth.fetch(store, self.truth.ids(store))
        self.stores[store] = dict(zip(ids.tolist(), vectors, strict=True))

    def verify(self, store: int) -> list[str]:
        here, wanted = sorted(self.stores.get(store, {})), self.truth.ids(store).tolist()
        return [] if here == wanted else [f"The index has {len(here)} of {len(wanted)} vectors."]


class NoSearch:
    async def search(self, request: SearchRequest) -> SearchResult:
        return SearchResult((), False, ())


async def once(data: bytes) -> AsyncIterator[bytes]:
    yield data


@dataclass
class Box:
    """A running set of documents and its parts."""

    database: Database
    documents: Documents
    parser: PlainParser
    embedder: CountingEmbedder
    keywords: KeywordIndex
    vectors: PlainVectors

    async def upload(self, text: str, filename: str = "a.txt", tenant: str = "") -> StoredFile:
        return await self.documents.files.create(filename, "assistants", once(text.encode()), tenant=tenant)

    async def add(self, store: str, *files: str, tenant: str = "") -> None:
        new = [NewStoreFile(each) for each in files]
        await asyncio.to_thread(self.documents.stores.add, store, new, tenant=tenant, batch=False)

    async def until(self, is_so: Callable[[], bool]) -> None:
        """Wait for a state that the database, an index or a part shows."""
        async with asyncio.timeout(DEADLINE_S):
            while not is_so():  # noqa: ASYNC110  (what it waits for is in a database or an index)
                await asyncio.sleep(0.005)

    async def until_through(self, store: str, tenant: str = "") -> None:
        await self.until(lambda: self.documents.stores.get(store, tenant=tenant).counts.in_progress == 0)

    async def until_reembedded(self, store: str) -> None:
        await self.until(lambda: self.documents.stores.get(store, tenant="").reembedding is None)
        await self.until_through(store)

    def rows(self, sql: str, *values: object) -> list[tuple[object, ...]]:
        return self.database.read(lambda each: [tuple(row) for row in each.execute(sql, values)])

    def keyword_hits(self, query: str, store: int = 1) -> list[str]:
        """Return the texts of what the keyword index finds and the truth has."""
        ids = [chunk for chunk, _ in self.keywords.search(store, query, 10_000)]
        return sorted(str(text) for each in ids for (text,) in self.rows("SELECT text FROM chunks WHERE id = ?", each))


@asynccontextmanager
async def box(
    folder: Path,
    *,
    running: bool = True,
    lease_s: float = 30.0,
    embedder: CountingEmbedder | None = None,
    database: Callable[[Path], Database] = open_retrieval,
    most_bytes: int = 2**20,
    embedding_model: str = "embedder",
    clock: SystemClock | None = None,
) -> AsyncIterator[Box]:
    """Open what is in the folder; with `running`, its work goes on behind the block."""
    opened = database(folder / "retrieval.db")
    keywords = KeywordIndex(folder / "keywords")
    vectors = PlainVectors(StoredVectors(opened))
    parser, embedder = PlainParser(), embedder or CountingEmbedder()
    settings = Settings(data_dir=folder, max_file_bytes=most_bytes, embedding_model=embedding_model)
    documents = Documents(
        settings,
        opened,
        clock or SystemClock(),
        parser=parser,
        cut=cut_paragraphs,
        counter=embedder,
        models=embedder,
        keywords=keywords,
        vectors=vectors,
        searcher=NoSearch(),
        lease_s=lease_s,
    )
    made = Box(opened, documents, parser, embedder, keywords, vectors)
    try:
        async with asyncio.TaskGroup() as tasks:
            work = tasks.create_task(documents.run()) if running else None
            try:
                yield made
            finally:
                if work is not None:
                    work.cancel()
    finally:
        keywords.close()
        with suppress(ApplianceError):
            opened.close()


def files_with(folder: Path, marker: bytes) -> Iterator[Path]:
    """Yield the files in which the bytes stand."""
    for path in sorted(folder.rglob("*")):
        if path.is_file() and marker in path.read_bytes():
            yield path
