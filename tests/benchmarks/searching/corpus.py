"""What is searched: vectors, texts and the exact answers, made once a size and kept in files for every contestant."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from tests.benchmarks.searching.vectors import DIMENSION, Floats, Mixture

Ids = npt.NDArray[np.int64]

K = 10
"""Nearest neighbours that recall is about."""
SHARES = 100
"""A text's number modulo this is its attribute: one value of it passes one text in a hundred."""
TEXTS_A_FILE = 10
"""Texts of a file; those of a file have one attribute."""

_WORDS = 100_000
_WORDS_A_TEXT = (30, 90)
_WORDS_A_QUERY = 6
_STOPPED = 100
"""The most frequent words, which nobody asks for."""


@dataclass(frozen=True, slots=True)
class Corpus:
    """Texts by number from 0, and queries, in a folder."""

    folder: Path
    count: int
    queries: int

    def make(self) -> None:
        """Write vectors, queries and exact answers, unless they are there."""
        if self._path("exact.npy").exists():
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        mixture = Mixture(self.count)
        queries = mixture.queries(self.queries)
        np.save(self._path("queries.npy"), queries)
        best = _Best(queries)
        passing = _Best(queries)
        start = 0
        with self._path("vectors.f32").open("wb") as file:
            for block in mixture.blocks():
                file.write(block.tobytes())
                numbers = np.arange(start, start + len(block))
                best.see(block, numbers)
                chosen = attribute(numbers) == 0
                passing.see(block[chosen], numbers[chosen])
                start += len(block)
        self._path("words.json").write_text(json.dumps(list(_texts(self.queries, 1, _WORDS_A_QUERY, _STOPPED))))
        np.save(self._path("filtered.npy"), passing.numbers)
        np.save(self._path("exact.npy"), best.numbers)

    def vectors(self, block: int = 8192) -> Iterator[Floats]:
        """Yield the vectors, block by block."""
        with self._path("vectors.f32").open("rb") as file:
            while data := file.read(4 * DIMENSION * block):
                yield np.frombuffer(data, np.float32).reshape(-1, DIMENSION)

    def texts(self) -> Iterator[str]:
        """Yield texts of words that are as frequent as Zipf says."""
        return _texts(self.count, 0, _WORDS_A_TEXT, 0)

    def query_vectors(self) -> Floats:
        """Return a vector for each query."""
        found: Floats = np.load(self._path("queries.npy"))
        return found

    def query_texts(self) -> list[str]:
        """Return the words of each query."""
        found: list[str] = json.loads(self._path("words.json").read_text())
        return found

    def exact(self, *, filtered: bool = False) -> Ids:
        """Return for each query the numbers of the nearest texts of all, or of those with the attribute 0."""
        found: Ids = np.load(self._path("filtered.npy" if filtered else "exact.npy"))
        return found

    def _path(self, name: str) -> Path:
        return self.folder / name


class _Best:
    """The nearest of all vectors that were seen, by plain arithmetic."""

    def __init__(self, queries: Floats) -> None:
        self._queries = queries
        self._scores = np.empty((len(queries), 0), np.float32)
        self.numbers: Ids = np.empty((len(queries), 0), np.int64)

    def see(self, rows: Floats, numbers: Ids) -> None:
        scores = np.concatenate([self._scores, self._queries @ rows.T], axis=1)
        known = np.concatenate([self.numbers, np.broadcast_to(numbers, (len(self._queries), len(rows)))], axis=1)
        order = np.argsort(-scores, axis=1)[:, :K] if scores.shape[1] <= K else _first(scores)
        self._scores = np.take_along_axis(scores, order, axis=1)
        self.numbers = np.take_along_axis(known, order, axis=1)


def _first(scores: Floats) -> Ids:
    among = np.argpartition(-scores, K, axis=1)[:, :K]
    return np.asarray(np.take_along_axis(among, np.argsort(-np.take_along_axis(scores, among, 1), axis=1), 1), np.int64)


def attribute(numbers: Ids) -> Ids:
    """Return the attribute of these texts."""
    return np.asarray(numbers // TEXTS_A_FILE % SHARES, np.int64)


def recall(found: list[list[int]], exact: Ids) -> float:
    """Return the share of the exact answers that were found, on average over the queries."""
    shared = [len(set(mine) & set(wanted)) / len(wanted) for mine, wanted in zip(found, exact.tolist(), strict=True)]
    return float(np.mean(shared))


def _texts(count: int, seed: int, words: int | tuple[int, int], skipped: int) -> Iterator[str]:
    random = np.random.default_rng([seed, 7])
    weights = np.cumsum(1 / np.arange(1 + skipped, _WORDS + 1))
    names = np.array([f"w{number:x}" for number in range(_WORDS)], object)
    for start in range(0, count, 4096):
        lengths = [words] * 4096 if isinstance(words, int) else random.integers(*words, size=4096).tolist()
        drawn = skipped + np.searchsorted(weights, random.random(sum(lengths)) * weights[-1])
        chosen = names[drawn].tolist()
        at = 0
        for length in lengths[: count - start]:
            yield " ".join(chosen[at : at + length])
            at += length
