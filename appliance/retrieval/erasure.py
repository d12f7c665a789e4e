"""Deletion that is erasure: nothing is found from the first transaction on, and no byte of the text is left at the end.

    1. one transaction: the rows that make chunks count are gone, and the erasure is recorded
    2. chunks and the vectors that only they had, some at a time; their ids are recorded in the same transactions
    3. uploaded files are unlinked; both indexes forget those ids, and make the files anew that have them
    4. the log of the database is emptied
    5. the record is deleted

Every step can be done again, so an erasure that a crash or a full disk ended goes on from its record. Rows go before
the indexes forget them: an index that is rebuilt meanwhile cannot take them in again.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from appliance.core.errors import ApplianceError
from appliance.retrieval.disk import storage_errors, sync_folder
from appliance.retrieval.parts import Keywords, Turns, VectorIndexes
from appliance.store.database import Connection, Database, Row

LOGGER = logging.getLogger("appliance.retrieval")

SLICE = 1000
"""Chunks that one transaction deletes; other writers take turns with it."""

PATIENCE_S = 60.0
"""How long a caller waits for the end; what is left then is done behind his back."""

RETRY_S = 5.0


class Erasure:
    """Erases what was removed. All its methods but those that take a connection run on the event loop."""

    def __init__(
        self, database: Database, folder: Path, keywords: Keywords, vectors: VectorIndexes, turns: Turns
    ) -> None:
        """Erase from the database, the folder of files and the indexes.

        Args:
            database: `retrieval.db`.
            folder: Of uploaded files.
            keywords: The keyword index.
            vectors: The vector indexes.
            turns: At the indexes.
        """
        self._database = database
        self._folder = folder
        self._keywords = keywords
        self._vectors = vectors
        self._turns = turns
        self._turn = asyncio.Lock()
        self._wake = asyncio.Event()
        self._finished = asyncio.Condition()
        self._is_running = False

    # Removing: step 1, in the caller's transaction

    def remove_file(self, connection: Connection, key: int) -> None:
        """Take an uploaded file out, and what was made of it in every store."""
        self.remove_store_files(connection, "file", key)
        name = connection.execute("DELETE FROM files WHERE key = ? RETURNING id", (key,)).fetchone()[0]
        connection.execute("INSERT INTO erasures (file) VALUES (?)", (name,))

    def remove_store_files(self, connection: Connection, column: str, key: int) -> None:
        """Take out rows of `store_files` by their `key` or `file`; the column is ours, never a caller's text."""
        sql = f"DELETE FROM store_files WHERE {column} = ? RETURNING store, key"  # noqa: S608
        rows = [tuple(row) for row in connection.execute(sql, (key,))]
        connection.executemany("INSERT INTO erasures (store, store_file) VALUES (?, ?)", rows)

    def remove_store(self, connection: Connection, key: int) -> None:
        """Take a store out with all that is in it."""
        connection.execute("DELETE FROM store_files WHERE store = ?", (key,))
        connection.execute("DELETE FROM stores WHERE key = ?", (key,))
        connection.execute("INSERT INTO erasures (store) VALUES (?)", (key,))

    # Erasing: the other steps

    async def erase(self, remove: Callable[[Connection], None]) -> None:
        """Run step 1 in a transaction, and return when the others are done, or after `PATIENCE_S`.

        Whoever gives up waiting stops nothing: the erasure is recorded.
        """

        def step(connection: Connection) -> int:
            remove(connection)
            return self.last(connection)

        last = await self._database.write(step)
        try:
            async with asyncio.timeout(PATIENCE_S):
                if self._is_running:
                    self._wake.set()
                    async with self._finished:
                        await self._finished.wait_for(lambda: not self._is_left(last))
                else:
                    await self.finish()
        except TimeoutError:
            LOGGER.warning("erasure %d takes longer than %g s; it goes on", last, PATIENCE_S)

    def last(self, connection: Connection) -> int:
        """Return the number of the newest erasure, 0 if there is none."""
        return int(connection.execute("SELECT coalesce(max(key), 0) FROM erasures").fetchone()[0])

    def _is_left(self, last: int) -> bool:
        sql = "SELECT 1 FROM erasures WHERE key <= ?"
        return self._database.read(lambda each: each.execute(sql, (last,)).fetchone()) is not None

    async def run(self) -> None:
        """Erase what is recorded, now and whenever something is removed, until cancelled."""
        self._is_running = True
        try:
            while True:
                self._wake.clear()
                await self._finish_or_complain()
        finally:
            self._is_running = False

    async def _finish_or_complain(self) -> None:
        wait_s = None
        try:
            await self.finish()
        except ApplianceError as error:
            LOGGER.warning("an erasure is not done yet: %s", error)
            wait_s = RETRY_S
        async with self._finished:
            self._finished.notify_all()
        try:
            async with asyncio.timeout(wait_s):
                await self._wake.wait()
        except TimeoutError:
            return

    def wake(self) -> None:
        """Say that an erasure was recorded."""
        self._wake.set()

    async def finish(self) -> None:
        """Do all that is recorded, together: what rewrites whole files is done once for all of them.

        Raises:
            StorageError: The disk is full, or the log is in use; it does no harm to try again.
        """
        async with self._turn:
            jobs = self._database.read(lambda each: each.execute("SELECT * FROM erasures ORDER BY key").fetchall())
            if not jobs:
                return
            for job in jobs:
                await self._delete_chunks(job)
            await asyncio.to_thread(self._unlink, [job["file"] for job in jobs if job["file"] is not None])
            async with self._turns.keywords:
                await asyncio.to_thread(self._forget_words, jobs)
            async with self._turns.vectors:
                await asyncio.to_thread(self._forget_vectors, jobs)
            await self._database.erase_log()
            keys = [(int(job["key"]),) for job in jobs]
            await self._database.write(
                lambda each: each.executemany("DELETE FROM erasures WHERE key = ?", keys).fetchall()
            )

    async def _delete_chunks(self, job: Row) -> None:
        while await self._database.write(lambda each: _delete_slice(each, job)):
            pass

    def _forget_words(self, jobs: Sequence[Row]) -> None:
        erased = self._erased(jobs)
        for _, ids in erased:
            self._keywords.remove(ids)
        if erased:
            self._keywords.erase()

    def _forget_vectors(self, jobs: Sequence[Row]) -> None:
        dropped = {int(job["store"]) for job in jobs if job["store"] is not None and job["store_file"] is None}
        for store in sorted(dropped):
            self._vectors.drop(store)
        erased = [(store, ids) for store, ids in self._erased(jobs) if store not in dropped]
        for store, ids in erased:
            self._vectors.remove(store, np.asarray(ids, np.int64))
        for store in sorted({store for store, _ in erased}):
            self._vectors.erase(store)

    def _erased(self, jobs: Sequence[Row]) -> list[tuple[int, range]]:
        """Return stores and ids of the chunks whose rows are gone."""
        sql = "SELECT store, first, last FROM erased_chunks WHERE erasure BETWEEN ? AND ? ORDER BY store, first"
        limits = (jobs[0]["key"], jobs[-1]["key"])
        rows = self._database.read(lambda each: each.execute(sql, limits).fetchall())
        return [(int(row["store"]), range(row["first"], row["last"] + 1)) for row in rows]

    def _unlink(self, names: Sequence[str]) -> None:
        if not names:
            return
        with storage_errors(self._folder):
            for name in names:
                (self._folder / name).unlink(missing_ok=True)
            if self._folder.is_dir():
                sync_folder(self._folder)


