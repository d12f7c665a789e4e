"""What the dense indexes ask of the database that they are derived from."""

from __future__ import annotations

from typing import Protocol

import numpy as np
import numpy.typing as npt

Ids = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float32]


class VectorTruth(Protocol):
    """Every store's embedded chunks. Any thread may ask, several at once, and sees what is committed."""

    def model(self, store: int) -> str:
        """Return the full name of the embedder that made the vectors, or "" when there are none."""
        ...

    def ids(self, store: int) -> Ids:
        """Return the ids of all chunks that have a vector, ascending; none for a store that does not exist.

        It is asked for whenever a store is opened: a covering index answers it for 1,000,000 chunks within a second.
        """
        ...

    def fetch(self, store: int, ids: Ids) -> tuple[Ids, Floats]:
        """Return those of the chunks that are there and have a vector, in any order, and their vectors, one a row."""
        ...
