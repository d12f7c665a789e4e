"""How the prompt tokens of one step are divided (pure)."""

from __future__ import annotations

from appliance.core.types import Priority
from appliance.engine.llama.step import Sequence


def share_out(readers: list[Sequence], room: int, ranks: list[Priority]) -> list[int]:
    """Divide the step's prefill tokens among the prompts being read, which are given in order of age.

    The oldest is sure of a quarter, so that a long prompt advances however many short ones arrive; the rest goes by
    priority, short prompts first, since those are answered soonest.
    """
    shares = [0] * len(readers)
    by_shortness = sorted(range(len(readers)), key=lambda index: (ranks[index], readers[index].pending))
    if readers:
        shares[0] = min(readers[0].pending, -(-room // 4))
        room -= shares[0]
    for index in by_shortness:
        more = min(readers[index].pending - shares[index], room)
        shares[index] += more
        room -= more
    return shares
