"""How well a server finds what a test collection says it should, through its HTTP API and with its own settings."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from statistics import fmean
from typing import Any, Literal

import msgspec

from appliance.bench.client import Connection
from appliance.bench.judged import JudgedCollection
from appliance.bench.ranking import ndcg, recall, reciprocal_rank
from appliance.bench.report import Progress
from appliance.bench.statistics import quantile
from appliance.core.errors import UnavailableError

Mode = Literal["hybrid", "keyword", "semantic"]
MODES: tuple[Mode, ...] = ("hybrid", "keyword", "semantic")

UPLOADS_AT_ONCE = 8
FILES_A_BATCH = 500
HITS_A_PAGE = 50
DEPTH = 100
"""Documents of a ranking that are looked at."""

INGEST_TIMEOUT_S = 4 * 3600.0
POLL_S = 0.5

_BORDER = "f3b1c0d7e2a94856"


class LegFigures(msgspec.Struct, frozen=True):
    """How good one way to search was, on average over all queries; times are those of the first page of 50."""

    mode: Mode
    ndcg_10: float
    recall_10: float
    recall_100: float
    mrr_10: float
    empty: int
    p50_ms: float
    p95_ms: float


class Evaluation(msgspec.Struct, frozen=True):
    """What was measured; `ingest_s` is from the first upload until everything was searchable by meaning too."""

    documents: int
    queries: int
    ingest_s: float
    legs: list[LegFigures]


@dataclass(frozen=True, slots=True)
class Server:
    """Where to measure."""

    port: int
    api_key: str = ""

    async def connect(self) -> Connection:
        """Return an open connection. Raises ConnectionLostError."""
        connection = await Connection.open(self.port)
        if self.api_key:
            connection.headers = {"Authorization": f"Bearer {self.api_key}"}
        return connection


async def evaluate(
    server: Server, collection: JudgedCollection, progress: Progress, *, most_queries: int | None = None
) -> Evaluation:
    """Put the collection into a store of its own, ask its queries in every mode, and erase the store again.

    Raises:
        UnavailableError: The server answers with an error or not at all.
    """
    began = time.perf_counter()
    files: dict[str, str] = {}
    with await server.connect() as connection:
        store = (await call(connection, "POST", "/v1/vector_stores", {"name": "evaluation"}))["id"]
        try:
            await upload(server, collection.documents, files, progress)
            await take_in(connection, store, list(files), progress)
            ingest_s = time.perf_counter() - began
            queries = dict(islice(collection.queries.items(), most_queries))
            legs = []
            for mode in MODES:
                progress(f"{mode}: {len(queries):,} queries")
                rankings, seconds = await _ask(connection, store, mode, queries)
                found = {query: [files[each] for each in ids if each in files] for query, ids in rankings.items()}
                legs.append(figures(mode, found, collection, seconds))
        finally:
            progress("erasing the store")
            await call(connection, "DELETE", f"/v1/vector_stores/{store}")
            for file in files:
                await call(connection, "DELETE", f"/v1/files/{file}")
    return Evaluation(len(collection.documents), len(queries), ingest_s, legs)


async def upload(server: Server, documents: Mapping[str, str], files: dict[str, str], progress: Progress) -> None:
    """Upload every document as a file, several at once; `files` gets each one's document."""
    progress(f"uploading {len(documents):,} documents")
    waiting = iter([(number, *each) for number, each in enumerate(documents.items()) if each[1].strip()])

    async def work() -> None:
        with await server.connect() as connection:
            for number, document, text in waiting:
                body = _form(f"{number}.txt", text.encode())
                answer = await call(connection, "POST", "/v1/files", body, f"multipart/form-data; boundary={_BORDER}")
                files[answer["id"]] = document

    async with asyncio.TaskGroup() as tasks:
        for number in range(UPLOADS_AT_ONCE):
            tasks.create_task(work(), name=f"upload {number}")


