"""An inverted index as plain arrays: built from terms, and merged; `bm25` searches it.

Postings of a term are the places of the passages that have it, and how often. A set of postings holds at most 65,536
passages, so a place is 16 bits and the scores of all places fit a core's cache. Terms are kept as 64-bit hashes: two of
ten million are alike by chance once in 400,000 indexes, and an index holds no word of the text it was made from.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import repeat
from typing import Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

MOST_PASSAGES = 1 << 16
"""Passages of one set of postings."""

_ALIKE = 4
"""So many parts of one size are merged."""

T = TypeVar("T", bound=np.generic)
Ids = NDArray[np.int64]
Places = NDArray[np.uint16]
Counts = NDArray[np.uint8]
Hashes = NDArray[np.uint64]


class Postings(Protocol):
    """Postings in memory or in a file."""

    @property
    def ids(self) -> Ids:
        """Chunk ids, rising; a place is an index into them."""
        ...

    @property
    def lengths(self) -> NDArray[np.uint32]:
        """Terms of each passage, each time counted; shape as ids."""
        ...

    @property
    def total(self) -> int:
        """Return the sum of the lengths."""
        ...

    @property
    def terms(self) -> Hashes:
        """Hashes of the terms, rising."""
        ...

    @property
    def starts(self) -> NDArray[np.uint32]:
        """Where each term's postings begin, and where the last one's end: one more than terms."""
        ...

    def read(self, start: int, end: int) -> tuple[Places, Counts]:
        """Return the places and counts of some postings."""
        ...


@dataclass(frozen=True, slots=True, eq=False)
class MemoryPostings:
    """Postings as arrays; `places` and `counts` are all terms' postings, one term's behind the other's."""

    ids: Ids
    lengths: NDArray[np.uint32]
    terms: Hashes
    starts: NDArray[np.uint32]
    places: Places
    counts: Counts

    @property
    def total(self) -> int:
        """Return the sum of the lengths."""
        return int(self.lengths.sum(dtype=np.int64))

    def read(self, start: int, end: int) -> tuple[Places, Counts]:
        """Return the places and counts of some postings."""
        return self.places[start:end], self.counts[start:end]


@dataclass(frozen=True, slots=True, eq=False)
class Part:
    """Postings, and the places of those passages that are removed, rising."""

    postings: Postings
    removed: Places

    @property
    def size(self) -> int:
        """Return how many passages are there still."""
        return len(self.postings.ids) - len(self.removed)


NONE_REMOVED: Places = np.empty(0, np.uint16)


