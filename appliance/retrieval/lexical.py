"""The keyword index of all stores: BM25 over terms, derived from the truth and rebuilt from it on doubt.

    add ──► parts in memory ── `MOST_IN_MEMORY` passages ──► segment files ── merged by fours ──► up to 65,536 passages
    remove ─► passages in memory are dropped, those in files marked in the manifest; erase ─► files written anew without

Every change makes a new list of parts and puts it in the old one's place, so a search sees one state from its start to
its end and waits for nobody. Changes take turns. What is in memory is lost with the process and is added again by the
owner of the truth: at start it compares `chunk_ids` with its own, adds what is missing and removes what is too much.
`add` takes what is there already as done, so it may as well add everything behind `last_id`.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from itertools import chain, islice
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from appliance.core import words
from appliance.core.errors import StorageError, UnavailableError
from appliance.retrieval import bm25, postings
from appliance.retrieval.postings import NONE_REMOVED, Part
from appliance.retrieval.segments import DamagedError, Manifest, SegmentFolder, StoredPostings, entry_of

LOGGER = logging.getLogger("appliance.retrieval")

MOST_IN_MEMORY = 4096
"""Passages of all stores that wait in memory to be written: what a kill costs, a second's work."""

_STEP = 1024
"""Passages that are indexed at once, which bounds the memory that this takes."""

Parts = Mapping[int, tuple[Part, ...]]
"""The parts of each store."""


@dataclass(frozen=True, slots=True)
class _State:
    """All that an index is at one moment."""

    parts: Parts
    last_id: int = 0
    faults: tuple[str, ...] = ()