def _form(filename: str, content: bytes) -> bytes:
    """Return a file and its purpose as a form; a document with the border in it would be cut, and none has it."""
    head = f'--{_BORDER}\r\nContent-Disposition: form-data; name="purpose"\r\n\r\nassistants\r\n--{_BORDER}\r\n'
    head += f'Content-Disposition: form-data; name="file"; filename="{filename}"\r\nContent-Type: text/plain\r\n\r\n'
    return head.encode() + content + f"\r\n--{_BORDER}--\r\n".encode()


async def take_in(connection: Connection, store: str, files: Sequence[str], progress: Progress) -> None:
    """Add uploaded files to a store, and wait until all are searchable by meaning too.

    Raises:
        UnavailableError: The server answers with an error or not at all, or a file failed.
    """
    for first in range(0, len(files), FILES_A_BATCH):
        batch = {"file_ids": files[first : first + FILES_A_BATCH]}
        await call(connection, "POST", f"/v1/vector_stores/{store}/file_batches", batch)
    said = -1.0
    async with asyncio.timeout(INGEST_TIMEOUT_S):
        while True:
            counts = (await call(connection, "GET", f"/v1/vector_stores/{store}"))["file_counts"]
            if counts["in_progress"] == 0:
                break
            done = 1 - counts["in_progress"] / len(files)
            if done - said >= 0.1:
                said = done
                progress(f"taking in, {done:.0%}")
            await asyncio.sleep(POLL_S)
    if counts["completed"] < len(files):
        raise UnavailableError(f"{len(files) - counts['completed']} of {len(files)} documents could not be taken in.")


async def _ask(
    connection: Connection, store: str, mode: Mode, queries: Mapping[str, str]
) -> tuple[dict[str, list[str]], list[float]]:
    """Return the files that were found for each query, best first, and how long each first page took."""
    rankings: dict[str, list[str]] = {}
    seconds = []
    for query, text in queries.items():
        rankings[query], first_s = await _search(connection, store, mode, text)
        seconds.append(first_s)
    return rankings, seconds


def figures(
    mode: Mode, rankings: Mapping[str, Sequence[str]], collection: JudgedCollection, seconds: Sequence[float]
) -> LegFigures:
    """Return the means over all rankings."""
    judged = [(ranking, collection.judgements[query]) for query, ranking in rankings.items()]
    return LegFigures(
        mode,
        ndcg_10=fmean(ndcg(*each) for each in judged),
        recall_10=fmean(recall(*each, 10) for each in judged),
        recall_100=fmean(recall(*each, DEPTH) for each in judged),
        mrr_10=fmean(reciprocal_rank(*each) for each in judged),
        empty=sum(not ranking for ranking, _ in judged),
        p50_ms=1000 * quantile(seconds, 0.5),
        p95_ms=1000 * quantile(seconds, 0.95),
    )


async def _search(connection: Connection, store: str, mode: Mode, query: str) -> tuple[list[str], float]:
    """Return the files that were found, best first, and how long the first page took."""
    found: list[str] = []
    first_s = 0.0
    for after in range(0, DEPTH, HITS_A_PAGE):
        body = {"query": query, "mode": mode, "max_num_results": HITS_A_PAGE, "after": str(after)}
        began = time.perf_counter()
        page = await call(connection, "POST", f"/v1/vector_stores/{store}/search", body)
        first_s = first_s or time.perf_counter() - began
        found += [each["file_id"] for each in page["data"]]
        if not page["has_more"]:
            break
    return found, first_s


async def call(
    connection: Connection,
    method: str,
    path: str,
    document: Mapping[str, Any] | bytes | None = None,
    content_type: str = "application/json",
) -> Any:
    """Return the answer to a request, decoded. Raises UnavailableError, which says which request failed."""
    with _answers(method, path):
        return (await connection.request(method, path, document, content_type)).json()


@contextmanager
def _answers(method: str, path: str) -> Iterator[None]:
    """Say which request it was that failed."""
    try:
        yield
    except UnavailableError as error:
        raise UnavailableError(f"{method} {path}: {error.message}", advice=error.advice, code=error.code) from error
