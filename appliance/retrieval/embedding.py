"""Chunks get their vectors, behind everything else that wants the embedder.

Within a store, chunks are embedded in the order of their ids: what a vector index has not seen yet is behind its last
id. One worker at a time embeds a store. A text of a tenant is embedded once a model, however many chunks have it.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from appliance.core.clock import Clock
from appliance.core.errors import ApplianceError, EngineError, NotFoundError
from appliance.core.types import EmbeddingModels, EmbeddingRequest, Priority, Vector
from appliance.retrieval import jobs
from appliance.retrieval.ingest import PASSING
from appliance.retrieval.jobs import Claims
from appliance.retrieval.parts import Ids, Turns, VectorIndexes, Vectors
from appliance.store.database import Connection, Database, Row

LOGGER = logging.getLogger("appliance.retrieval")

BATCH = 32
"""Chunks that are embedded together: enough for the embedder's own batches, few enough to let others in between."""

_WAITING = """
    FROM chunks c JOIN store_files w ON w.key = c.store_file
    WHERE c.store = :store AND c.vector IS NULL AND w.stage = 'keywords' AND w.status = 'in_progress'
"""


@dataclass(frozen=True, slots=True)
class _Batch:
    """Chunks of one store that wait for vectors, in the order of their ids."""

    store: int
    tenant: str
    model: str
    dimensions: int
    rows: Sequence[Row]
    known: frozenset[bytes]