class KeywordIndex:
    """One index for all stores in a folder of its own. Any thread may call; a closed one refuses."""

    def __init__(self, folder: Path) -> None:
        """Open the index, or make an empty one. A damaged one is emptied and not searched until it is rebuilt.

        Raises:
            ConflictError: Another process has it.
            StorageError: The folder cannot be made, read or written.
        """
        self._folder = SegmentFolder(folder)
        self._changing = threading.Lock()
        self._closed = False
        try:
            self._state = self._open()
        except BaseException:
            self._folder.close()
            raise

    @property
    def last_id(self) -> int:
        """The highest chunk id that was ever written to the files: what is behind it may be lost with the process."""
        return self._state.last_id

    def chunk_ids(self, store: int | None = None) -> NDArray[np.int64]:
        """Return the ids that are here, of a store or of all, rising."""
        parts = self._state.parts
        wanted = chain.from_iterable(parts.values()) if store is None else parts.get(store, ())
        return np.sort(np.concatenate([np.empty(0, np.int64), *map(postings.alive_ids, wanted)]))

    def search(
        self, store: int, query: str, k: int, allowed: NDArray[np.int64] | None = None
    ) -> list[tuple[int, float]]:
        """Return the ids and BM25 scores of a store's k best passages, best first, then by id.

        Args:
            store: Whose passages.
            query: The question as it was asked.
            k: Most results.
            allowed: The only ids to look at, rising, or None for all.

        Raises:
            StorageError: The disk fails, or the index is closed.
            UnavailableError: The index was found damaged, and is not rebuilt yet.
        """
        self._refuse_when_closed()
        state = self._state
        if state.faults:
            raise UnavailableError(
                "The keyword index was damaged and is being made anew from the database.",
                advice="Search by meaning meanwhile, or try again.",
                retry_after_s=30,
            )
        return bm25.search(state.parts.get(store, ()), words.query_terms(query), k, allowed)

    def add(self, store: int, rows: Sequence[tuple[int, str]]) -> None:
        """Index passages of a store; those that are there already stay as they are.

        Args:
            store: Whose passages.
            rows: Their chunk ids, 1 and above, and texts.

        Raises:
            StorageError: They are searchable, but the disk is full or fails; adding them again tries to write again.
        """
        with self._turn():
            new = sorted(dict(rows).items())
            for first in range(0, len(new), _STEP):
                parts = _with(self._state.parts, store, new[first : first + _STEP])
                self._state = replace(self._state, parts=parts)
                self._write_if_many()

    def remove(self, chunk_ids: Sequence[int]) -> None:
        """Let passages be found no more; ids that are not here do not matter.

        Raises:
            StorageError: It could not be written down; nothing is removed.
        """
        ids = np.unique(np.asarray(chunk_ids, np.int64))
        with self._turn():
            old = self._state.parts
            parts = _filled({store: tuple(_without(part, ids) for part in each) for store, each in old.items()})
            if _stored(parts) == _stored(old):
                self._state = replace(self._state, parts=parts)
            else:
                self._replace(replace(self._state, parts=parts))

    def erase(self) -> None:
        """Write anew what holds removed passages: when this returns, nothing of them is in the index's files.

        Raises:
            StorageError: The disk is full or fails; do it again.
        """
        with self._turn():
            parts = {store: tuple(map(self._cleaned, each)) for store, each in self._state.parts.items()}
            self._replace(replace(self._state, parts=parts))

    def rebuild(self, rows: Iterable[tuple[int, int, str]]) -> None:
        """Make the index anew; searches find what the old one has until the new one is whole, and changes wait.

        Args:
            rows: Stores, chunk ids and texts of the whole truth.

        Raises:
            StorageError: The disk is full or fails; the old one stays. So it does when `rows` raises.
        """
        with self._turn():
            self._replace(self._built(iter(rows)))

    def flush(self) -> None:
        """Write what waits in memory, so that a kill costs nothing.

        Raises:
            StorageError: The disk is full or fails.
        """
        with self._turn():
            self._write()

    def verify(self) -> list[str]:
        """Read every file and return what is wrong; nothing is an empty list. `rebuild` mends all of it.

        Raises:
            StorageError: The index is closed.
        """
        with self._turn():
            found = list(self._state.faults)
            try:
                if self._folder.read_manifest() != _manifest(self._state):
                    found.append("the manifest is not the one that was written last")
            except (DamagedError, StorageError) as error:
                found.append(str(error))
            for part in _stored(self._state.parts):
                try:
                    self._folder.check_segment(part)
                except (DamagedError, StorageError) as error:
                    found.append(str(error))
        return found

    def close(self) -> None:
        """Write what waits in memory, and let another process have the folder. Idempotent.

        Raises:
            StorageError: It could not be written; the index is closed, and catches up when it is opened again.
        """
        with self._changing:
            if self._closed:
                return
            try:
                self._write()
            finally:
                self._closed = True
                self._state = _State({})
                self._folder.close()

    @contextmanager
    def _turn(self) -> Iterator[None]:
        """Change alone; a change that fails leaves no files behind."""
        with self._changing:
            self._refuse_when_closed()
            try:
                yield
            except BaseException:
                with suppress(StorageError):  # the error that is under way says more
                    self._folder.sweep(_names(self._state.parts))
                raise

    def _refuse_when_closed(self) -> None:
        if self._closed:
            raise StorageError("The keyword index is closed.", advice="The program is shutting down.")

    def _open(self) -> _State:
        try:
            state = self._opened()
        except DamagedError as error:
            LOGGER.warning("The keyword index is damaged and starts empty until it is rebuilt: %s.", error)
            state = _State({}, faults=(str(error),))
            self._folder.write_manifest(_manifest(state))
        self._folder.sweep(_names(state.parts))
        return state

    def _opened(self) -> _State:
        manifest = self._folder.read_manifest()
        if manifest is None:
            self._folder.write_manifest(_manifest(_State({})))  # from now on, segments without one are damage
            return _State({})
        if manifest.terms_version != words.VERSION:
            raise DamagedError(f"it has terms of version {manifest.terms_version}, not {words.VERSION}")
        parts: dict[int, tuple[Part, ...]] = {}
        for entry in manifest.segments:
            parts[entry.store] = (*parts.get(entry.store, ()), self._folder.open_segment(entry))
        return _State(parts, manifest.last_id, manifest.faults)

    def _replace(self, state: _State) -> None:
        """Make this the state, first on the disk, and delete the files of the one before."""
        self._folder.write_manifest(_manifest(state))
        self._state = state
        self._folder.sweep(_names(state.parts))

    def _write_if_many(self) -> None:
        if _unstored_size(self._state.parts) >= MOST_IN_MEMORY:
            self._write()

    def _write(self) -> None:
        if _unstored_size(self._state.parts):
            self._replace(self._written(self._state))

    def _written(self, state: _State) -> _State:
        """Return the state with everything in files; nobody is told of it yet."""
        parts = {store: self._in_files(each) for store, each in state.parts.items()}
        highest = (int(part.postings.ids[-1]) for part in _stored(parts))
        return replace(state, parts=parts, last_id=max(highest, default=state.last_id))

    def _in_files(self, parts: tuple[Part, ...]) -> tuple[Part, ...]:
        stored = [part for part in parts if _is_stored(part)]
        waiting = [part for part in parts if not _is_stored(part)]
        if not waiting:
            return parts
        return postings.merge_alike((*stored, self._merged(waiting)), self._merged)

    def _merged(self, parts: Sequence[Part]) -> Part:
        return Part(self._folder.write_segment(postings.merge(parts)), NONE_REMOVED)

    def _cleaned(self, part: Part) -> Part:
        return self._merged([part]) if len(part.removed) else part

    def _built(self, rows: Iterator[tuple[int, int, str]]) -> _State:
        state = _State({})
        while batch := list(islice(rows, _STEP)):
            stores: dict[int, dict[int, str]] = {}
            for store, chunk_id, text in batch:
                stores.setdefault(store, {})[chunk_id] = text
            for store, texts in stores.items():
                state = replace(state, parts=_with(state.parts, store, sorted(texts.items())))
            if _unstored_size(state.parts) >= MOST_IN_MEMORY:
                state = self._written(state)
                self._folder.sweep(_names(self._state.parts) | _names(state.parts))
        return self._written(state)


