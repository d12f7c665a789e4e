"""How requests for a tensor model share a batch: row after row along the first dimension."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from appliance.core.errors import EngineError
from appliance.core.tensors import ModelSignature
from appliance.engine.onnx.work import Arrays, Item

BYTES_OF_A_TOKEN = 4096
"""So much of a row counts as one token, so that a batch of images is bounded as one of texts is."""


@dataclass(frozen=True, slots=True, eq=False)
class Tensors:
    """The payload of one request: its inputs, and the outputs that it wants; none is all."""

    inputs: Mapping[str, NDArray[Any]]
    outputs: tuple[str, ...]


class TensorCollation:
    """Joins and splits requests for one model; each item's result is a dict of arrays by name."""

    def __init__(self, signature: ModelSignature) -> None:
        """Make batches for a model of that signature."""
        self._signature = signature
        self._names = tuple(each.name for each in signature.outputs)

    def item(self, inputs: Mapping[str, NDArray[Any]], outputs: tuple[str, ...]) -> Item:
        """Return a request whose tensors fit the signature as an item; one without rows runs alone."""
        payload = Tensors(inputs, outputs)
        if not self._signature.batched:
            return Item(payload, key=None)
        rows = len(next(iter(inputs.values())))
        if rows == 0:
            return Item(payload, key=None)
        length = max(1, sum(each.nbytes for each in inputs.values()) // rows // BYTES_OF_A_TOKEN)
        return Item(payload, rows, length, tuple(inputs[each.name].shape[1:] for each in self._signature.inputs))

    def collate(self, items: Sequence[Item]) -> Arrays:
        """Return the inputs one below the other; those of a single item as they are."""
        if len(items) == 1:
            inputs: Arrays = items[0].payload.inputs
            return inputs
        return {
            each.name: np.concatenate([item.payload.inputs[each.name] for item in items])
            for each in self._signature.inputs
        }

    def split(self, outputs: Arrays, items: Sequence[Item]) -> Sequence[dict[str, NDArray[Any]]]:
        """Return each item's rows of the outputs it wants, copied unless it is the only one.

        Raises:
            EngineError: An output has not as many rows as went in.
        """
        if len(items) == 1:
            return [{name: outputs[name] for name in items[0].payload.outputs or self._names}]
        rows = sum(each.rows for each in items)
        for name in self._names:
            if outputs[name].shape[:1] != (rows,):
                raise EngineError(
                    f"The model answered {rows} rows with an output of the shape {list(outputs[name].shape)}.",
                    code="bad_output",
                )
        results = []
        end = 0
        for item in items:
            start, end = end, end + item.rows
            wanted = item.payload.outputs or self._names
            results.append({name: outputs[name][start:end].copy() for name in wanted})
        return results
