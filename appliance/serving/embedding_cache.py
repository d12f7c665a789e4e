"""Embeddings that were computed before, by content hash, in a file of their own.

A key is the SHA-256 of everything that makes a vector what it is: the hashes of the model's files, how it is pooled and
run, and the token ids as they are evaluated, after truncation. The tenant is part of it: who could see that a text is
answered sooner would learn that somebody else had embedded it. Texts and tokens are not stored.

Nothing here ever fails a request, and no request waits for a write: what was computed is written behind its answer,
several requests' worth at once. A file that turns out to be damaged is made anew.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import logging
import sys
from array import array
from collections import deque
from collections.abc import Awaitable, Callable, Iterator, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any, TypeVar

from appliance.core.errors import StorageError, UnreadableDatabaseError
from appliance.core.types import FinishReason, Vector
from appliance.observe.metrics import Metrics
from appliance.registry.known import RegisteredModel
from appliance.serving.embedding_rows import delete_vectors, is_any_there, select_vectors, write_batch
from appliance.store.cache import delete_cache, open_cache
from appliance.store.database import Connection, Database

T = TypeVar("T")

LOGGER = logging.getLogger("appliance.serving")

FORMAT = f"embedding 1 {sys.byteorder}"
"""Part of every key: changes when the same model and tokens would give another vector, or another form of it."""

FEW_INPUTS = 8
"""So many at most are looked for in the index on the event loop."""

TOUCHES = 1024
"""Uses that are noted together where no new vector takes them along."""

MOST_PENDING_BYTES = 16 * 1024 * 1024
"""Vectors that may wait for a disk that is slow; more are not kept."""

Inputs = Sequence["array[int]"]
Compute = Callable[[Inputs], Awaitable[Sequence[Vector]]]


class EmbeddingCache:
    """Owns the file. All but what `Database` runs for it happens on the event loop."""

    def __init__(self, path: Path, most_bytes: int, metrics: Metrics) -> None:
        """Open or create the file; where that fails, or `most_bytes` is 0, nothing is kept.

        Args:
            path: The file; beside it stands a log of at most 16 MiB.
            most_bytes: Size that it may have. A file that is larger, from another setting, is made anew.
            metrics: Counts queries and hits.
        """
        self._path = path
        self._most_bytes = most_bytes
        self._metrics = metrics
        self._pending: deque[tuple[bytes, bytes]] = deque()
        self._used: deque[bytes] = deque(maxlen=16 * TOUCHES)
        self._is_write_queued = False
        self._damaged: Database | None = None
        self._renewal = asyncio.Lock()
        self._complaint = ""
        self._database = self._open()

    def space(self, registered: RegisteredModel, how: str, tenant: str) -> bytes:
        """Return what all keys of a model and tenant have in common.

        Args:
            registered: The model; every one of its files counts.
            how: Whatever else decides what its vectors are: pooling, execution provider, precision.
            tenant: The API key's id, or "".
        """
        files = sorted((each.role, each.sha256) for each in registered.files)
        return hashlib.sha256(repr((FORMAT, files, how, tenant)).encode()).digest()

    async def embed(
        self, model: str, space: bytes, inputs: Inputs, compute: Compute, *, keep: bool = True
    ) -> Sequence[Vector]:
        """Return a vector for each input: one that is here, or else what `compute` returns, which is kept.

        An input that comes twice is computed once.

        Args:
            model: The full `name:version`, for metrics.
            space: As `space` returns it.
            inputs: Token ids as they are evaluated.
            compute: Called with the inputs that are not here, if there are any; its errors are the caller's.
            keep: Whether what is computed may be kept.
        """
        if self._database is None:
            return await compute(inputs)
        started = asyncio.get_running_loop().time()
        keys, found = await self._look_up(space, inputs)
        missing = {key: tokens for key, tokens in zip(keys, inputs, strict=True) if key not in found}
        self._used.extend(found)
        metrics = self._metrics.for_embedder(model)
        metrics.embedding_cache(len(inputs), sum(1 for key in keys if key in found))
        computed = await compute(list(missing.values())) if missing else ()
        reused = sum(map(len, inputs)) - sum(map(len, missing.values()))
        metrics.prompt_tokens(reused)  # the engine counts what it computes
        if not missing:
            elapsed = asyncio.get_running_loop().time() - started
            metrics.request_finished(FinishReason.STOP, 0.0, elapsed, elapsed)
        fresh = dict(zip(missing, computed, strict=True))
        self._keep(fresh if keep else {})
        return [found[key] if key in found else fresh[key] for key in keys]

    def keys(self, space: bytes, inputs: Inputs) -> list[bytes]:
        """Return the keys of inputs, for `forget`."""
        return [hashlib.sha256(space + tokens.tobytes()).digest() for tokens in inputs]

    async def forget(self, keys: Sequence[bytes]) -> int:
        """Delete vectors that are here, so that they are in no file any more, and return how many there were.

        What is being computed meanwhile is kept behind this.

        Raises:
            StorageError: They could not be deleted, or are still in the log; it does no harm to try again.
        """
        database = self._database
        if database is None:
            return 0
        deleted = await database.write(lambda connection: delete_vectors(connection, keys))
        await database.erase_log()
        return deleted

    async def clear(self) -> None:
        """Delete everything: the file and its log.

        Raises:
            StorageError: They could not be deleted.
        """
        async with self._renewal:
            self._pending.clear()
            database, self._database = self._database, None
            if database is not None:
                self._database = await asyncio.to_thread(self._made_anew, database)

    def close(self) -> None:
        """Note the last uses, write what waits, and close the file."""
        if self._database is not None:
            self._queue_write(self._database)
            _close(self._database)
            self._database = None

    # Looking up

    async def _look_up(self, space: bytes, inputs: Inputs) -> tuple[list[bytes], dict[bytes, Vector]]:
        """Return the inputs' keys, and the vectors that are here; none where they cannot be read.

        Of few inputs the loop itself asks the index whether any is here: most are new, the index is small and in RAM,
        and another thread costs more than that. Vectors are read in a thread, since their disk may be slow or asleep.
        """
        if self._damaged is not None:
            await self._renew()
        database = self._database
        if len(inputs) > FEW_INPUTS:
            return await asyncio.to_thread(self._look_up_all, database, space, inputs)
        keys = self.keys(space, inputs)
        if not self._read(database, lambda connection: is_any_there(connection, keys)):
            return keys, {}
        return await asyncio.to_thread(self._look_up_all, database, space, inputs)

    def _look_up_all(
        self, database: Database | None, space: bytes, inputs: Inputs
    ) -> tuple[list[bytes], dict[bytes, Vector]]:
        keys = self.keys(space, inputs)
        return keys, self._read(database, lambda connection: select_vectors(connection, keys)) or {}

    def _read(self, database: Database | None, function: Callable[[Connection], T]) -> T | None:
        try:
            return None if database is None else database.read(function)
        except StorageError as error:
            self._note(database, error)
            return None

    # Keeping

    def _keep(self, vectors: dict[bytes, Vector]) -> None:
        for key, vector in vectors.items():
            if (len(self._pending) + 1) * len(vector) * vector.itemsize <= MOST_PENDING_BYTES:
                self._pending.append((key, vector.tobytes()))
        if self._database is not None and (self._pending or len(self._used) >= TOUCHES):
            self._queue_write(self._database)

    def _queue_write(self, database: Database) -> None:
        """Let the writer take what waits, all of it at once; while it is busy with others, more comes together."""
        if not self._is_write_queued:
            self._is_write_queued = True
            try:
                future = database.submit(self._write)
            except StorageError as error:  # it is closed
                self._is_write_queued = False
                self._note(database, error)
            else:
                future.add_done_callback(lambda done: self._note_failure(database, done))

    def _write(self, connection: Connection) -> None:
        """Write everything that waits (on the writer's thread)."""
        self._is_write_queued = False  # before taking: what comes from now on queues a write of its own
        write_batch(connection, dict(_drained(self._pending)), set(_drained(self._used)), self._most_bytes)

    # Failing

    def _note_failure(self, database: Database, done: Future[Any]) -> None:
        error = done.exception()
        if error is not None:
            self._is_write_queued = False  # it may have failed before it began
        if isinstance(error, StorageError):
            self._note(database, error)
        elif error is not None:
            LOGGER.error("the embedding cache failed", exc_info=error)

    def _note(self, database: Database | None, error: StorageError) -> None:
        if isinstance(error, UnreadableDatabaseError):
            self._damaged = database
        if str(error) != self._complaint:  # once, not for each request while the disk is full
            self._complaint = str(error)
            LOGGER.warning("embeddings are not cached: %s", error)

    async def _renew(self) -> None:
        """Make the file anew if the damage is that of the one that is open."""
        async with self._renewal:
            damaged, self._damaged = self._damaged, None
            if damaged is not None and damaged is self._database:
                self._database = None
                self._database = await asyncio.to_thread(self._remade, damaged)

    def _remade(self, database: Database) -> Database | None:
        try:
            return self._made_anew(database)
        except StorageError as error:
            self._note(None, error)
            return None

    def _made_anew(self, database: Database) -> Database:
        _close(database)
        delete_cache(self._path)
        return open_cache(self._path)

    def _open(self) -> Database | None:
        try:
            if not self._most_bytes or (self._path.exists() and self._path.stat().st_size > self._most_bytes):
                delete_cache(self._path)
            return open_cache(self._path) if self._most_bytes else None
        except StorageError as error:
            self._note(None, error)
            return None


def _drained(queue: deque[Any]) -> Iterator[Any]:
    """Yield what is in a queue that another thread appends to or clears."""
    with contextlib.suppress(IndexError):
        while True:
            yield queue.popleft()


def _close(database: Database) -> None:
    try:
        database.close()
    except StorageError as error:
        LOGGER.warning("the embedding cache did not close: %s", error)
