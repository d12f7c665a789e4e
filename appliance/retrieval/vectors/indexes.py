"""The dense indexes of all stores, under one memory cap.

A search takes the store's snapshot and needs no lock. Three locks a store, taken in this order, keep the rest apart:

    remaking   while the store is opened or its next generation is made, which may take minutes
    files      while its files are written or deleted
    changing   while its snapshot is replaced, which takes no longer than to read the truth's ids
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from appliance.core.errors import ConflictError, InvalidRequestError, StorageError, UnavailableError
from appliance.retrieval.vectors.build import merged, stored, trained
from appliance.retrieval.vectors.folder import DamagedError, StoreFolder
from appliance.retrieval.vectors.generation import Generation
from appliance.retrieval.vectors.id_sets import contained
from appliance.retrieval.vectors.native import return_memory, unit
from appliance.retrieval.vectors.policy import Limits, is_compaction_due, kind_for, step, to_close
from appliance.retrieval.vectors.snapshot import EMPTY, Snapshot, require_dimension, rescored
from appliance.retrieval.vectors.truth import Floats, Ids, VectorTruth
from appliance.store.locks import lock

LOGGER = logging.getLogger("appliance.retrieval")

_LOCK_WAIT_S = 2.0
_SEARCH_WAIT_S = 5.0
"""As long a search waits for a store that is being opened; one that is made anew takes longer."""

_SAMPLED_CODES = 256
_LEAST_COSINE = 0.9
"""Of a vector and what its 8-bit code stands for: .999 mostly, less where it is beyond the range of the training."""


class _Entry:
    """A store: its snapshot while it is open, and its locks."""

    def __init__(self) -> None:
        self.remaking = threading.Lock()
        self.files = threading.Lock()
        self.changing = threading.Lock()
        self.snapshot: Snapshot | None = None
        self.is_dropped = False
        self.last_used = 0


class VectorIndexes:
    """Finds the chunks whose vectors are nearest to a query's, by inner product of vectors scaled to length 1.

    Any thread may call anything at any time. Whoever changes a store changes the truth first.
    """

    def __init__(self, folder: Path, truth: VectorTruth, *, memory_bytes: int, limits: Limits | None = None) -> None:
        """Take the folder; nothing is read before a store is asked for.

        Args:
            folder: Where the index files are; it can be deleted while no process has it.
            truth: What the indexes are derived from.
            memory_bytes: Open indexes take no more than this, mapped files included, but for a single larger one.
            limits: Where the kinds of index give way to each other.

        Raises:
            ConflictError: Another process has it.
            StorageError: It cannot be made or read.
        """
        self._folder = folder
        self._truth = truth
        self._memory_bytes = memory_bytes
        self._limits = limits or Limits()
        self._entries: dict[int, _Entry] = {}
        self._guard = threading.Lock()
        self._uses = 0
        self._is_closed = False
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._hold = lock(folder, os.O_RDONLY | os.O_DIRECTORY, exclusive=True, wait_s=_LOCK_WAIT_S)
        except BlockingIOError as error:
            raise ConflictError(
                f"Another process has the indexes in {folder}.", advice="Stop it, or ask the running server instead."
            ) from error
        except OSError as error:
            raise StorageError(f"{folder} cannot be opened: {error.strerror}.", advice="Check its owner.") from error

    def search(self, store: int, queries: Floats, k: int, allowed: Ids | None = None) -> list[list[tuple[int, float]]]:
        """Return for each query the nearest chunks' ids and cosines, best first.

        Args:
            store: Its number.
            queries: One a row, shape (queries, dimension).
            k: At most so many for each.
            allowed: Only these chunks may be found, ascending; None for all.

        Raises:
            InvalidRequestError: A query is no row of finite numbers.
            ConflictError: The store's vectors have another dimension.
            UnavailableError: The index is being made anew.
        """
        rows = _checked(queries)
        _, snapshot = self._opened(store, wait_s=_SEARCH_WAIT_S)
        require_dimension(store, snapshot.dimension, rows.shape[1])
        only = None if allowed is None else np.ascontiguousarray(allowed, np.int64)
        found = snapshot.search(rows, k, only, self._limits)
        return rescored(self._truth, store, rows, found, k)

    def add(self, store: int, ids: Ids, vectors: Floats) -> None:
        """Let chunks be found, after the truth has them; from time to time this makes the next generation.

        Raises:
            InvalidRequestError: A vector is no row of finite numbers.
            ConflictError: The store's vectors have another dimension; nothing was added.
        """
        rows = _checked(vectors)
        if len(ids) != len(rows):
            raise ValueError(f"{len(ids)} ids for {len(rows)} vectors")
        while True:
            entry, _ = self._opened(store)
            with entry.changing:
                if entry.is_dropped:
                    return
                if entry.snapshot is not None:  # else it was closed to make room
                    require_dimension(store, entry.snapshot.dimension, rows.shape[1])
                    entry.snapshot = entry.snapshot.with_added(np.ascontiguousarray(ids, np.int64), rows)
                    break
        self._make_room(store)
        self._compact_if_due(store, entry)

    def remove(self, store: int, ids: Ids) -> None:
        """Let chunks not be found any more, after the truth has removed them; `erase` removes their bytes."""
        with self._guard:
            entry = self._entries.get(store)
        if entry is None:
            return  # it is opened with what the truth has
        with entry.changing:
            if entry.snapshot is not None:
                entry.snapshot = entry.snapshot.with_removed(np.ascontiguousarray(ids, np.int64))

    def drop(self, store: int) -> None:
        """Delete a store's index, after the truth has dropped the store. Searches that run end as they began.

        Raises:
            StorageError: The files cannot be deleted.
        """
        entry = self._entry(store)
        with entry.changing:
            entry.is_dropped = True
            entry.snapshot = None
        with entry.files:
            self._files(store).clear()
        with self._guard:
            self._entries.pop(store, None)

    def erase(self, store: int) -> None:
        """Make the index's files anew if a removed chunk's code is in them; nothing of it is left when this returns.

        Raises:
            StorageError: They cannot be written; then the codes are still there.
        """
        entry = self._entry(store)
        with entry.remaking:
            snapshot = entry.snapshot or self._open(store, entry)
            generation = snapshot.generation
            if generation is not None and not contained(generation.ids, self._truth.ids(store)).all():
                self._remake(store, entry, generation)
        self._make_room(store)

    def compact(self, store: int) -> None:
        """Make the next generation, of just what the truth has; searches go on.

        Raises:
            ConflictError: The truth has vectors of different dimensions.
            StorageError: It cannot be written; the one before holds.
        """
        entry = self._entry(store)
        with entry.remaking:
            snapshot = entry.snapshot or self._open(store, entry)
            self._remake(store, entry, snapshot.generation)
        self._make_room(store)

    def rebuild(self, store: int) -> None:
        """Make the index anew from the truth alone; searches go on with what there was.

        Raises:
            ConflictError: The truth has vectors of different dimensions.
            StorageError: It cannot be written; the one before holds.
        """
        entry = self._entry(store)
        with entry.remaking:
            self._remake(store, entry, None)
        self._make_room(store)

    def verify(self, store: int) -> list[str]:
        """Return what is wrong with a store's index, for a person; nothing is changed.

        Every byte is read, and a sample of the codes is compared with the stored vectors.
        """
        folder = self._files(store)
        entry = self._entry(store)
        with entry.files:
            try:
                manifest = folder.check()
                generation = None if manifest is None else folder.open(manifest)
            except (DamagedError, StorageError) as error:
                return [str(error)]
        problems: list[str] = []
        if generation is not None:
            problems += self._differences(store, generation)
        with entry.changing:
            snapshot, ids = entry.snapshot, self._truth.ids(store)
        if snapshot is not None and not np.array_equal(snapshot.living_ids(), ids):
            problems.append(f"The index of store {store} finds {len(snapshot.living_ids()):,} of {len(ids):,} chunks.")
        return problems

    def close(self) -> None:
        """Close all and let another process have the folder. Idempotent; running searches end as they began."""
        with self._guard:
            if not self._is_closed:
                os.close(self._hold)
            self._is_closed = True
            entries = list(self._entries.values())
            self._entries.clear()
        for entry in entries:
            with entry.remaking, entry.changing:
                entry.snapshot = None

    # Opening and closing

    @property
    def open_bytes(self) -> int:
        """Return what the open indexes take, mapped files included."""
        with self._guard:
            return sum(entry.snapshot.size for entry in self._entries.values() if entry.snapshot is not None)

    def _files(self, store: int) -> StoreFolder:
        return StoreFolder(self._folder / str(int(store)))

    def _entry(self, store: int) -> _Entry:
        with self._guard:
            if self._is_closed:
                raise UnavailableError("The indexes are closed: the server stops.", retry_after_s=5)
            self._uses += 1
            entry = self._entries.setdefault(store, _Entry())
            entry.last_used = self._uses
            return entry

    def _opened(self, store: int, *, wait_s: float = -1) -> tuple[_Entry, Snapshot]:
        entry = self._entry(store)
        snapshot = entry.snapshot
        if snapshot is not None:
            return entry, snapshot
        with _held(entry.remaking, store, wait_s):
            snapshot = entry.snapshot or self._open(store, entry)
        self._make_room(store)
        return entry, snapshot

    def _open(self, store: int, entry: _Entry) -> Snapshot:
        with entry.files:
            generation = self._files(store).load()
        if generation is not None and generation.facts.model != (model := self._truth.model(store)):
            was = generation.facts.model
            LOGGER.warning("The index of store %s is made anew: it is of %s, the vectors of %s.", store, was, model)
            generation = None
        return self._publish(store, entry, generation) or self._remake(store, entry, generation)

    def _publish(self, store: int, entry: _Entry, generation: Generation | None) -> Snapshot | None:
        """Let searches see a generation with what the truth has beside it; None if that is too much."""
        with entry.changing:
            if entry.is_dropped:
                return EMPTY
            ids = self._truth.ids(store)
            old = np.empty(0, np.int64) if generation is None else generation.ids
            missing = ids[~contained(ids, old)]
            if len(missing) > self._limits.delta(len(old)):
                return None
            dimension = generation.facts.dimension if generation else 0
            delta_ids, delta = stored(self._truth, store, missing, dimension)
            dead = ~contained(old, ids)
            entry.snapshot = Snapshot(generation, delta_ids, delta, dead if dead.any() else None)
            return entry.snapshot

    def _make_room(self, store: int) -> None:
        """Close what was unused for longest, until the open ones fit; one that is being made anew stays."""
        with self._guard:
            entries = sorted(self._entries.items(), key=lambda item: item[1].last_used)
            sizes = [(number, each.snapshot.size) for number, each in entries if each.snapshot is not None]
            closing = [self._entries[number] for number in to_close(sizes, self._memory_bytes, store)]
        for entry in closing:
            if entry.remaking.acquire(blocking=False):
                try:
                    with entry.changing:
                        entry.snapshot = None
                finally:
                    entry.remaking.release()

    # The next generation

    def _compact_if_due(self, store: int, entry: _Entry) -> None:
        if not self._is_due(entry.snapshot):
            return
        with entry.remaking:
            snapshot = entry.snapshot
            if snapshot is None or not self._is_due(snapshot):
                return  # another thread did it
            try:
                self._remake(store, entry, snapshot.generation)
            except StorageError as error:
                LOGGER.warning("The index of store %s is not compacted, but complete in memory: %s", store, error)

    def _is_due(self, snapshot: Snapshot | None) -> bool:
        if snapshot is None:
            return False
        count = snapshot.generation.facts.count if snapshot.generation else 0
        return is_compaction_due(count, len(snapshot.delta_ids), snapshot.dead_count, self._limits)

    def _remake(self, store: int, entry: _Entry, generation: Generation | None) -> Snapshot:
        """Make generations until one has what the truth has, but for a few; searches see the last one."""
        while True:
            generation = self._next(store, entry, generation)
            return_memory()
            if (snapshot := self._publish(store, entry, generation)) is not None:
                return snapshot

    def _next(self, store: int, entry: _Entry, old: Generation | None) -> Generation | None:
        ids, model = self._truth.ids(store), self._truth.model(store)
        made = old.facts.made if old is not None and old.facts.model == model else None
        how = step(len(ids), made, self._limits)
        folder = self._files(store)
        if how == "none":
            with entry.files:
                folder.clear()
            return None
        if how == "merge" and old is not None:
            built = merged(self._truth, store, ids, old)
        else:
            kind = kind_for(len(ids), made.kind if made else None, self._limits)
            fresh = trained(self._truth, store, ids, kind or "flat")
            if fresh is None:
                return self._next(store, entry, old)
            built = fresh
            del fresh
        with entry.files:
            if entry.is_dropped:
                return None
            manifest = folder.write(built, model)
            folder.flip(manifest)
            del built  # a million take 400 MB, and as much when they are mapped
            return_memory()
            return folder.open(manifest)

    def _differences(self, store: int, generation: Generation) -> list[str]:
        count = len(generation.ids)
        if not np.all(generation.ids[:-1] < generation.ids[1:]):
            return [f"The ids in the index of store {store} are not ascending."]
        positions = np.linspace(0, count - 1, min(count, _SAMPLED_CODES)).astype(np.int64)
        found, vectors = self._truth.fetch(store, generation.ids[positions])
        if not len(found):
            return []
        if vectors.shape[1] != generation.facts.dimension:
            return [
                f"The index of store {store} is of {generation.facts.dimension} dimensions, not {vectors.shape[1]}."
            ]
        coded = unit(generation.decoded(np.searchsorted(generation.ids, found)))
        wrong = int(np.count_nonzero((coded * unit(vectors)).sum(axis=1) < _LEAST_COSINE))
        return [f"In the index of store {store}, {wrong} of {len(found)} sampled codes are wrong."] if wrong else []


@contextmanager
def _held(gate: threading.Lock, store: int, wait_s: float) -> Iterator[None]:
    if not gate.acquire(timeout=wait_s):
        raise UnavailableError(
            f"The index of store {store} is being made anew from the database.",
            advice="Search by keyword meanwhile, or try again.",
            retry_after_s=30,
        )
    try:
        yield
    finally:
        gate.release()


def _checked(vectors: Floats) -> Floats:
    """Return the rows scaled to length 1."""
    rows = np.asarray(vectors, np.float32)
    if rows.ndim != 2 or rows.shape[1] == 0 or not np.isfinite(rows).all():
        raise InvalidRequestError(f"Vectors of shape {rows.shape} are no rows of finite numbers.")
    return unit(rows)