def _with(parts: Parts, store: int, rows: Sequence[tuple[int, str]]) -> Parts:
    """Return the parts with new passages in memory; rows that are there already are left out."""
    own = parts.get(store, ())
    ids = np.array([chunk_id for chunk_id, _ in rows], np.int64)
    known: set[int] = set()
    for part in own:
        known.update(part.postings.ids[postings.places_of(part.postings.ids, ids)].tolist())
    new = [row for row in rows if row[0] not in known]
    if not new:
        return parts
    added = Part(postings.build([(chunk_id, words.passage_terms(text)) for chunk_id, text in new]), NONE_REMOVED)
    stored = tuple(part for part in own if _is_stored(part))
    waiting = (*(part for part in own if not _is_stored(part)), added)
    return {**parts, store: (*stored, *postings.merge_alike(waiting, _merged_in_memory))}


def _merged_in_memory(parts: Sequence[Part]) -> Part:
    return Part(postings.merge(parts), NONE_REMOVED)


def _without(part: Part, ids: NDArray[np.int64]) -> Part:
    """Return the part without passages: marked as removed if it is in a file, else really gone."""
    removed = np.union1d(part.removed, postings.places_of(part.postings.ids, ids))
    if len(removed) == len(part.removed):
        return part
    marked = Part(part.postings, removed)
    return marked if _is_stored(part) or marked.size == 0 else _merged_in_memory([marked])


def _filled(parts: Parts) -> Parts:
    """Leave out parts without passages, and stores without parts."""
    filled = {store: tuple(part for part in each if part.size) for store, each in parts.items()}
    return {store: each for store, each in filled.items() if each}


def _is_stored(part: Part) -> bool:
    return isinstance(part.postings, StoredPostings)


def _stored(parts: Parts) -> list[Part]:
    return [part for part in chain.from_iterable(parts.values()) if _is_stored(part)]


def _unstored_size(parts: Parts) -> int:
    return sum(part.size for part in chain.from_iterable(parts.values()) if not _is_stored(part))


def _names(parts: Parts) -> set[str]:
    return {entry.name for entry in _manifest(_State(parts)).segments}


def _manifest(state: _State) -> Manifest:
    entries = [entry_of(store, part) for store, each in state.parts.items() for part in each if _is_stored(part)]
    return Manifest(words.VERSION, state.last_id, tuple(entries), state.faults)
