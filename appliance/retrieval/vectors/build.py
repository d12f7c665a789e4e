"""Making the next generation in memory: from the truth alone, or from the present one and what came since."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from appliance.core.errors import StorageError
from appliance.retrieval.vectors.coding import BLOCK, fill, merge_flat, merge_ivf, sample_size, train, trial
from appliance.retrieval.vectors.generation import BuiltIndex, Generation
from appliance.retrieval.vectors.id_sets import contained
from appliance.retrieval.vectors.native import unit
from appliance.retrieval.vectors.policy import Kind
from appliance.retrieval.vectors.snapshot import require_dimension
from appliance.retrieval.vectors.truth import Floats, Ids, VectorTruth

_TRIAL_VECTORS = 128


def trained(truth: VectorTruth, store: int, ids: Ids, kind: Kind) -> BuiltIndex | None:
    """Train an index on these chunks of the truth and encode them all; None if they were all removed meanwhile.

    Raises:
        ConflictError: Their vectors are of different dimensions.
        StorageError: faiss failed, for want of memory mostly.
    """
    random = np.random.default_rng(len(ids))  # the same store gets the same index
    chosen = np.sort(random.choice(len(ids), sample_size(kind, len(ids)), replace=False))
    sample = stored(truth, store, ids[chosen])[1]
    if not len(sample):
        return None
    dimension = sample.shape[1]
    tried = random.choice(len(ids), min(_TRIAL_VECTORS, len(ids)), replace=False)
    try:
        index = train(kind, sample, len(ids))
        del sample
        fill(index, kind, lambda: vectors_of(truth, store, ids, dimension))
        trial_vectors = np.concatenate(list(vectors_of(truth, store, ids[tried], dimension)))
        probes = trial(index, trial_vectors) if kind == "ivf" else 1
    except (RuntimeError, MemoryError) as error:
        raise _failed(store, len(ids), error) from error
    return BuiltIndex(index, ids, kind, len(ids), probes)


def merged(truth: VectorTruth, store: int, ids: Ids, old: Generation) -> BuiltIndex:
    """Take from a generation what of it is among these chunks, without encoding it anew, and the others from the truth.

    Raises:
        ConflictError: Their vectors are of another dimension.
        StorageError: faiss failed, for want of memory mostly.
    """
    keep = contained(old.ids, ids)
    new = ids[~contained(ids, old.ids)]
    order = np.argsort(np.concatenate([old.ids[keep], new]), kind="stable")
    blocks = vectors_of(truth, store, new, old.facts.dimension)
    try:
        index = (merge_flat if old.facts.kind == "flat" else merge_ivf)(old.index, keep, order, blocks)
    except (RuntimeError, MemoryError) as error:
        raise _failed(store, len(ids), error) from error
    return BuiltIndex(index, ids, old.facts.kind, old.facts.trained_on, old.facts.probes)


def vectors_of(truth: VectorTruth, store: int, ids: Ids, dimension: int) -> Iterator[Floats]:
    """Yield the vectors of these chunks in their order, block by block, of length 1.

    One that was removed meanwhile is zeros: the truth does not list it any more, so it is never found.

    Raises:
        ConflictError: They have another dimension.
    """
    for start in range(0, len(ids), BLOCK):
        wanted = ids[start : start + BLOCK]
        found, vectors = stored(truth, store, wanted, dimension)
        block = np.zeros((len(wanted), dimension), np.float32)
        order = np.argsort(wanted)
        if len(found):
            block[order[np.searchsorted(wanted[order], found)]] = vectors
        yield block


def stored(truth: VectorTruth, store: int, ids: Ids, dimension: int = 0) -> tuple[Ids, Floats]:
    """Return those of the chunks that the truth has, and their vectors, one a row and of length 1.

    Raises:
        ConflictError: They have another dimension than the given one, or than each other.
    """
    there, rows = np.empty(len(ids), np.int64), np.empty((0, dimension), np.float32)
    count = 0
    for start in range(0, len(ids), BLOCK):
        found, vectors = truth.fetch(store, ids[start : start + BLOCK])
        if not len(found):
            continue
        if count == 0:
            require_dimension(store, dimension, vectors.shape[1])
            rows = np.empty((len(ids), vectors.shape[1]), np.float32)  # at once: a large store's sample has 200 MB
        require_dimension(store, rows.shape[1], vectors.shape[1])
        there[count : count + len(found)], rows[count : count + len(found)] = found, unit(vectors)
        count += len(found)
    return there[:count], rows[:count]


def _failed(store: int, count: int, error: BaseException) -> StorageError:
    return StorageError(
        f"The index of store {store} with {count:,} vectors could not be made: {error or 'out of memory'}.",
        advice="Free memory and run `appliance docs rebuild`; until then searches use the index as it is.",
    )
