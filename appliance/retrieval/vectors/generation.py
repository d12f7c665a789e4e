"""One immutable index file, mapped into memory. Any number of threads may search it; nobody changes it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from appliance.core.errors import StorageError
from appliance.retrieval.vectors.coding import Codes, Mask, flat_codes, mapped_codes
from appliance.retrieval.vectors.native import faiss, inner_products
from appliance.retrieval.vectors.policy import Kind, Limits, Made, plan
from appliance.retrieval.vectors.truth import Floats, Ids

_GATHER_BLOCK = 2048
"""Codes that are turned to floats at once: 3 MB at 384 dimensions, which stays in the processor's cache."""

_ID_BYTES = 8


class GenerationFacts(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What the manifest says of a generation.

    Attributes:
        model: The embedder that made the vectors.
        probes: Lists that a search without a filter scans.
        index_bytes: Where the ids begin in the file: behind what faiss wrote.
    """

    kind: Kind
    model: str
    dimension: int
    count: int
    trained_on: int
    probes: int
    index_bytes: int

    @property
    def made(self) -> Made:
        """Return what decides about the next generation."""
        return Made(self.kind, self.count, self.trained_on)


@dataclass(frozen=True, slots=True)
class BuiltIndex:
    """An index in memory, before it is written: of the kind, trained on so many, searched with so many lists."""

    index: Any
    ids: Ids
    kind: Kind
    trained_on: int
    probes: int


def write_index(built: BuiltIndex, model: str, write: Callable[[bytes], None]) -> GenerationFacts:
    """Hand the bytes of a generation's file to `write`, piece by piece, and return the facts for its manifest."""
    library = faiss()
    written = 0

    def take(piece: bytes) -> int:
        nonlocal written
        write(piece)
        written += len(piece)
        return len(piece)

    library.write_index(built.index, library.PyCallbackIOWriter(take))
    take(b"\0" * (-written % _ID_BYTES))
    index_bytes = written
    for start in range(0, len(built.ids), 2**17):
        take(built.ids[start : start + 2**17].astype("<i8").tobytes())
    return GenerationFacts(
        kind=built.kind,
        model=model,
        dimension=built.index.d,
        count=len(built.ids),
        trained_on=built.trained_on,
        probes=built.probes,
        index_bytes=index_bytes,
    )


class Generation:
    """An opened index file.

    Attributes:
        ids: Chunk ids, ascending; a code's position is its id's place here.
        size: Bytes that it may take of the memory, mapped ones included.
    """

    def __init__(self, path: Path, facts: GenerationFacts) -> None:
        """Map a file whose checksum was found right.

        Raises:
            StorageError: It is not what its facts say.
        """
        library = faiss()
        self.facts = facts
        try:
            self.ids: Ids = np.fromfile(path, "<i8", offset=facts.index_bytes).astype(np.int64, copy=False)
            flag = library.IO_FLAG_MMAP if facts.kind == "ivf" else library.IO_FLAG_MMAP_IFC
            self.index = library.read_index(str(path), flag)
        except (OSError, RuntimeError) as error:
            raise StorageError(f"The index file {path} cannot be read: {error}.") from error
        if not (len(self.ids) == self.index.ntotal == facts.count and self.index.d == facts.dimension):
            raise StorageError(f"The index file {path} has {self.index.ntotal} vectors, not {facts.count}.")
        self.lists = int(self.index.nlist) if facts.kind == "ivf" else 1
        self._codes, self._where = self._find_codes()
        trained = library.vector_to_array(self.index.sq.trained)
        self._least, self._range = trained[: facts.dimension], trained[facts.dimension :]
        self.size = path.stat().st_size + self.ids.nbytes + self._where.nbytes

    def _find_codes(self) -> tuple[Codes, Ids]:
        if self.facts.kind == "flat":
            codes = flat_codes(self.index).reshape(-1)
            return codes, np.arange(self.index.ntotal, dtype=np.int64) * self.index.code_size
        faiss().downcast_InvertedLists(self.index.invlists).prefetch_nthread = 0  # else each search starts 32 threads
        return mapped_codes(self.index)

    def search(self, queries: Floats, k: int, passing: Mask | None, limits: Limits) -> list[tuple[Ids, Floats]]:
        """Return for each query the positions nearest to it and their inner products by the 8-bit codes, best first.

        Args:
            queries: Of length 1, one a row.
            k: At most so many for each.
            passing: Which positions may be found; None for all.
            limits: Where scanning pays.
        """
        count = self.facts.count
        allowed = count if passing is None else int(np.count_nonzero(passing))
        how = plan(self.facts.kind, count, passing=allowed, lists=self.lists, probes=self.facts.probes, limits=limits)
        if how.method == "nothing":
            return [(np.empty(0, np.int64), np.empty(0, np.float32)) for _ in queries]
        if how.method == "gather":
            positions = np.flatnonzero(passing) if passing is not None else np.arange(count)
            return [_best(positions, self.scores(query, positions), k) for query in queries]
        return self._scan(queries, min(k, allowed), passing, how.probes)

    def _scan(self, queries: Floats, k: int, passing: Mask | None, probes: int) -> list[tuple[Ids, Floats]]:
        library = faiss()
        bits = None if passing is None else np.packbits(passing, bitorder="little")
        selector = None if bits is None else library.IDSelectorBitmap(len(bits), library.swig_ptr(bits))
        if self.facts.kind == "ivf":
            parameters = library.SearchParametersIVF(sel=selector, nprobe=probes)
        else:
            parameters = library.SearchParameters(sel=selector)
        scores, positions = self.index.search(queries, k, params=parameters)
        found = zip(positions, scores, strict=True)
        return [(row[row >= 0], values[row >= 0]) for row, values in found]

    def codes(self, positions: Ids) -> Codes:
        """Return the codes at these positions, one a row."""
        size = self.facts.dimension
        windows = np.lib.stride_tricks.as_strided(
            self._codes, (len(self._codes) - size + 1, size), (1, 1), writeable=False
        )
        return windows[self._where[positions]]

    def scores(self, query: Floats, positions: Ids) -> Floats:
        """Return the inner products of a query with what the codes at these positions stand for."""
        scaled = np.asarray(query * self._range / np.float32(255), np.float32)
        offset = np.float32(query @ self._least) + np.float32(0.5) * scaled.sum()
        scores = np.empty(len(positions), np.float32)
        for start in range(0, len(positions), _GATHER_BLOCK):
            part = slice(start, start + _GATHER_BLOCK)
            scores[part] = inner_products(scaled, self.codes(positions[part]).astype(np.float32)) + offset
        return scores

    def decoded(self, positions: Ids) -> Floats:
        """Return the vectors that the codes at these positions stand for, one a row."""
        steps = (self.codes(positions).astype(np.float32) + np.float32(0.5)) / np.float32(255)
        return np.asarray(self._least + self._range * steps, np.float32)


def _best(positions: Ids, scores: Floats, k: int) -> tuple[Ids, Floats]:
    if len(scores) > k:
        chosen = np.argpartition(scores, -k)[-k:]
        positions, scores = positions[chosen], scores[chosen]
    order = np.argsort(-scores, kind="stable")
    return positions[order], scores[order]
