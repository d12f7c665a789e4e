"""The classification extension: the highest values of an output, as text. Pure.

https://docs.nvidia.com/deeplearning/triton-inference-server/user-guide/docs/protocol/extension_classification.html
"""

from __future__ import annotations

from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from appliance.core.tensors import Datatype, Tensor


def classified(tensor: Tensor, most: int, *, batched: bool) -> Tensor:
    """Return the highest values as `value:index`, highest first; of equal values the first index comes first.

    Args:
        tensor: Of numbers. NaN counts as less than every number.
        most: How many; fewer where the tensor has fewer.
        batched: Its first dimension is the batch: each row stands for itself.
    """
    shape = tensor.array.shape if batched else (1, *tensor.array.shape)
    rows = tensor.array.reshape(shape[0], prod(shape[1:]))
    array = np.empty((rows.shape[0], min(most, rows.shape[1])), np.object_)
    for index, row in enumerate(rows):
        array[index] = _highest(row, most)
    return Tensor(tensor.name, Datatype.BYTES, array if batched else array.reshape(-1))


def _highest(row: NDArray[Any], most: int) -> list[bytes]:
    whole = row.dtype.kind in "biu"
    descending = ~row if whole else -row.astype(np.float64)  # of whole numbers the complement never overflows
    order = np.argsort(descending, kind="stable")[:most].tolist()
    return [f"{int(row[index]) if whole else format(float(row[index]), 'f')}:{index}".encode() for index in order]