@lru_cache(maxsize=1 << 17)
def term_hash(term: str) -> int:
    """Return a term's hash, which never changes."""
    return int.from_bytes(hashlib.blake2b(term.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little")


def build(passages: Sequence[tuple[int, Iterable[str]]]) -> MemoryPostings:
    """Index passages.

    Args:
        passages: At most `MOST_PASSAGES` ids, rising, each with its terms.
    """
    hashes: list[int] = []
    counts: list[int] = []
    places: list[int] = []
    lengths = np.zeros(len(passages), np.uint32)
    for place, (_, terms) in enumerate(passages):
        counted = Counter(terms)
        lengths[place] = counted.total()
        hashes.extend(map(term_hash, counted))
        counts.extend(counted.values())
        places.extend(repeat(place, len(counted)))
    every = np.array(hashes, np.uint64)
    order = np.argsort(every, kind="stable")
    terms, starts = np.unique(every[order], return_index=True)
    return MemoryPostings(
        ids=np.array([each for each, _ in passages], np.int64),
        lengths=lengths,
        terms=terms,
        starts=np.append(starts, len(every)).astype(np.uint32),
        places=np.array(places, np.uint16)[order],
        counts=np.minimum(np.array(counts, np.int64), 255).astype(np.uint8)[order],
    )


def merge(parts: Sequence[Part]) -> MemoryPostings:
    """Make one set of postings of several, without what was removed from them."""
    ids = np.concatenate([_alive(part, part.postings.ids) for part in parts])
    lengths = np.concatenate([_alive(part, part.postings.lengths) for part in parts])
    order = np.argsort(ids, kind="stable")
    new_places = np.empty(len(ids), np.uint16)
    new_places[order] = np.arange(len(ids), dtype=np.uint16)
    pieces, first = [], 0
    for part in parts:
        pieces.append(_piece(part, new_places[first : first + part.size]))
        first += part.size
    terms = np.unique(np.concatenate([piece.terms for piece in pieces]))
    rows = [np.searchsorted(terms, piece.terms) for piece in pieces]
    totals = np.zeros(len(terms), np.int64)
    for row, piece in zip(rows, pieces, strict=True):
        totals[row] += piece.sizes
    starts = np.append(0, np.cumsum(totals))
    places, counts = np.empty(starts[-1], np.uint16), np.empty(starts[-1], np.uint8)
    following = starts[:-1].copy()
    for row, piece in zip(rows, pieces, strict=True):
        own_starts = np.cumsum(piece.sizes) - piece.sizes
        target = np.repeat(following[row] - own_starts, piece.sizes) + np.arange(len(piece.places))
        places[target], counts[target] = piece.places, piece.counts
        following[row] += piece.sizes
    return MemoryPostings(ids[order], lengths[order], terms, starts.astype(np.uint32), places, counts)


def merge_alike(parts: Sequence[Part], merged: Callable[[Sequence[Part]], Part]) -> tuple[Part, ...]:
    """Merge parts of about the same size, `_ALIKE` or more of them, until there are only a few of each size.

    Args:
        parts: None is empty.
        merged: Makes one part of several.
    """
    left = list(parts)
    while group := _alike(left):
        together = merged(group)
        left = [part for part in left if part not in group]
        left.append(together)
    return tuple(left)


def _alike(parts: Sequence[Part]) -> list[Part]:
    """Return parts to be merged, if there are any: sizes within a factor of four, together not too many passages."""
    classes: dict[int, list[Part]] = {}
    for part in sorted(parts, key=lambda each: each.size):
        classes.setdefault((part.size.bit_length() - 1) // 2, []).append(part)
    for alike in classes.values():
        sizes = np.cumsum([part.size for part in alike])
        fitting = int(np.searchsorted(sizes, MOST_PASSAGES, side="right"))
        if len(alike) >= _ALIKE and fitting > 1:
            return alike[:fitting]
    return []


@dataclass(frozen=True, slots=True, eq=False)
class _Piece:
    """What a part brings to a merger: its terms that are left, and their postings with their new places."""

    terms: Hashes
    sizes: NDArray[np.int64]
    places: Places
    counts: Counts


def _piece(part: Part, new_places: Places) -> _Piece:
    postings = part.postings
    starts = postings.starts.astype(np.int64)
    places, counts = postings.read(0, int(starts[-1]))
    sizes = np.diff(starts)
    moved = np.zeros(len(postings.ids), np.uint16)
    if len(part.removed) == 0:
        moved[:] = new_places
        return _Piece(postings.terms, sizes, moved[places], counts)
    alive = _alive_mask(part)
    moved[alive] = new_places
    kept = alive[places]
    before = np.append(0, np.cumsum(kept))
    sizes = before[starts[1:]] - before[starts[:-1]]
    left = sizes > 0
    return _Piece(postings.terms[left], sizes[left], moved[places[kept]], counts[kept])


def _alive_mask(part: Part) -> NDArray[np.bool_]:
    alive = np.ones(len(part.postings.ids), np.bool_)
    alive[part.removed] = False
    return alive


def _alive(part: Part, values: NDArray[T]) -> NDArray[T]:
    return values if len(part.removed) == 0 else values[_alive_mask(part)]


def alive_ids(part: Part) -> Ids:
    """Return the ids of the passages that are not removed, rising."""
    ids = part.postings.ids
    return ids if len(part.removed) == 0 else ids[_alive_mask(part)]


def places_of(ids: Ids, wanted: Ids) -> Places:
    """Return the places of those wanted ids that are there; both rise."""
    return np.flatnonzero(_are_wanted(ids, wanted)).astype(np.uint16)


def _are_wanted(ids: Ids, wanted: Ids) -> NDArray[np.bool_]:
    are_wanted = np.zeros(len(ids), np.bool_)
    if len(ids) == 0:
        return are_wanted
    first, last = np.searchsorted(wanted, (ids[0], ids[-1] + 1))
    wanted = wanted[first:last]
    span = int(ids[-1] - ids[0]) + 1
    if span > 8 * MOST_PASSAGES:
        found = np.searchsorted(ids, wanted)
        are_wanted[found[ids[found] == wanted]] = True
        return are_wanted
    table = np.zeros(span, np.bool_)  # quicker than one search an id
    table[wanted - ids[0]] = True
    return table if span == len(ids) else table[ids - ids[0]]
