"""Sets of chunk ids as ascending arrays, and where the ids of one are in another."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from appliance.retrieval.vectors.truth import Ids

Mask = npt.NDArray[np.bool_]

_DENSE = 16
"""From one in so many ids on, a table of all ids in between is quicker than a search for each."""


def contained(ids: Ids, among: Ids) -> Mask:
    """Return which of some ids are among others, which are ascending."""
    if not len(among):
        return np.zeros(len(ids), np.bool_)
    places = np.minimum(np.searchsorted(among, ids), len(among) - 1)
    return np.asarray(among[places] == ids, np.bool_)


def passing_mask(ids: Ids, allowed: Ids) -> Mask:
    """Return which positions of ascending ids hold one of the allowed ones, ascending too."""
    mask = np.zeros(len(ids), np.bool_)
    if not len(ids):
        return mask
    first, last = np.searchsorted(allowed, ids[0]), np.searchsorted(allowed, ids[-1], side="right")
    allowed = allowed[first:last]
    spread = int(ids[-1]) - int(ids[0]) + 1
    if len(allowed) * _DENSE < len(ids) or spread > _DENSE * len(ids):
        places = np.searchsorted(ids, allowed)
        mask[places[ids[places] == allowed]] = True
        return mask
    table = np.zeros(spread, np.bool_)
    table[allowed - ids[0]] = True
    return np.asarray(table[ids - ids[0]], np.bool_)


def positions_of(ids: Ids, allowed: Ids) -> Ids:
    """Return the positions in ascending ids of those that are allowed, ascending too; few of them."""
    if len(allowed) and not np.all(allowed[:-1] < allowed[1:]):
        allowed = np.unique(allowed)
    places = np.searchsorted(ids, allowed[: np.searchsorted(allowed, ids[-1], side="right")])
    return np.asarray(places[ids[places] == allowed[: len(places)]], np.int64)
