"""How alike embeddings are (pure)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from appliance.core.types import Vector


def cosines(one: Vector, others: Sequence[Vector]) -> list[float]:
    """Return the cosine of the angle between a vector and each of the others, -1 to 1; all have length 1, or 0."""
    matrix = np.stack([np.frombuffer(each, np.float32) for each in others])
    products: list[float] = np.clip(matrix @ np.frombuffer(one, np.float32), -1.0, 1.0).tolist()
    return products
