"""Memory for parked states."""

from __future__ import annotations

import numpy as np

from appliance.engine.llama.context import State


class StateMemory:
    """Hands out memory for states, up to about a cap."""

    def __init__(self, cap: int) -> None:
        """Prepare for `cap` bytes in all."""
        self.cap = cap

    def take(self, size: int) -> State:
        """Return memory of the given size."""
        return np.empty(size, np.uint8)

    def give_back(self, payload: State) -> None:
        """Take back what `take` returned."""
