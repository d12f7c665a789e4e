"""What a session's thread is given to do, whatever the model is for.

A *job* is one caller's request. It has one or more *items*, which are never split: a request's tensors, or the tokens
of one text. Items share a batch when they have the same collation and the same key. The collation makes one set of
input arrays of them, and takes the outputs apart again; both run on the session's thread, so they must be quick.
"""

from __future__ import annotations

from collections.abc import Collection, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from numpy.typing import NDArray

Arrays = Mapping[str, NDArray[Any]]
"""Inputs or outputs of a model by name."""


@dataclass(frozen=True, slots=True, eq=False)
class Item:
    """What is evaluated in one piece.

    Attributes:
        payload: For the collation alone.
        rows: Places that it takes in the batch dimension.
        length: Length of each row before padding, in tokens; 1 where nothing is padded.
        key: Only items with equal keys share a batch; None is an item that always runs alone.
    """

    payload: Any
    rows: int = 1
    length: int = 1
    key: Hashable = ()


class Collation(Protocol):
    """How items become the arrays of a batch, and its outputs become their results."""

    def collate(self, items: Sequence[Item]) -> Arrays:
        """Return the inputs of the model for items of one key, row after row in their order.

        Raises:
            EngineError: It cannot be done; the batch is evaluated again item by item, so that only the bad ones fail.
        """
        ...

    def outputs(self, items: Sequence[Item], /) -> Collection[str]:
        """Return the names of the outputs that `split` needs of these; none is all."""
        ...

    def split(self, outputs: Arrays, items: Sequence[Item]) -> Sequence[Any]:
        """Return each item's result, in their order. What it keeps must not hold on to the whole batch's memory.

        Raises:
            EngineError: The outputs are not what they should be; as for `collate`.
        """
        ...