class Embedding:
    """Embeds what waits."""

    def __init__(
        self,
        database: Database,
        clock: Clock,
        claims: Claims,
        *,
        models: EmbeddingModels,
        embedder: str,
        vectors: VectorIndexes,
        turns: Turns,
    ) -> None:
        """Embed chunks that are in the database.

        Args:
            database: `retrieval.db`.
            clock: For claims.
            claims: This worker's.
            models: Whatever embeds.
            embedder: The model for stores that have none yet.
            vectors: The vector indexes.
            turns: At the indexes.
        """
        self._database = database
        self._clock = clock
        self._claims = claims
        self._models = models
        self._embedder = embedder
        self._vectors = vectors
        self._turns = turns

    async def step(self) -> bool:
        """Embed some chunks, and return whether there were any.

        Raises:
            ApplianceError: One of `PASSING`; nothing was changed.
        """
        batch = await self._database.write(self._claim)
        if batch is None:
            return False
        texts = {row["text_hash"]: row["text"] for row in batch.rows if row["text_hash"] not in batch.known}
        try:
            model, computed, failed = await self.compute(batch.tenant, batch.model, texts)
        except NotFoundError as error:
            await self._without_model(batch, error)
            return True
        if computed and not self._fits(batch, model, computed.values()):
            await self._refuse(batch, model, computed)
            return True
        await self._keep(batch, model, computed, failed)
        return True

    def _claim(self, connection: Connection) -> _Batch | None:
        """Claim a store with waiting chunks, and return the first of them."""
        now = self._clock.unix()
        free, values = self._claims.free(now)
        sql = f"""
            SELECT key, tenant, model, dimensions FROM stores
            WHERE next_model IS NULL AND (lease_owner = ? OR {free}) AND key IN (
                SELECT store FROM store_files WHERE stage = 'keywords' AND status = 'in_progress'
            )
        """  # noqa: S608
        for store, tenant, model, dimensions in connection.execute(sql, (self._claims.owner, *values)).fetchall():
            rows = _waiting(connection, store, BATCH if model else 1)  # the first answer tells the model's full name
            if rows:
                sql = "UPDATE stores SET lease_owner = ?, lease_until = ? WHERE key = ?"
                connection.execute(sql, (self._claims.owner, now + self._claims.lease_s, store))
                return _Batch(store, tenant, model, dimensions, rows, known_hashes(connection, model, rows))
            _complete(connection, store)  # what a killed process had no time for
        return None

    # Computing

    async def compute(
        self, tenant: str, model: str, texts: dict[bytes, str]
    ) -> tuple[str, dict[bytes, Vector], dict[bytes, ApplianceError]]:
        """Return the model that answered, vectors by hash, and why others have none.

        Args:
            tenant: Whose texts they are.
            model: Full name, or "" for the one that embeds new stores.
            texts: By hash.

        Raises:
            NotFoundError: There is no such model.
            ApplianceError: One of `PASSING`.
        """
        if not texts:
            return model, {}, {}
        try:
            answered, vectors = await self._request(tenant, model, list(texts.values()))
            return answered, dict(zip(texts, vectors, strict=True)), {}
        except (*PASSING, NotFoundError):
            raise
        except ApplianceError as error:
            LOGGER.warning("a batch of %d chunks is embedded one by one: %s", len(texts), error)
        computed: dict[bytes, Vector] = {}
        failed: dict[bytes, ApplianceError] = {}
        for hashed, text in texts.items():
            try:
                full, vectors = await self._request(tenant, model, [text])
                computed[hashed], answered = vectors[0], full
            except (*PASSING, NotFoundError):
                raise
            except ApplianceError as error:
                failed[hashed] = error
        return answered if computed else model, computed, failed

    async def _request(self, tenant: str, model: str, texts: Sequence[str]) -> tuple[str, Sequence[Vector]]:
        request = EmbeddingRequest(
            model or self._embedder,
            texts,
            truncate=True,
            keep=False,  # `retrieval.db` has them, and erases them with their texts
            priority=Priority.FLEX,
            tenant=tenant,
        )
        answer = await self._models.embed(request)
        if not all(np.isfinite(each).all() for each in answer.vectors):
            raise EngineError(f"{answer.model} answers with numbers that are not finite.")
        if answer.truncated:  # chunks that were cut for an embedder that reads more
            LOGGER.warning(
                "%s reads the beginning of %d of %d chunks only; add their files again to have them cut for it",
                answer.model,
                len(answer.truncated),
                len(texts),
            )
        return answer.model, answer.vectors

    def _fits(self, batch: _Batch, model: str, vectors: Iterable[Vector]) -> bool:
        lengths = {len(each) for each in vectors} | ({batch.dimensions} if batch.dimensions else set())
        return len(lengths) == 1 and batch.model in ("", model)

    # Writing

    async def _keep(
        self, batch: _Batch, model: str, computed: dict[bytes, Vector], failed: dict[bytes, ApplianceError]
    ) -> None:
        def write(connection: Connection) -> list[int]:
            return self._write(connection, batch, model, computed, failed)

        linked = await self._database.write(write)
        if not linked:
            return
        async with self._turns.vectors:  # what is removed meanwhile is removed from the index behind this
            rows = self._database.read(lambda each: _vectors(each, linked))
            if rows:
                ids = np.array([chunk for chunk, _ in rows], np.int64)
                vectors = np.frombuffer(b"".join(vector for _, vector in rows), "<f4").reshape(len(rows), -1)
                await self._add(batch.store, ids, vectors)
        await self._database.write(lambda each: _complete(each, batch.store))

    async def _add(self, store: int, ids: Ids, vectors: Vectors) -> None:
        try:
            await asyncio.to_thread(self._vectors.add, store, ids, vectors)
        except ApplianceError as error:  # the truth has them: the index takes them in when it is opened or made anew
            LOGGER.warning("the vectors of %d chunks are not in the index of store %d: %s", len(ids), store, error)

    def _write(
        self,
        connection: Connection,
        batch: _Batch,
        model: str,
        computed: dict[bytes, Vector],
        failed: dict[bytes, ApplianceError],
    ) -> list[int]:
        """Keep vectors, link them to chunks that still wait, and return the ids of those."""
        sql = "SELECT 1 FROM stores WHERE key = ? AND lease_owner = ? AND model = ?"
        if connection.execute(sql, (batch.store, self._claims.owner, batch.model)).fetchone() is None:
            return []  # removed, taken over, or to be embedded anew
        dimensions = len(next(iter(computed.values()))) if computed else batch.dimensions
        update = "UPDATE stores SET model = ?, dimensions = ? WHERE key = ?"
        connection.execute(update, (model, dimensions, batch.store))
        files: dict[int, int] = {}
        linked: list[int] = []
        for row in batch.rows:
            if row["text_hash"] in failed:
                jobs.fail(connection, row["store_file"], "server_error", str(failed[row["text_hash"]]))
                continue
            if _link(connection, row, model, computed):
                linked.append(int(row["id"]))
                files[row["store_file"]] = files.get(row["store_file"], 0) + 1
        for key, count in files.items():
            _note_embedded(connection, key, count, dimensions)
        return linked

    async def _without_model(self, batch: _Batch, error: NotFoundError) -> None:
        """Go without vectors in a store that has none yet; one that has some says what is missing."""

        def write(connection: Connection) -> None:
            if batch.model:
                message = f"{error} Register the model again, or embed the store again with another."
                for key in {int(row["store_file"]) for row in batch.rows}:
                    jobs.fail(connection, key, "server_error", message)
            else:
                sql = """
                    UPDATE store_files SET status = 'completed', stage = 'done'
                    WHERE store = ? AND stage = 'keywords' AND status = 'in_progress'
                """
                connection.execute(sql, (batch.store,))

        LOGGER.warning("there is no embedder, so files are searchable by keyword only: %s", error)
        await self._database.write(write)

    async def _refuse(self, batch: _Batch, model: str, computed: dict[bytes, Vector]) -> None:
        """Fail the files of a batch whose vectors do not compare with those that the store has."""
        found = sorted({len(each) for each in computed.values()})
        message = (
            f"{model} answers with vectors of {', '.join(map(str, found))} numbers; the store has vectors of "
            f"{batch.dimensions} from {batch.model or 'no model'}. "
            "Embed the store again: appliance docs reembed."
        )

        def write(connection: Connection) -> None:
            for key in {int(row["store_file"]) for row in batch.rows}:
                jobs.fail(connection, key, "server_error", message)

        await self._database.write(write)


