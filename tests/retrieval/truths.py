"""A small truth in SQLite behind the indexes' Protocol, and vectors that lie in clusters as embeddings do."""

from __future__ import annotations

import sqlite3
import threading
from pathlib import Path

import numpy as np
import numpy.typing as npt

Ids = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float32]

DIMENSION = 16


class SqliteTruth:
    """Chunks and vectors in a file, committed at once; any thread or process may use it."""

    def __init__(self, path: Path) -> None:
        self._connection = sqlite3.connect(path, check_same_thread=False, isolation_level=None, timeout=30)
        self._lock = threading.Lock()
        self._connection.executescript(
            """
            PRAGMA journal_mode = WAL;
            PRAGMA synchronous = OFF;
            CREATE TABLE IF NOT EXISTS chunks (id INTEGER PRIMARY KEY, store INTEGER NOT NULL, vector BLOB NOT NULL);
            CREATE INDEX IF NOT EXISTS by_store ON chunks (store, id);
            CREATE TABLE IF NOT EXISTS models (store INTEGER PRIMARY KEY, model TEXT NOT NULL);
            """
        )

    def put(self, store: int, ids: Ids, vectors: Floats) -> None:
        rows = [(int(each), store, row.tobytes()) for each, row in zip(ids, vectors, strict=True)]
        with self._lock, self._connection:
            self._connection.execute("BEGIN")
            self._connection.executemany("INSERT OR REPLACE INTO chunks VALUES (?, ?, ?)", rows)

    def take(self, ids: Ids) -> None:
        with self._lock, self._connection:
            self._connection.execute("BEGIN")
            self._connection.executemany("DELETE FROM chunks WHERE id = ?", [(int(each),) for each in ids])

    def drop(self, store: int) -> None:
        with self._lock:
            self._connection.execute("DELETE FROM chunks WHERE store = ?", (store,))

    def name_model(self, store: int, model: str) -> None:
        with self._lock:
            self._connection.execute("INSERT OR REPLACE INTO models VALUES (?, ?)", (store, model))

    def close(self) -> None:
        self._connection.close()

    # The indexes' Protocol

    def model(self, store: int) -> str:
        with self._lock:
            row = self._connection.execute("SELECT model FROM models WHERE store = ?", (store,)).fetchone()
        return row[0] if row else "model:1"

    def ids(self, store: int) -> Ids:
        with self._lock:
            rows = self._connection.execute("SELECT id FROM chunks WHERE store = ? ORDER BY id", (store,)).fetchall()
        return np.array([row[0] for row in rows], np.int64)

    def fetch(self, store: int, ids: Ids) -> tuple[Ids, Floats]:
        found: list[tuple[int, bytes]] = []
        for start in range(0, len(ids), 500):
            part = [int(each) for each in ids[start : start + 500]]
            marks = ",".join("?" * len(part))
            query = f"SELECT id, vector FROM chunks WHERE store = ? AND id IN ({marks})"
            with self._lock:
                found += self._connection.execute(query, (store, *part)).fetchall()
        if not found:
            return np.empty(0, np.int64), np.empty((0, 0), np.float32)
        rows = [np.frombuffer(blob, np.float32) for _, blob in found]
        return np.array([each for each, _ in found], np.int64), np.stack(rows)


def clustered(count: int, dimension: int = DIMENSION, seed: int = 0, topics: int = 40) -> Floats:
    """Return vectors of length 1 in clusters of different sizes."""
    random = np.random.default_rng(seed)
    centres = np.random.default_rng(7).standard_normal((topics, dimension))
    shares = 1 / np.arange(1, topics + 1)
    chosen = random.choice(topics, count, p=shares / shares.sum())
    rows = centres[chosen] + 0.6 * random.standard_normal((count, dimension))
    return np.asarray(rows / np.linalg.norm(rows, axis=1, keepdims=True), np.float32)


def exact(
    truth: SqliteTruth, store: int, queries: Floats, k: int, allowed: Ids | None = None
) -> list[list[tuple[int, float]]]:
    """Return what a search has to find, by plain arithmetic over the truth."""
    ids = truth.ids(store)
    if allowed is not None:
        ids = np.intersect1d(ids, allowed)
    if not len(ids):
        return [[] for _ in queries]
    ids, rows = truth.fetch(store, ids)
    order = np.argsort(ids)
    ids, rows = ids[order], rows[order]
    hits = []
    for query in queries:
        scores = np.asarray(rows @ (query / np.linalg.norm(query)), np.float32)
        best = np.lexsort((ids, -scores))[:k]
        hits.append([(int(ids[each]), float(scores[each])) for each in best])
    return hits
