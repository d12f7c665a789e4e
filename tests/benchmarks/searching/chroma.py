"""chromadb in a process of its own on one core, by its environment's Python: `-m tests.benchmarks.searching.chroma`."""

from __future__ import annotations

import sys
import time
from itertools import islice
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from tests.benchmarks.searching.corpus import Corpus, K, attribute, recall
from tests.benchmarks.searching.jobs import Job, Made, Searched, Times, memory, on_one_core, timed
from tests.benchmarks.searching.vectors import Floats

EFFORTS = (50, 100, 200, 400, 800)
"""Of HNSW's `ef_search`, whose default is 100."""
WANTED_RECALL = 0.99
_ROWS = 5000
"""Of one call; it takes no more than 5,461."""


def make(corpus: Corpus, home: Path) -> Made:
    """Add vectors, texts and attributes."""
    began = time.perf_counter()
    collection = _client(home).create_collection(
        "benchmark", embedding_function=None, configuration={"hnsw": {"space": "cosine"}}
    )
    texts, start = corpus.texts(), 0
    for rows in corpus.vectors(_ROWS):
        block = list(islice(texts, len(rows)))
        numbers = range(start, start + len(rows))
        collection.add(
            ids=[str(each) for each in numbers],
            embeddings=rows,
            documents=block,
            metadatas=[{"part": int(each)} for each in attribute(np.arange(start, start + len(rows)))],
        )
        start += len(rows)
    return Made(time.perf_counter() - began, memory().peak)


def search(corpus: Corpus, home: Path) -> Searched:
    """Ask for the nearest vectors, of all texts and of one in a hundred, with the least effort that finds them."""
    rows = corpus.query_vectors()
    began = time.perf_counter()
    collection = _client(home).get_collection("benchmark", embedding_function=None)
    _nearest(collection, rows[:1])
    start_s = time.perf_counter() - began
    for effort in EFFORTS:
        collection.modify(configuration={"hnsw": {"ef_search": effort}})
        _nearest(collection, rows)  # what is lazy and what is read from the disk
        times, found = _nearest(collection, rows)
        reached = recall(found, corpus.exact())
        if reached >= WANTED_RECALL:
            break
    occupied = memory()
    filtered, passing = _nearest(collection, rows, {"where": {"part": 0}})
    return Searched(
        start_s=start_s,
        dense=times,
        dense_filtered=filtered,
        recall=reached,
        recall_filtered=recall(passing, corpus.exact(filtered=True)),
        memory=occupied,
        effort=effort,
    )


def _nearest(collection: Any, rows: Floats, only: dict[str, Any] | None = None) -> tuple[Times, list[list[int]]]:
    def find(row: Floats) -> list[int]:
        answer = collection.query(query_embeddings=row[None], n_results=K, include=["distances"], **(only or {}))
        return [int(each) for each in answer["ids"][0]]

    return timed(find, rows)


def _client(home: Path) -> Any:
    import chromadb  # only its own environment has it

    return chromadb.PersistentClient(str(home), chromadb.Settings(anonymized_telemetry=False))


def work(job: Job) -> Made | Searched:
    """Do a job here and now."""
    on_one_core()
    corpus = Corpus(Path(job.corpus), job.count, job.queries)
    return search(corpus, Path(job.home)) if job.kind == "search" else make(corpus, Path(job.home))


if __name__ == "__main__":
    sys.stdout.buffer.write(msgspec.json.encode(work(msgspec.json.decode(sys.stdin.buffer.read(), type=Job))))