def _waiting(connection: Connection, store: int, limit: int) -> list[Row]:
    """Return the first chunks that wait, none of them behind one that is not in the keyword index yet."""
    sql = f"""
        SELECT c.id, c.text, c.text_hash, c.store_file {_WAITING} AND c.id < coalesce((
            SELECT min(k.id) FROM store_files u JOIN chunks k ON k.store_file = u.key
            WHERE u.store = :store AND u.stage = 'cut' AND u.status = 'in_progress'
        ), 9223372036854775807) ORDER BY c.id LIMIT {limit}
    """  # noqa: S608
    return connection.execute(sql, {"store": store}).fetchall()


def known_hashes(connection: Connection, model: str, rows: Sequence[Row]) -> frozenset[bytes]:
    """Return the hashes of those texts whose vectors are there."""
    sql = "SELECT 1 FROM vectors WHERE text_hash = ? AND model = ?"
    hashes = {bytes(row["text_hash"]) for row in rows}
    return frozenset(each for each in hashes if connection.execute(sql, (each, model)).fetchone())


def _link(connection: Connection, row: Row, model: str, computed: dict[bytes, Vector]) -> bool:
    """Give one chunk its vector, unless it went or was cancelled meanwhile, or its known vector did."""
    hashed = bytes(row["text_hash"])
    sql = f"SELECT 1 {_WAITING} AND c.id = :id"
    values = {"store": _store(connection, row["id"]), "id": row["id"]}
    if connection.execute(sql, values).fetchone() is None:
        return False
    if hashed in computed:
        vector = np.asarray(computed[hashed], "<f4").tobytes()
        insert = "INSERT INTO vectors (text_hash, model, vector) VALUES (?, ?, ?) ON CONFLICT DO NOTHING"
        connection.execute(insert, (hashed, model, vector))
    sql = "SELECT id FROM vectors WHERE text_hash = ? AND model = ?"
    found = connection.execute(sql, (hashed, model)).fetchone()
    if found is None:
        return False
    connection.execute("UPDATE chunks SET vector = ? WHERE id = ?", (found[0], row["id"]))
    return True


def _store(connection: Connection, chunk: int) -> int | None:
    row = connection.execute("SELECT store FROM chunks WHERE id = ?", (chunk,)).fetchone()
    return None if row is None else int(row[0])


def _note_embedded(connection: Connection, key: int, count: int, dimensions: int) -> None:
    sql = """
        UPDATE store_files SET embedded = embedded + :count, usage = usage + :bytes WHERE key = :key
    """
    connection.execute(sql, {"count": count, "bytes": 4 * dimensions * count, "key": key})


def _complete(connection: Connection, store: int) -> None:
    """Say that those files of a store are through all whose vectors are in the index."""
    sql = """
        UPDATE store_files SET stage = 'done', status = 'completed'
        WHERE store = ? AND stage = 'keywords' AND status = 'in_progress' AND embedded >= chunks
    """
    connection.execute(sql, (store,))


def _vectors(connection: Connection, chunks: Sequence[int]) -> list[tuple[int, bytes]]:
    """Return ids and vectors of those chunks that still count."""
    sql = """
        SELECT c.id, v.vector FROM chunks c JOIN vectors v ON v.id = c.vector
        JOIN store_files w ON w.key = c.store_file WHERE c.id = ?
    """
    found = [connection.execute(sql, (chunk,)).fetchone() for chunk in chunks]
    return [(int(row[0]), bytes(row[1])) for row in found if row is not None]
