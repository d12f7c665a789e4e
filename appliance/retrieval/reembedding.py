"""A store is embedded with another model: the old vectors answer until all the new ones are there.

    wish        stores.next_model is set ("" until the first answer tells its full name)
    work        chunks get `next_vector`, in the order of their ids; `stores.next_chunk` is how far that is
    flip        one transaction: the next vectors are the vectors, and what only the old ones had is deleted

A process that dies goes on behind `next_chunk`. Files that come meanwhile are embedded with the next model alone.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from appliance.core.clock import Clock
from appliance.core.errors import ApplianceError, NotFoundError
from appliance.core.types import Vector
from appliance.retrieval import jobs
from appliance.retrieval.embedding import BATCH, Embedding, known_hashes
from appliance.retrieval.erasure import delete_unused
from appliance.retrieval.jobs import Claims
from appliance.retrieval.parts import Turns, VectorIndexes
from appliance.store.database import Connection, Database, Row

LOGGER = logging.getLogger("appliance.retrieval")

FAILED = 0
"""In place of the next vector: the model does not take this text."""

_SEARCHABLE = "w.store = :store AND w.stage IN ('keywords', 'done')"


@dataclass(frozen=True, slots=True)
class _Batch:
    """Chunks of one store behind those that have their next vector; none if all have it."""

    store: int
    tenant: str
    model: str
    dimensions: int
    rows: Sequence[Row]
    known: frozenset[bytes]


def ask(connection: Connection, store: Row, embedder: str) -> None:
    """Wish that a store is embedded with a model; goes on with what was begun with the same one."""
    begun = store["next_model"]
    if begun is not None and embedder in (begun, begun.partition(":")[0]):
        return
    if not store["model"]:
        jobs.embed_again(connection, store["key"])  # there is nothing that could answer meanwhile
        return
    _forget(connection, store["key"])
    connection.execute("UPDATE stores SET next_model = '', lease_owner = '' WHERE key = ?", (store["key"],))


def _forget(connection: Connection, store: int) -> None:
    """Drop a wish with what was done for it."""
    sql = "SELECT DISTINCT next_vector FROM chunks WHERE store = ? AND next_vector > 0"
    vectors = [int(vector) for (vector,) in connection.execute(sql, (store,))]
    connection.execute("UPDATE chunks SET next_vector = NULL WHERE store = ? AND next_vector IS NOT NULL", (store,))
    delete_unused(connection, vectors)
    update = "UPDATE stores SET next_model = NULL, next_dimensions = 0, next_chunk = 0 WHERE key = ?"
    connection.execute(update, (store,))


class Reembedding:
    """Works on stores that are to be embedded with another model."""

    def __init__(
        self,
        database: Database,
        clock: Clock,
        claims: Claims,
        *,
        embedding: Embedding,
        vectors: VectorIndexes,
        turns: Turns,
    ) -> None:
        """Work on what is wished in the database.

        Args:
            database: `retrieval.db`.
            clock: For claims.
            claims: This worker's.
            embedding: Computes.
            vectors: The vector indexes.
            turns: At the indexes.
        """
        self._database = database
        self._clock = clock
        self._claims = claims
        self._embedding = embedding
        self._vectors = vectors
        self._turns = turns

    async def step(self) -> bool:
        """Embed some chunks, or flip a store that has all; return whether there was anything to do.

        Raises:
            ApplianceError: One of `PASSING`; nothing was changed.
        """
        batch = await self._database.write(self._claim)
        if batch is None:
            return False
        if not batch.rows:
            await self._flip(batch)
            return True
        texts = {row["text_hash"]: row["text"] for row in batch.rows if row["text_hash"] not in batch.known}
        try:
            model, computed, failed = await self._embedding.compute(batch.tenant, batch.model, texts)
        except NotFoundError as error:
            LOGGER.warning(
                "store %d keeps its vectors, for there is no embedder to replace them: %s", batch.store, error
            )
            await self._database.write(lambda each: self._give_up(each, batch))
            return True
        async with self._turns.vectors:
            begins_anew = await self._database.write(lambda each: self._write(each, batch, model, computed, failed))
            if begins_anew:
                await asyncio.to_thread(self._vectors.drop, batch.store)
        return True

    def _claim(self, connection: Connection) -> _Batch | None:
        now = self._clock.unix()
        free, values = self._claims.free(now)
        sql = f"""
            SELECT key, tenant, next_model, next_dimensions, next_chunk FROM stores
            WHERE next_model IS NOT NULL AND (lease_owner = ? OR {free}) ORDER BY key LIMIT 1
        """  # noqa: S608
        store = connection.execute(sql, (self._claims.owner, *values)).fetchone()
        if store is None:
            return None
        sql = "UPDATE stores SET lease_owner = ?, lease_until = ? WHERE key = ?"
        connection.execute(sql, (self._claims.owner, now + self._claims.lease_s, store["key"]))
        model = str(store["next_model"])
        sql = f"""
            SELECT c.id, c.text, c.text_hash FROM chunks c JOIN store_files w ON w.key = c.store_file
            WHERE c.store = :store AND c.id > :after AND {_SEARCHABLE} AND c.id < coalesce((
                SELECT min(k.id) FROM store_files u JOIN chunks k ON k.store_file = u.key
                WHERE u.store = :store AND u.stage = 'cut' AND u.status = 'in_progress'
            ), 9223372036854775807) ORDER BY c.id LIMIT {BATCH if model else 1}
        """  # noqa: S608  (the first answer tells the model's full name)
        rows = connection.execute(sql, {"store": store["key"], "after": store["next_chunk"]}).fetchall()
        known = known_hashes(connection, model, rows)
        return _Batch(store["key"], store["tenant"], model, store["next_dimensions"], rows, known)

    def _mine(self, connection: Connection, batch: _Batch) -> bool:
        """Return True while the wish is what it was when the batch was claimed."""
        sql = "SELECT 1 FROM stores WHERE key = ? AND lease_owner = ? AND next_model = ?"
        return connection.execute(sql, (batch.store, self._claims.owner, batch.model)).fetchone() is not None

    def _give_up(self, connection: Connection, batch: _Batch) -> None:
        if self._mine(connection, batch):
            _forget(connection, batch.store)

    def _write(
        self,
        connection: Connection,
        batch: _Batch,
        model: str,
        computed: dict[bytes, Vector],
        failed: dict[bytes, ApplianceError],
    ) -> bool:
        """Keep next vectors; return True if the store's vectors are gone, for they are of the same model."""
        if not self._mine(connection, batch):
            return False
        lengths = {len(each) for each in computed.values()} | ({batch.dimensions} if batch.dimensions else set())
        if len(lengths) > 1 or batch.model not in ("", model):
            LOGGER.warning("store %d is embedded from its start: %s is not what it was", batch.store, model)
            _forget(connection, batch.store)
            connection.execute("UPDATE stores SET next_model = '' WHERE key = ?", (batch.store,))
            return False
        now = connection.execute("SELECT model FROM stores WHERE key = ?", (batch.store,)).fetchone()[0]
        if model == now:  # vectors of one name cannot be told apart, so the old ones go first
            _forget(connection, batch.store)
            jobs.embed_again(connection, batch.store)
            return True
        for row in batch.rows:
            vector = FAILED if row["text_hash"] in failed else _kept(connection, row, model, computed)
            if vector is None:
                return False  # a vector that was known went meanwhile: the rest of the batch is done again
            connection.execute("UPDATE chunks SET next_vector = ? WHERE id = ?", (vector, row["id"]))
        update = "UPDATE stores SET next_model = ?, next_dimensions = ?, next_chunk = ? WHERE key = ?"
        connection.execute(update, (model, max(lengths, default=0), batch.rows[-1]["id"], batch.store))
        return False

    async def _flip(self, batch: _Batch) -> None:
        """Let the next vectors be the vectors, and make the index of them."""

        def write(connection: Connection) -> bool:
            if not self._mine(connection, batch):
                return False
            if not batch.dimensions and _has_vectors(connection, batch.store):
                LOGGER.warning("store %d keeps its vectors: none of its texts can be embedded anew", batch.store)
                _forget(connection, batch.store)
                return False
            _flip(connection, batch)
            return True

        async with self._turns.vectors:
            if not await self._database.write(write):
                return
            try:  # codes of two models are never searched together
                await asyncio.to_thread(self._vectors.drop, batch.store)
                await asyncio.to_thread(self._vectors.rebuild, batch.store)
            except ApplianceError as error:  # an index of another model is made anew when it is opened
                LOGGER.warning("the index of store %d is not made anew yet: %s", batch.store, error)
        LOGGER.info("store %d is embedded with %s", batch.store, batch.model)


