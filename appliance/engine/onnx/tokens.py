"""Batches of token rows: padded to the longest, evaluated, and taken apart into one row of numbers a text.

Everything here runs on the session's thread beside each evaluation, so it is NumPy over the whole batch.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from appliance.core.errors import EngineError, ModelFileError
from appliance.core.tensors import Datatype, ModelSignature
from appliance.engine.onnx.heads import Head
from appliance.engine.onnx.tokenizer import Row
from appliance.engine.onnx.work import Arrays, Item

_DTYPES: dict[Datatype, np.dtype[Any]] = {Datatype.INT64: np.dtype(np.int64), Datatype.INT32: np.dtype(np.int32)}
_IDS, _MASK, _TYPES, _POSITIONS = "input_ids", "attention_mask", "token_type_ids", "position_ids"
_INPUTS = (_IDS, _MASK, _TYPES, _POSITIONS)


@dataclass(frozen=True, slots=True)
class TokenInputs:
    """What a graph takes.

    Attributes:
        dtypes: Of each input, by its name.
        fixed_length: Tokens that every row must have, or None for any number.
        alone: The graph takes one row at a time.
    """

    dtypes: dict[str, np.dtype[Any]]
    fixed_length: int | None
    alone: bool

    def key(self, tokens: int) -> int | None:
        """Return which rows of so many tokens share a batch: all that are padded to one length and masked, else none.

        Without a mask, padding would count: only rows of one length share a batch.
        """
        if self.alone:
            return None
        return 0 if _MASK in self.dtypes else tokens


def token_inputs(signature: ModelSignature) -> TokenInputs:
    """Return how a graph takes tokens.

    Raises:
        ModelFileError: It is not made for texts, or in a way that is not known.
    """
    specs = {each.name: each for each in signature.inputs}
    unknown = [name for name in specs if name not in _INPUTS]
    if _IDS not in specs or unknown:
        raise ModelFileError(
            f"The model takes {', '.join(specs) or 'nothing'}; a model for texts takes {', '.join(_INPUTS)}.",
            advice="Use it through /v2, or export it for texts.",
        )
    dtypes: dict[str, np.dtype[Any] | None] = {name: _DTYPES.get(each.datatype) for name, each in specs.items()}
    shapes = {each.shape for each in specs.values()}
    rows, lengths = ({shape[axis] for shape in shapes if len(shape) == 2} for axis in (0, 1))
    if None in dtypes.values() or any(len(shape) != 2 for shape in shapes) or len(rows) > 1 or len(lengths) > 1:
        raise ModelFileError("The model's token inputs are not whole numbers of one shape (batch, tokens).")
    (row_count,), (length,) = rows, lengths
    if row_count > 1:
        raise ModelFileError(
            f"The model takes texts only {row_count} at a time.", advice="Export it with a free batch dimension."
        )
    known = {name: dtype for name, dtype in dtypes.items() if dtype is not None}
    return TokenInputs(known, length if length > 0 else None, alone=row_count == 1)


class TokenCollation:
    """Rows of tokens in, one row of 32-bit floats out for each."""

    def __init__(self, inputs: TokenInputs, head: Head, *, padding_id: int) -> None:
        self._inputs = inputs
        self._head = head
        self._padding_id = padding_id

    def item(self, row: Row) -> Item:
        """Return what the session is given of a row."""
        count = len(row.tokens)
        return Item(row, length=self._inputs.fixed_length or count, key=self._inputs.key(count))

    def collate(self, items: Sequence[Item]) -> Arrays:
        """Return the ids, the mask, the segments and the positions that the graph takes, padded at the end."""
        rows: list[Row] = [each.payload for each in items]
        lengths = _lengths(items)
        longest = self._inputs.fixed_length or int(lengths.max())
        places = np.arange(longest)
        inside = places < lengths[:, np.newaxis]
        return {name: self._array(name, dtype, rows, inside, places) for name, dtype in self._inputs.dtypes.items()}

    def _array(
        self, name: str, dtype: np.dtype[Any], rows: Sequence[Row], inside: NDArray[Any], places: NDArray[Any]
    ) -> NDArray[Any]:
        if name == _MASK:
            return inside.astype(dtype)
        if name == _POSITIONS:
            return np.broadcast_to(places.astype(dtype), inside.shape).copy()
        if name == _IDS:
            result = np.full(inside.shape, self._padding_id, dtype)
            result[inside] = np.frombuffer(b"".join([each.tokens for each in rows]), np.int32)
            return result
        result = np.zeros(inside.shape, dtype)
        if any(each.types is not None for each in rows):
            types = [array("i", bytes(4 * len(each.tokens))) if each.types is None else each.types for each in rows]
            result[inside] = np.frombuffer(b"".join(types), np.int32)
        return result

    def split(self, outputs: Arrays, items: Sequence[Item]) -> Sequence[array[float]]:
        """Return each row's numbers.

        Raises:
            EngineError: The outputs have other shapes than the graph said, or are not numbers.
        """
        values = np.ascontiguousarray(self._head(outputs, _lengths(items)), np.float32)
        if not np.isfinite(values).all():
            raise EngineError("What the model makes of an input is not a number.", code="not_a_number")
        return [array("f", row.tobytes()) for row in values]


def _lengths(items: Sequence[Item]) -> NDArray[Any]:
    return np.array([len(each.payload.tokens) for each in items])
