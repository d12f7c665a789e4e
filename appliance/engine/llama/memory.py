"""What each kind of memory keeps of a sequence's past, and so to which length that can be cut back (pure).

All this was found by experiment with the real llama.cpp; `tests/engine/test_memory_types.py` holds it. *Exact* means
that the logits afterwards are those of a cold run.

| | full attention | sliding window | recurrent, hybrid |
|---|---|---|---|
| read a prompt in any pieces, beside any strangers | exact | exact | exact |
| drop a tail; fork a part | exact | from `shortest` on | never |
| fork the whole, of an idle or a running sequence | exact | exact | exact |
| save the whole; load it into any empty slot, beside strangers, into a new context | exact | exact | exact |
| drop a tail of what was loaded | exact | one token | never |

Where a row says never or is outside its bounds, llama.cpp mostly reports success, and the logits are wrong: of a
sliding window it drops cells that are not there, and of a hybrid it forks the attention's part and the whole of the
recurrent part. So `LlamaContext.apply` asks this module first.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class MemoryKind:
    """How a model remembers.

    Attributes:
        window: Tokens that the layers with a sliding window look back; 0 without such layers.
        recurrent: Whether any layer has a state that each token overwrites, as in recurrent and hybrid models.
    """

    window: int = 0
    recurrent: bool = False

    @property
    def can_rewind(self) -> bool:
        """Return whether a slot can drop a tail or share a part of its tokens, within what `shortest` says."""
        return not self.recurrent

    @property
    def can_rewind_states(self) -> bool:
        """Return whether the same goes for a saved state; otherwise it is of use as a whole only.

        Of layers with a sliding window a state has the window at its end, and so no earlier one.
        """
        return not self.recurrent and not self.window

    def shortest(self, held: range) -> int:
        """Return the fewest tokens, other than none, that a slot with these positions can be cut back to or forked at.

        Layers with a sliding window need the window before the next token. They hold more than that, but llama.cpp
        gives cells that no later token of the same sequence will look at to anyone who writes, whether or not others
        are free, as long as they are not shared.
        """
        if self.recurrent:
            return held.stop
        return min(held.stop, held.start + self.window - 1) if held.start else 0
