"""How the states of a text's tokens become one vector (pure).

The ways are those of sentence-transformers, under the names that its folders give them. A folder may ask for several;
then their vectors stand one behind the other, in the order of `Pooling`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from enum import StrEnum
from typing import Any

import numpy as np
from numpy.typing import NDArray

from appliance.core.errors import ModelFileError

Floats = NDArray[np.float32]


class Pooling(StrEnum):
    """A way to make one vector; the value is its name in messages."""

    CLS = "cls"
    MAX = "max"
    MEAN = "mean"
    MEAN_SQRT_LEN = "mean_sqrt_len"
    WEIGHTED_MEAN = "weighted_mean"
    LAST = "last"


_FLAGS = {
    "pooling_mode_cls_token": Pooling.CLS,
    "pooling_mode_max_tokens": Pooling.MAX,
    "pooling_mode_mean_tokens": Pooling.MEAN,
    "pooling_mode_mean_sqrt_len_tokens": Pooling.MEAN_SQRT_LEN,
    "pooling_mode_weightedmean_tokens": Pooling.WEIGHTED_MEAN,
    "pooling_mode_lasttoken": Pooling.LAST,
}
_PREFIX = "pooling_mode_"


def poolings_of(config: Mapping[str, Any]) -> tuple[Pooling, ...]:
    """Return the ways that a `1_Pooling/config.json` turns on; the mean if it turns on none, as its makers do.

    Raises:
        ModelFileError: It turns on a way that is not known.
    """
    wanted = [key for key, value in config.items() if key.startswith(_PREFIX) and value is True]
    unknown = [key for key in wanted if key not in _FLAGS]
    if unknown:
        raise ModelFileError(
            f"The model pools its states by {', '.join(unknown)}; known are {', '.join(_FLAGS)}.",
            advice="Export the model with its pooling in the graph, as the output `sentence_embedding`.",
        )
    return tuple(way for key, way in _FLAGS.items() if key in wanted) or (Pooling.MEAN,)


def pooled(states: NDArray[Any], lengths: NDArray[Any], poolings: Sequence[Pooling]) -> Floats:
    """Return a vector for each text.

    Args:
        states: Of each token, shape (texts, longest, dimensions); what is behind a text's end counts for nothing.
        lengths: Tokens of each text, one or more.
        poolings: One or more ways.

    Returns:
        Shape (texts, dimensions × ways).
    """
    exact: Floats = states.astype(np.float32, copy=False)
    each = [_pooled(exact, lengths, way) for way in poolings]
    return each[0] if len(each) == 1 else np.concatenate(each, axis=1)


def normalised(vectors: Floats) -> Floats:
    """Return the vectors with length 1; one that has no direction becomes not a number."""
    with np.errstate(all="ignore"):
        result: Floats = vectors / np.sqrt(np.einsum("nd,nd->n", vectors, vectors))[:, np.newaxis]
    return result


def _pooled(states: Floats, lengths: NDArray[Any], way: Pooling) -> Floats:
    result: Floats
    match way:
        case Pooling.CLS:
            result = states[:, 0]
        case Pooling.LAST:
            result = states[np.arange(len(states)), lengths - 1]
        case Pooling.MAX:
            inside = np.arange(states.shape[1]) < lengths[:, np.newaxis]
            result = np.max(states, axis=1, where=inside[:, :, np.newaxis], initial=-np.inf)
        case _:
            result = _weighted(states, _weights(lengths, states.shape[1], way))
    return result


def _weights(lengths: NDArray[Any], longest: int, way: Pooling) -> Floats:
    """Return what each token counts, shape (texts, longest)."""
    places = np.arange(longest)
    inside = (places < lengths[:, np.newaxis]).astype(np.float32)
    if way == Pooling.MEAN_SQRT_LEN:
        inside /= np.sqrt(lengths)[:, np.newaxis]
        return inside
    if way == Pooling.WEIGHTED_MEAN:
        inside *= places + 1
    inside /= inside.sum(axis=1, keepdims=True)
    return inside


def _weighted(states: Floats, weights: Floats) -> Floats:
    # einsum and not a matrix product: that would wake the threads of a BLAS beside those of the session
    result: Floats = np.einsum("nld,nl->nd", states, weights)
    return result
