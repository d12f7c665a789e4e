"""How much two token sequences have in common (pure)."""

from __future__ import annotations

from array import array


def common_prefix(left: array[int], right: array[int], limit: int) -> int:
    """Return how many leading tokens two arrays share, at most `limit`. Costs a few comparisons of memory."""
    low, high = 0, min(limit, len(left), len(right))
    with memoryview(left) as a, memoryview(right) as b:
        while low < high:
            middle = (low + high + 1) // 2
            if a[low:middle] == b[low:middle]:
                low = middle
            else:
                high = middle - 1
    return low
