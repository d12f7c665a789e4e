"""What the derived indexes are made of and checked against, read from `retrieval.db`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import msgspec
import numpy as np

from appliance.retrieval.parts import Ids, Vectors
from appliance.store.database import Connection, Database

SLICE = 1000
"""Rows that one read returns; each has a snapshot of its own."""

RANGE = "store_files.first_chunk, store_files.chunks"
"""Which chunks a file has: quicker to read than their ids."""

_IN_KEYWORDS = "FROM chunks c JOIN store_files w ON w.key = c.store_file WHERE w.stage IN ('keywords', 'done')"


def chunk_ids(ranges: Iterable[tuple[int | None, int]]) -> Ids:
    """Return the ids of the chunks of files, ascending, from their `RANGE`s; one that has none is left out."""
    pairs = np.array([(first, count) for first, count in ranges if count], np.int64).reshape(-1, 2)
    pairs = pairs[np.argsort(pairs[:, 0], kind="stable")]
    firsts, counts = pairs[:, 0], pairs[:, 1]
    behind = np.cumsum(counts)
    return np.repeat(firsts - (behind - counts), counts) + np.arange(behind[-1] if len(behind) else 0)


class StoredVectors:
    """Every store's embedded chunks. Any thread may ask."""

    def __init__(self, database: Database) -> None:
        """Read from `retrieval.db`."""
        self._database = database

    def model(self, store: int) -> str:
        """Return the full name of the embedder that made a store's vectors, or "" when there are none."""
        sql = "SELECT model FROM stores WHERE key = ?"
        row = self._database.read(lambda each: each.execute(sql, (store,)).fetchone())
        return "" if row is None else str(row[0])

    def ids(self, store: int) -> Ids:
        """Return the ids of all chunks that have a vector, ascending; none for a store that does not exist."""
        every = f"SELECT {RANGE} FROM store_files WHERE store = ?"  # noqa: S608
        waiting = "SELECT id FROM chunks WHERE store = ? AND vector IS NULL ORDER BY id"

        def read(connection: Connection) -> Ids:
            ids = chunk_ids(tuple(row) for row in connection.execute(every, (store,)))
            without = np.fromiter((row[0] for row in connection.execute(waiting, (store,))), np.int64)
            return np.setdiff1d(ids, without, assume_unique=True) if len(without) else ids

        return self._database.read(read)

    def fetch(self, store: int, ids: Ids) -> tuple[Ids, Vectors]:
        """Return those of the chunks that are there and have a vector, in any order, and their vectors, one a row."""
        sql = """
            SELECT c.id, v.vector FROM json_each(?) wanted
            CROSS JOIN chunks c ON c.id = wanted.value CROSS JOIN vectors v ON v.id = c.vector WHERE c.store = ?
        """
        wanted = msgspec.json.encode(ids.tolist()).decode()

        def read(connection: Connection) -> tuple[Ids, Vectors]:
            rows = connection.execute(sql, (wanted, store)).fetchall()
            vectors = np.frombuffer(b"".join(row[1] for row in rows), "<f4").reshape(len(rows), -1 if rows else 0)
            return np.array([row[0] for row in rows], np.int64), vectors

        return self._database.read(read)


class StoredTexts:
    """Every chunk that the keyword index should have. Any thread may ask."""

    def __init__(self, database: Database) -> None:
        """Read from `retrieval.db`."""
        self._database = database

    def ids(self, store: int | None = None) -> Ids:
        """Return the ids of all of them, or of those of one store, ascending."""
        sql = f"SELECT {RANGE} FROM store_files WHERE stage IN ('keywords', 'done') AND :store IN (store, -1)"  # noqa: S608
        values = {"store": -1 if store is None else store}
        return self._database.read(lambda each: chunk_ids(tuple(row) for row in each.execute(sql, values)))

    def rows(self, ids: Ids) -> Iterator[tuple[int, int, str]]:
        """Yield store, id and text of those of the chunks that are still there, ascending."""
        sql = f"""
            SELECT c.store, c.id, c.text {_IN_KEYWORDS} AND c.id IN (SELECT value FROM json_each(?)) ORDER BY c.id
        """  # noqa: S608
        for first in range(0, len(ids), SLICE):
            wanted = msgspec.json.encode(ids[first : first + SLICE].tolist()).decode()
            yield from self._read(sql, wanted)

    def _read(self, sql: str, wanted: str) -> list[tuple[int, int, str]]:
        return self._database.read(lambda each: [tuple(row) for row in each.execute(sql, (wanted,))])
