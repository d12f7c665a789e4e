"""Vectors that lie as those of a real embedder do: a Gaussian mixture whose statistics are all-MiniLM-L6-v2's.

Taken from the 5,183 abstracts of SciFact: the length of the mean vector, how the variance falls over the principal
components, and the cosines of a text to its nearest, tenth and hundredth neighbour (medians .68, .53 and .40;
this gives .67, .54 and .38) and to any other (.15; .16). Topics have subjects, and those have clusters of some ten
texts.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]

DIMENSION = 384
BLOCK = 8192
"""Vectors that are made at once."""

_MEAN = 0.3624
"""Length of the mean of vectors of length 1."""
_VARIANCE = {0: 0.077, 1: 0.037, 2: 0.0338, 4: 0.0244, 8: 0.0158, 16: 0.0105, 32: 0.0065, 64: 0.0038, 128: 0.00196}
_VARIANCE |= {192: 0.00104, 256: 0.00044, 320: 0.00013, 383: 0.00007}
"""Share of a principal component, those in between by the line through their logarithms."""

_LEVELS = ((64, 0.27), (1024, 0.14))
"""Topics and subjects: how many there are, and their share of the variance."""
_CLUSTER, _CLUSTER_SHARE = 10, 0.12


@dataclass(frozen=True)
class Mixture:
    """So many vectors, block by block; the same ones each time."""

    count: int
    seed: int = 0

    def blocks(self) -> Iterator[Floats]:
        """Yield the vectors of all texts, of length 1."""
        for number, start in enumerate(range(0, self.count, BLOCK)):
            yield self._drawn(min(BLOCK, self.count - start), np.random.default_rng([self.seed, 1, number]))

    def queries(self, count: int) -> Floats:
        """Return vectors of questions: drawn as the texts are, but from none of them."""
        return self._drawn(count, np.random.default_rng([self.seed, 2]))

    def _drawn(self, count: int, random: np.random.Generator) -> Floats:
        """Return some vectors; centres of clusters are made from their numbers, as a million of them take 150 MB."""
        scale, basis = _scale(), _basis(self.seed)
        clusters = max(1, self.count // _CLUSTER)
        chosen = random.integers(clusters, size=count)
        rows: Floats = np.zeros((count, DIMENSION), np.float32)
        left = 1.0
        for level, (parts, share) in enumerate(_LEVELS):
            centres = np.random.default_rng([self.seed, 3, level]).standard_normal((parts, DIMENSION), np.float32)
            rows += np.sqrt(share) * centres[_spread(chosen, level) % parts]
            left -= share
        rows += np.sqrt(_CLUSTER_SHARE) * self._cluster_centres(chosen)
        rows += np.sqrt(left - _CLUSTER_SHARE) * random.standard_normal(rows.shape, np.float32)
        rows = rows * scale @ basis + np.float32(_MEAN) * basis[0]
        return np.asarray(rows / np.linalg.norm(rows, axis=1, keepdims=True), np.float32)

    def _cluster_centres(self, chosen: npt.NDArray[np.int64]) -> Floats:
        """Return a normal vector for each cluster: windows into one long row of numbers, alike by chance only."""
        length = 1 << 22
        numbers = np.random.default_rng([self.seed, 4]).standard_normal(length + DIMENSION, np.float32)
        windows = np.lib.stride_tricks.sliding_window_view(numbers, DIMENSION)
        found: Floats = windows[_spread(chosen, len(_LEVELS)) % length]
        return found


def _spread(numbers: npt.NDArray[np.int64], salt: int) -> npt.NDArray[np.int64]:
    """Return a number of 31 bits for each, all as good as drawn (Knuth's multiplicative hash)."""
    mixed = (numbers.astype(np.uint64) + np.uint64(salt * 7919 + 1)) * np.uint64(0x9E3779B97F4A7C15)
    return np.asarray(mixed >> np.uint64(33), np.int64)


def _scale() -> Floats:
    """Return the standard deviation along each principal component of vectors around a mean of that length."""
    places, shares = np.array(list(_VARIANCE)), np.array(list(_VARIANCE.values()))
    variance = np.exp(np.interp(np.arange(DIMENSION), places, np.log(shares)))
    return np.asarray(np.sqrt((1 - _MEAN**2) * variance / variance.sum()), np.float32)


def _basis(seed: int) -> Floats:
    """Return a random orthogonal matrix."""
    normal = np.random.default_rng([seed, 5]).standard_normal((DIMENSION, DIMENSION))
    return np.asarray(np.linalg.qr(normal)[0], np.float32)
