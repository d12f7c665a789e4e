"""What one search sees: a generation, the vectors that came since, and what was removed. Immutable."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from appliance.core.errors import ConflictError
from appliance.retrieval.vectors.generation import Generation
from appliance.retrieval.vectors.id_sets import Mask, contained, passing_mask
from appliance.retrieval.vectors.native import inner_products, unit
from appliance.retrieval.vectors.policy import Limits, candidates
from appliance.retrieval.vectors.truth import Floats, Ids, VectorTruth


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A store's index at one moment.

    Attributes:
        delta_ids: Chunks that the generation does not have, in the order they came.
        delta: Their vectors, of length 1, one a row.
        dead: Which positions of the generation were removed, or None when none were.
    """

    generation: Generation | None
    delta_ids: Ids
    delta: Floats
    dead: Mask | None

    @property
    def dimension(self) -> int:
        """Return the length of the vectors, 0 for an empty store that takes any."""
        return self.generation.facts.dimension if self.generation else self.delta.shape[1]

    @property
    def size(self) -> int:
        """Return the bytes that it takes, mapped ones included."""
        return self.delta.nbytes + self.delta_ids.nbytes + (self.generation.size if self.generation else 0)

    @property
    def dead_count(self) -> int:
        """Return how many of the generation's vectors were removed."""
        return 0 if self.dead is None else int(np.count_nonzero(self.dead))

    def living_ids(self) -> Ids:
        """Return the ids that can be found, ascending."""
        old = np.empty(0, np.int64) if self.generation is None else self.generation.ids
        return np.sort(np.concatenate([old if self.dead is None else old[~self.dead], self.delta_ids]))

    def with_added(self, ids: Ids, vectors: Floats) -> Snapshot:
        """Return a snapshot that has these too; those that it knows already, or that were removed, are left out."""
        _, first = np.unique(ids, return_index=True)
        ids, vectors = ids[np.sort(first)], vectors[np.sort(first)]
        new = ~np.isin(ids, self.delta_ids)
        if self.generation is not None:
            new &= ~contained(ids, self.generation.ids)
        if not new.any():
            return self
        before = self.delta if self.delta.shape[1] else np.empty((0, vectors.shape[1]), np.float32)
        return replace(
            self,
            delta_ids=np.concatenate([self.delta_ids, ids[new]]),
            delta=np.concatenate([before, unit(vectors[new])]),
        )

    def with_removed(self, ids: Ids) -> Snapshot:
        """Return a snapshot that has none of these."""
        ids = np.unique(ids)
        stays = ~contained(self.delta_ids, ids)
        dead = self.dead
        if self.generation is not None:
            gone = passing_mask(self.generation.ids, ids)
            dead = gone if dead is None else dead | gone
        return replace(
            self,
            delta_ids=self.delta_ids[stays],
            delta=self.delta[stays],
            dead=dead if dead is not None and dead.any() else None,
        )

    def search(self, queries: Floats, k: int, allowed: Ids | None, limits: Limits) -> list[Ids]:
        """Return for each query the ids of somewhat more than `k` that are nearest by codes, in no order."""
        found = [self._search_delta(query, candidates(k), allowed) for query in queries]
        if self.generation is None:
            return [ids for ids, _ in found]
        old = self.generation.search(queries, candidates(k), allowed, self.dead, limits)
        merged: list[Ids] = []
        for (ids, scores), (positions, approximate) in zip(found, old, strict=True):
            every = np.concatenate([ids, self.generation.ids[positions]])
            merged.append(_best(every, np.concatenate([scores, approximate]), candidates(k)))
        return merged

    def _search_delta(self, query: Floats, k: int, allowed: Ids | None) -> tuple[Ids, Floats]:
        ids, rows = self.delta_ids, self.delta
        if allowed is not None:
            chosen = contained(ids, allowed)
            ids, rows = ids[chosen], rows[chosen]
        scores = inner_products(query, rows)
        if len(ids) > k:
            best = np.argpartition(scores, -k)[-k:]
            ids, scores = ids[best], scores[best]
        return ids, scores


EMPTY = Snapshot(None, np.empty(0, np.int64), np.empty((0, 0), np.float32), None)


def rescored(
    truth: VectorTruth, store: int, queries: Floats, found: list[Ids], k: int
) -> list[list[tuple[int, float]]]:
    """Return the best `k` for each query by the stored vectors: chunk id and cosine; equal ones by id.

    What the truth does not have any more is left out, whatever the index says.

    Raises:
        ConflictError: The stored vectors have another dimension than the queries: they are being embedded anew.
    """
    wanted = np.unique(np.concatenate(found)) if found else np.empty(0, np.int64)
    if not len(wanted):
        return [[] for _ in found]
    ids, vectors = truth.fetch(store, wanted)
    if not len(ids):
        return [[] for _ in found]
    require_dimension(store, vectors.shape[1], queries.shape[1])
    order = np.argsort(ids)
    ids, rows = ids[order], unit(vectors[order])
    hits: list[list[tuple[int, float]]] = []
    for query, candidate_ids in zip(queries, found, strict=True):
        mine = np.flatnonzero(contained(ids, np.sort(candidate_ids)))
        scores = inner_products(query, rows[mine])
        best = np.lexsort((ids[mine], -scores))[:k]
        hits.append([(int(ids[mine[each]]), float(scores[each])) for each in best])
    return hits


def require_dimension(store: int, known: int, given: int) -> None:
    """Check that vectors fit a store.

    Raises:
        ConflictError: They do not.
    """
    if known not in {0, given}:
        raise ConflictError(
            f"The vectors of store {store} have {known} dimensions, and these have {given}: another model made them.",
            advice="Name the model that embedded the store, or embed it anew with `appliance docs rebuild`.",
            code="dimension_changed",
        )


def _best(ids: Ids, scores: Floats, k: int) -> Ids:
    return ids[np.argpartition(scores, -k)[-k:]] if len(ids) > k else ids
