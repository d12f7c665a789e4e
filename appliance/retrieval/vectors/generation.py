"""One immutable index file, mapped into memory. Any number of threads may search it; nobody changes it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from appliance.core.errors import StorageError
from appliance.retrieval.vectors.coding import Codes, flat_codes, flat_like, mapped_codes
from appliance.retrieval.vectors.id_sets import Mask, passing_mask, positions_of
from appliance.retrieval.vectors.native import faiss
from appliance.retrieval.vectors.policy import Kind, Limits, Made, plan
from appliance.retrieval.vectors.truth import Floats, Ids

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

    def search(
        self, queries: Floats, k: int, allowed: Ids | None, dead: Mask | None, limits: Limits
    ) -> list[tuple[Ids, Floats]]:
        """Return for each query the positions nearest to it and their inner products by the 8-bit codes, best first.

        Args:
            queries: Of length 1, one a row.
            k: At most so many for each.
            allowed: Ids that may be found, ascending; None for all.
            dead: Positions that may not be found; None for none.
            limits: Where scanning pays.
        """
        if allowed is not None and len(allowed) <= limits.gathered(self.facts.kind):
            positions = positions_of(self.ids, allowed)
            return self._gather(queries, k, positions if dead is None else positions[~dead[positions]])
        passing = None if allowed is None else passing_mask(self.ids, allowed)
        if dead is not None:
            passing = ~dead if passing is None else passing & ~dead
        count = self.facts.count
        left = count if passing is None else int(np.count_nonzero(passing))
        how = plan(self.facts.made, k=k, passing=left, lists=self.lists, probes=self.facts.probes, limits=limits)
        if how.method == "gather":
            return self._gather(queries, k, np.arange(count) if passing is None else np.flatnonzero(passing))
        return self._scan(queries, min(k, left), passing, how.probes)

    def _gather(self, queries: Floats, k: int, positions: Ids) -> list[tuple[Ids, Floats]]:
        """Search in a copy of these codes alone."""
        if not len(positions):
            return [(np.empty(0, np.int64), np.empty(0, np.float32)) for _ in queries]
        few = flat_like(self.index, self.codes(positions))
        scores, places = few.search(queries, min(k, len(positions)))
        return [(positions[row], values) for row, values in zip(places, scores, strict=True)]

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

    def decoded(self, positions: Ids) -> Floats:
        """Return the vectors that the codes at these positions stand for, one a row."""
        steps = (self.codes(positions).astype(np.float32) + np.float32(0.5)) / np.float32(255)
        return np.asarray(self._least + self._range * steps, np.float32)
