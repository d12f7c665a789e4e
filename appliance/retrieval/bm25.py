"""The best passages by BM25 (pure).

BM25 as Lucene has it: idf = ln(1 + (N - n + 0.5) / (n + 0.5)), k1 = 1.2, b = 0.75 (Robertson and Zaragoza, 2009).

Terms are read rarest first. When those that are left can no longer lift a passage that has none of the others among
the best, only passages that still can get there are looked up in them (MaxScore: Turtle and Flood, 1995):

    postings of rare terms ──► all scored ──► k-th best score, less than which is out
    postings of frequent terms ──► looked up for the few that are left
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from appliance.retrieval.postings import Counts, Hashes, Ids, Part, Places, Postings, places_of, term_hash

MOST_POSTINGS = 2_000_000
"""A search reads the rarest terms first and stops before this many postings; the rarest term is always read."""

MOST_TERMS = 256
"""A search looks for no more than so many terms, the rarest ones."""

K1 = 1.2
B = 0.75

_WORTH_JUDGING = 2048
"""Before a term with so many postings in a part it pays to find out which score is out."""

_SEARCH_COST = 8
"""To look a passage up in postings costs as much as to score so many of them."""

_SLACK = 1 + 1e-5
"""More than what single precision and another order of additions can change."""

_SMALLEST = float(np.finfo(np.float64).tiny)

Scores = NDArray[np.float64]
Rows = NDArray[np.intp]


@dataclass(frozen=True, slots=True, eq=False)
class _Run:
    """One term's postings in one part, and more than it can add to a score."""

    places: Places
    counts: Counts
    weight: np.float32
    most: float


@dataclass(frozen=True, slots=True)
class _Norm:
    """What a passage's length does to its scores: `base + slope * length` is added to how often it has a term."""

    base: np.float32
    slope: np.float32


def search(parts: Sequence[Part], terms: Sequence[str], k: int, allowed: Ids | None = None) -> list[tuple[int, float]]:
    """Return the ids and scores of the k best passages that have any of the terms, best first, then by id.

    Args:
        parts: All that the passages' scores depend on.
        terms: The question's, each once.
        k: Most results.
        allowed: The ids to choose from, rising, or None for all. They do not change a passage's score.
    """
    passages = sum(len(part.postings.ids) for part in parts)
    if k <= 0 or not terms or not passages:
        return []
    wanted = np.array([term_hash(term) for term in terms], np.uint64)
    spans = [_spans(part.postings, wanted) for part in parts]
    frequencies = np.sum([ends - starts for starts, ends in spans], axis=0)
    chosen = _within_budget(frequencies)
    weights = (K1 + 1) * np.log1p((passages - frequencies + 0.5) / (frequencies + 0.5))
    average = max(sum(part.postings.total for part in parts) / passages, 1.0)
    norm = _Norm(np.float32(K1 * (1 - B)), np.float32(K1 * B / average))
    best = _Best(k)
    for part, (starts, ends) in zip(parts, spans, strict=True):
        places = None if allowed is None else places_of(part.postings.ids, allowed)
        if places is not None and not len(places):
            continue
        found = [(int(starts[row]), int(ends[row]), float(weights[row])) for row in chosen if ends[row] > starts[row]]
        if found:
            runs = _read(part.postings, norm, found)
            hits, scores = _scored(part, runs, norm, places, best)
            best.add(part.postings.ids[hits], scores)
    return best.ranked()


def _spans(postings: Postings, wanted: Hashes) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return where each wanted term's postings begin and end; a term that is not there has none."""
    rows = np.searchsorted(postings.terms, wanted)
    if len(postings.terms) == 0:
        return np.zeros(len(wanted), np.int64), np.zeros(len(wanted), np.int64)
    inside = np.minimum(rows, len(postings.terms) - 1)
    starts = postings.starts[inside].astype(np.int64)
    ends = postings.starts[inside + 1].astype(np.int64)
    return starts, np.where(postings.terms[inside] == wanted, ends, starts)


def _within_budget(frequencies: NDArray[np.int64]) -> list[int]:
    """Return which terms to read, the rarest first, as far as the budget goes."""
    by_rarity = np.argsort(frequencies, kind="stable")
    by_rarity = by_rarity[frequencies[by_rarity] > 0][:MOST_TERMS]
    affordable = int(np.searchsorted(np.cumsum(frequencies[by_rarity]), MOST_POSTINGS, side="right"))
    return [int(each) for each in by_rarity[: max(affordable, 1)]]