def _delete_slice(connection: Connection, job: Row) -> bool:
    """Delete some of a job's chunks with the vectors that only they had; return whether there were any (step 2)."""
    if job["store"] is None:
        return False
    column, key = ("store", job["store"]) if job["store_file"] is None else ("store_file", job["store_file"])
    sql = f"SELECT id, vector, next_vector FROM chunks WHERE {column} = ? LIMIT {SLICE}"  # noqa: S608
    rows = connection.execute(sql, (key,)).fetchall()
    ids = sorted(int(row["id"]) for row in rows)
    connection.executemany("DELETE FROM chunks WHERE id = ?", [(each,) for each in ids])
    delete_unused(connection, [int(each) for row in rows for each in (row["vector"], row["next_vector"]) if each])
    connection.executemany(
        "INSERT INTO erased_chunks (erasure, store, first, last) VALUES (?, ?, ?, ?)",
        [(job["key"], job["store"], first, last) for first, last in ranges(ids)],
    )
    return bool(ids)


def delete_unused(connection: Connection, vectors: Sequence[int]) -> None:
    """Delete those of the vectors that no chunk has any more."""
    connection.executemany(
        """
        DELETE FROM vectors WHERE id = ?1 AND NOT EXISTS (SELECT 1 FROM chunks WHERE vector = ?1)
            AND NOT EXISTS (SELECT 1 FROM chunks WHERE next_vector = ?1)
        """,
        [(each,) for each in vectors],
    )


def ranges(ids: Sequence[int]) -> list[tuple[int, int]]:
    """Return ascending ids as the first and last of each gapless run."""
    found: list[tuple[int, int]] = []
    for each in ids:
        if found and each == found[-1][1] + 1:
            found[-1] = (found[-1][0], each)
        else:
            found.append((each, each))
    return found