def _has_vectors(connection: Connection, store: int) -> bool:
    sql = "SELECT 1 FROM chunks WHERE store = ? AND vector IS NOT NULL LIMIT 1"
    return connection.execute(sql, (store,)).fetchone() is not None


def _kept(connection: Connection, row: Row, model: str, computed: dict[bytes, Vector]) -> int | None:
    """Return the vector of a text, which is written if it is new; None if it is neither new nor there."""
    hashed = bytes(row["text_hash"])
    if hashed in computed:
        vector = np.asarray(computed[hashed], "<f4").tobytes()
        insert = "INSERT INTO vectors (text_hash, model, vector) VALUES (?, ?, ?) ON CONFLICT DO NOTHING"
        connection.execute(insert, (hashed, model, vector))
    sql = "SELECT id FROM vectors WHERE text_hash = ? AND model = ?"
    found = connection.execute(sql, (hashed, model)).fetchone()
    return None if found is None else int(found[0])


def _flip(connection: Connection, batch: _Batch) -> None:
    values = {"store": batch.store, "model": batch.model, "bytes": 4 * batch.dimensions}
    sql = "SELECT DISTINCT vector FROM chunks WHERE store = :store AND vector IS NOT NULL"
    old = [int(vector) for (vector,) in connection.execute(sql, values)]
    connection.execute(
        "UPDATE chunks SET vector = nullif(next_vector, 0), next_vector = NULL WHERE store = :store", values
    )
    delete_unused(connection, old)
    connection.execute(
        """
        UPDATE stores SET model = next_model, dimensions = next_dimensions,
            next_model = NULL, next_dimensions = 0, next_chunk = 0 WHERE key = :store
        """,
        values,
    )
    connection.execute(
        """
        UPDATE store_files SET stage = 'done', status = 'completed', error_code = '', error = '',
            embedded = (SELECT count(vector) FROM chunks WHERE store_file = store_files.key),
            usage = (
                SELECT sum(length(CAST(text AS BLOB))) + :bytes * count(vector)
                FROM chunks WHERE store_file = store_files.key
            )
        WHERE store = :store AND stage IN ('keywords', 'done') AND chunks > 0
        """,
        values,
    )
    connection.execute(
        """
        UPDATE store_files SET status = 'failed', error_code = 'server_error',
            error = (chunks - embedded) || ' of ' || chunks || ' passages cannot be embedded by ' || :model
                || '; they are found by keyword.'
        WHERE store = :store AND stage = 'done' AND embedded < chunks
        """,
        values,
    )
