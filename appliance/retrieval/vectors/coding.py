"""Training and merging of faiss indexes. Vectors are 8-bit codes; a code is named by its position among the sorted ids.

A list of an IVF index holds positions, not chunk ids: faiss has no map from id to entry then, whose removal is where
it aborts or shifts. What is removed is left out when the next index is made; no index is ever changed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from appliance.retrieval.vectors.id_sets import Mask
from appliance.retrieval.vectors.native import faiss, release_pages
from appliance.retrieval.vectors.policy import TRIAL_NEAREST, Kind, least_probes, lists_for
from appliance.retrieval.vectors.truth import Floats, Ids

Codes = npt.NDArray[np.uint8]

BLOCK = 8192
"""Vectors that are read and encoded at once."""

WANTED_RECALL = 0.985
"""At the trial of the lists; queries differ more from the chunks than the trial's do."""

_LISTS_A_RELEASE = 256
_POINTS_A_LIST = 32
_TRAINING_ROUNDS = 8
_FLAT_SAMPLE = 50_000
_MARGIN = 0.1
"""Share of each dimension's range that is added on both sides for what comes later."""


def sample_size(kind: Kind, count: int) -> int:
    """Return how many of the vectors are to train an index of `count`."""
    return min(count, _POINTS_A_LIST * lists_for(count) if kind == "ivf" else _FLAT_SAMPLE)


def train(kind: Kind, sample: Floats, count: int) -> Any:
    """Return an empty index, trained on a sample, for about `count` vectors."""
    library = faiss()
    index = _empty(kind, sample.shape[1], min(lists_for(count), len(sample)))
    sized = index.sq
    sized.rangestat_arg = _MARGIN
    if kind == "ivf":
        index.cp.niter = _TRAINING_ROUNDS
        index.cp.min_points_per_centroid = 1
        index.cp.max_points_per_centroid = _POINTS_A_LIST
        index.cp.spherical = True
    index.train(np.ascontiguousarray(sample, np.float32))
    assert index.is_trained, library.__version__
    return index


def fill(index: Any, kind: Kind, blocks: Callable[[], Iterable[Floats]]) -> None:
    """Encode vectors that come in the order of their ids into an empty index.

    Args:
        index: As `train` returned it.
        kind: Its kind.
        blocks: Yields them all; called twice for lists, which get their lengths first: lists that grow take up to
            twice the memory.
    """
    faiss()
    if kind == "flat":
        for block in blocks():
            index.add(block)  # faiss numbers them from 0 on
        return
    lists = np.concatenate([_nearest_lists(index, block) for block in blocks()])
    _size_lists(index, np.bincount(lists, minlength=index.nlist))
    filled = np.zeros(index.nlist, np.int64)
    start = 0
    for block in blocks():
        chosen = lists[start : start + len(block)]
        _enter(index, chosen, np.arange(start, start + len(block)), index.sq.compute_codes(block), filled)
        start += len(block)
    index.ntotal = start


def trial(index: Any, vectors: Floats) -> int:
    """Return how many lists must be scanned to find what a scan of all finds.

    Each of the trial's queries is made of two vectors of the index: so they differ as these do from each other.
    """
    library = faiss()
    half = len(vectors) // 2
    queries = np.ascontiguousarray(vectors[:half] + 0.5 * vectors[half : 2 * half])
    k = min(TRIAL_NEAREST, index.ntotal)

    def found(probes: int) -> Ids:
        parameters = library.SearchParametersIVF(nprobe=probes)
        positions: Ids = index.search(queries, k, params=parameters)[1]
        return positions

    exact = found(index.nlist)

    def recall(probes: int) -> float:
        shared = sum(len(np.intersect1d(*rows)) for rows in zip(found(probes), exact, strict=True))
        return float(shared) / exact.size

    return least_probes(recall, int(index.nlist), WANTED_RECALL)


def flat_like(old: Any, codes: Codes) -> Any:
    """Return a flat index of codes that another index made."""
    index = _empty("flat", old.d, 0)
    _train_alike(index, old)
    index.add_sa_codes(np.ascontiguousarray(codes))
    return index


def merge_flat(old: Any, keep: Mask, order: npt.NDArray[np.intp], new: Iterator[Floats]) -> Any:
    """Return an index with the kept codes and new vectors behind them, put in the given order."""
    parts = [flat_codes(old)[keep]]
    parts += [old.sa_encode(block) for block in new]
    codes = np.concatenate(parts)
    return flat_like(old, codes if np.all(order[:-1] < order[1:]) else codes[order])