def _read(postings: Postings, norm: _Norm, found: Sequence[tuple[int, int, float]]) -> list[_Run]:
    """Return postings by their starts, ends and weights."""
    least_norm = float(norm.base + norm.slope * postings.lengths.min())
    runs = []
    for start, end, weight in found:
        places, counts = postings.read(start, end)
        often = float(counts.max())
        most = _SLACK * weight * often / (often + least_norm)
        runs.append(_Run(places, counts, np.float32(weight), most))
    return runs


def _scored(part: Part, runs: Sequence[_Run], norm: _Norm, chosen: Places | None, best: _Best) -> tuple[Rows, Scores]:
    """Return the places that can be among the best, and their scores; 0 for one that is not found.

    Args:
        part: Whose places.
        runs: The terms' postings, the rarest term's first.
        norm: Of lengths.
        chosen: The places to choose from, or None for all.
        best: What was found in other parts.
    """
    scores: Scores = np.zeros(len(part.postings.ids))
    barred, candidates = _barred(part, chosen)
    left = np.cumsum([run.most for run in runs][::-1])[::-1].tolist()
    least = best.least
    for run, rest in zip(runs, left, strict=True):
        if candidates is None and len(run.places) >= _WORTH_JUDGING:
            scores[barred] = 0
            least = best.least_with(scores)
            candidates = np.flatnonzero(scores > 0) if least > rest else None
        if candidates is not None:
            candidates = candidates[scores[candidates] >= least - rest]
        _add(scores, run, norm, part.postings, candidates)
    scores[barred] = 0
    if candidates is None:
        candidates = np.flatnonzero(scores > 0)  # quicker than without the comparison
    return candidates, scores[candidates]


def _barred(part: Part, chosen: Places | None) -> tuple[Rows | Places, Rows | None]:
    """Return the places that may not be found, and all that may be if they are few."""
    if chosen is None:
        return part.removed, None
    if _SEARCH_COST * len(chosen) < len(part.postings.ids):
        return part.removed, chosen.astype(np.intp)
    is_barred = np.ones(len(part.postings.ids), np.bool_)
    is_barred[chosen] = False
    is_barred[part.removed] = True
    return np.flatnonzero(is_barred), None


def _add(scores: Scores, run: _Run, norm: _Norm, postings: Postings, candidates: Rows | None) -> None:
    """Add what a term gives to all its passages, or to the candidates among them at least.

    The types matter: NumPy takes by intp several times faster than by anything else.
    """
    places, counts = run.places, run.counts
    if candidates is not None and _SEARCH_COST * len(candidates) < len(places):
        wanted = candidates.astype(np.uint16)
        rows = np.minimum(np.searchsorted(places, wanted), len(places) - 1)
        rows = rows[places[rows] == wanted]
        places, counts = places[rows], counts[rows]
    at = np.minimum(places, len(scores) - 1).astype(np.intp)  # a bit may be flipped in a file
    often = counts.astype(np.float32)
    lengths = postings.lengths.take(at, mode="clip").astype(np.float32)  # to clip is quicker than to check
    scores[at] += run.weight * often / (often + norm.base + norm.slope * lengths)


class _Best:
    """The best so far: what cannot be among the k best is not looked at."""

    def __init__(self, k: int) -> None:
        self._k = k
        self._ids: Ids = np.empty(0, np.int64)
        self._scores: Scores = np.empty(0, np.float64)

    @property
    def least(self) -> float:
        """Return the score that a passage must have at least to be among the best."""
        return float(self._scores[-1]) if len(self._scores) == self._k else 0.0

    def least_with(self, scores: Scores) -> float:
        """Return the same if there were passages with these scores beside those that are known; 0 is none."""
        found = scores[scores > self.least]
        if len(found) < self._k:
            return self.least
        return float(np.partition(found, len(found) - self._k)[len(found) - self._k])

    def add(self, ids: Ids, scores: Scores) -> None:
        """Take in what is better; what has no score above 0 is not found."""
        hits = np.flatnonzero(scores >= max(self.least, _SMALLEST))
        if len(hits) > self._k:
            hits = hits[scores[hits] >= np.partition(scores[hits], len(hits) - self._k)[len(hits) - self._k]]
        every_id, every_score = np.append(self._ids, ids[hits]), np.append(self._scores, scores[hits])
        order = np.lexsort((every_id, -every_score))[: self._k]
        self._ids, self._scores = every_id[order], every_score[order]

    def ranked(self) -> list[tuple[int, float]]:
        """Return ids and scores."""
        return list(zip(self._ids.tolist(), self._scores.tolist(), strict=True))