def merge_ivf(old: Any, keep: Mask, order: npt.NDArray[np.intp], new: Iterator[Floats]) -> Any:
    """Return an index with the kept entries and new vectors, whose positions are those in the given order."""
    library = faiss()
    index = _empty("ivf", old.d, old.nlist)
    index.quantizer.add(centroids(old))
    _train_alike(index, old)
    position_of = np.empty(len(order), np.int64)
    position_of[order] = np.arange(len(order))
    kept = int(keep.sum())
    renamed = np.full(len(keep), -1, np.int64)
    renamed[keep] = position_of[:kept]
    added = [(_nearest_lists(index, block), index.sq.compute_codes(block)) for block in new]  # few beside the old ones
    lists = np.concatenate([np.empty(0, np.int32), *(each for each, _ in added)])
    source = library.downcast_InvertedLists(old.invlists)
    stays = [keep[_list(library, source, number, old.code_size)[0]] for number in range(old.nlist)]
    release_pages(_mapped(source))
    filled = np.array([int(each.sum()) for each in stays], np.int64)
    _size_lists(index, filled + np.bincount(lists, minlength=old.nlist))
    for number, chosen in enumerate(stays):
        positions, codes = _list(library, source, number, old.code_size)
        _write_entries(index, number, 0, renamed[positions[chosen]], codes[chosen])
        if number % _LISTS_A_RELEASE == 0:
            release_pages(_mapped(source))
    release_pages(_mapped(source))
    done = kept
    for numbers, codes in added:
        _enter(index, numbers, position_of[done : done + len(numbers)], codes, filled)
        done += len(numbers)
    index.ntotal = done
    return index


def _nearest_lists(index: Any, block: Floats) -> npt.NDArray[np.int32]:
    return np.asarray(index.quantizer.assign(block, 1), np.int32).reshape(-1)


def _size_lists(index: Any, sizes: npt.NDArray[np.int64]) -> None:
    for number, size in enumerate(sizes.tolist()):
        index.invlists.resize(number, size)


def _enter(
    index: Any, lists: npt.NDArray[np.int32], positions: Ids, codes: Codes, filled: npt.NDArray[np.int64]
) -> None:
    """Write each of these entries into its list, behind the `filled` ones, which grow."""
    order = np.argsort(lists, kind="stable")
    numbers, starts = np.unique(lists[order], return_index=True)
    for number, entries in zip(numbers.tolist(), np.split(order, starts[1:]), strict=True):
        _write_entries(index, number, int(filled[number]), positions[entries], codes[entries])
        filled[number] += len(entries)


def _write_entries(index: Any, number: int, offset: int, positions: Ids, codes: Codes) -> None:
    library = faiss()
    if len(positions):
        positions, codes = np.ascontiguousarray(positions, np.int64), np.ascontiguousarray(codes)
        pointers = library.swig_ptr(positions), library.swig_ptr(codes)
        index.invlists.update_entries(number, offset, len(positions), *pointers)


def flat_codes(index: Any) -> Codes:
    """Return a view of a flat index's codes, one a row, which lives as long as the index."""
    view: Codes = faiss().rev_swig_ptr(index.codes.data(), index.ntotal * index.code_size)
    return view.reshape(index.ntotal, index.code_size)


def centroids(index: Any) -> Floats:
    """Return a copy of the centroids of an IVF index's lists."""
    library = faiss()
    quantizer = library.downcast_index(index.quantizer)
    view: Floats = library.rev_swig_ptr(quantizer.get_xb(), quantizer.ntotal * index.d)
    return view.reshape(quantizer.ntotal, index.d).copy()


def mapped_codes(index: Any) -> tuple[Codes, Ids]:
    """Return the file that an IVF index was mapped from, and at which byte each position's code begins."""
    library = faiss()
    lists = library.downcast_InvertedLists(index.invlists)
    where = np.empty(index.ntotal, np.int64)
    for number in range(index.nlist):
        positions, _ = _list(library, lists, number, index.code_size)
        where[positions] = lists.lists.at(number).offset + np.arange(len(positions)) * index.code_size
    mapped = _mapped(lists)
    release_pages(mapped)  # to read the positions alone took most of the file along
    return mapped, where


def _mapped(lists: Any) -> Codes:
    """Return the file that lists were mapped from."""
    mapped: Codes = faiss().rev_swig_ptr(lists.ptr, lists.totsize)
    return mapped


def _list(library: Any, lists: Any, number: int, code_size: int) -> tuple[Ids, Codes]:
    """Return views of a list's positions and codes."""
    size = lists.list_size(number)
    if size == 0:
        return np.empty(0, np.int64), np.empty((0, code_size), np.uint8)
    positions: Ids = library.rev_swig_ptr(lists.get_ids(number), size)
    codes: Codes = library.rev_swig_ptr(lists.get_codes(number), size * code_size)
    return positions, codes.reshape(size, code_size)


def _empty(kind: Kind, dimension: int, lists: int) -> Any:
    library = faiss()
    code, metric = library.ScalarQuantizer.QT_8bit, library.METRIC_INNER_PRODUCT
    if kind == "flat":
        return library.IndexScalarQuantizer(dimension, code, metric)
    by_residual = False  # one scale for all lists: merging and scoring one by one need no centroid
    return library.IndexIVFScalarQuantizer(library.IndexFlatIP(dimension), dimension, lists, code, metric, by_residual)


def _train_alike(index: Any, old: Any) -> None:
    faiss().copy_array_to_vector(faiss().vector_to_array(old.sq.trained), index.sq.trained)
    index.is_trained = True
