"""The ledger of KV cells: which slots share which cells, and how many are in use.

llama.cpp's unified cache keeps one cell a token and position; copying a prefix to another sequence marks the same cells
with one more sequence id and takes no new cell. The ledger mirrors that, so that the scheduler knows the free cells
without asking native code. A slot's cells are a chain of segments; slots that share a prefix share the segment objects:

    slot 0:  [ system prompt ]──[ question A ]──[ answer A ]
    slot 1:  [ the same one  ]──[ question B ]
    slot 2:  (empty)

Invariants, checked by `check_integrity`: a segment is never empty; its `slots` are exactly those whose chain holds it;
slots that share a segment share everything before it.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field


@dataclass(eq=False, slots=True)
class Segment:
    """A run of cells at consecutive positions, held by one or more slots."""

    length: int
    slots: set[int] = field(default_factory=set)


class CellLedger:
    """Counts cells exactly; every operation costs the number of segments it touches, never of tokens."""

    def __init__(self, *, cells: int, slots: int) -> None:
        """Start with all `cells` free and every one of the `slots` empty."""
        self.cells = cells
        self.used = 0
        self._chains: list[list[Segment]] = [[] for _ in range(slots)]
        self._lengths = [0] * slots

    @property
    def free(self) -> int:
        """Return the number of cells that no slot holds."""
        return self.cells - self.used

    def length(self, slot: int) -> int:
        """Return how many tokens the slot holds, shared ones included."""
        return self._lengths[slot]

    def used_by(self, slots: Collection[int]) -> int:
        """Return how many cells the given slots hold together, shared ones counted once."""
        return sum({id(each): each.length for slot in slots for each in self._chains[slot]}.values())

    def exclusive(self, slot: int) -> int:
        """Return how many cells a slot holds that no other one shares."""
        return sum(each.length for each in self._chains[slot] if len(each.slots) == 1)

    def extend(self, slot: int, tokens: int) -> None:
        """Add cells of its own to a slot's end. The caller made sure that they are free."""
        if tokens > self.free:
            raise ValueError(f"{tokens} cells wanted, {self.free} of {self.cells} free")
        if tokens == 0:
            return
        chain = self._chains[slot]
        if chain and len(chain[-1].slots) == 1:
            chain[-1].length += tokens
        else:
            chain.append(Segment(tokens, {slot}))
        self._lengths[slot] += tokens
        self.used += tokens

    def fork(self, source: int, target: int, length: int) -> None:
        """Let an empty slot share the first `length` tokens of another."""
        if self._lengths[target]:
            raise ValueError(f"slot {target} is not empty")
        if length > self._lengths[source]:
            raise ValueError(f"slot {source} holds {self._lengths[source]} tokens, not {length}")
        if length == 0:
            return
        for segment in self._chains[source][: self._split(source, length)]:
            segment.slots.add(target)
            self._chains[target].append(segment)
        self._lengths[target] = length

    def truncate(self, slot: int, length: int) -> None:
        """Drop everything of a slot past its first `length` tokens; cells that others share stay."""
        if length >= self._lengths[slot]:
            return
        keep = self._split(slot, length)
        chain = self._chains[slot]
        for segment in chain[keep:]:
            segment.slots.remove(slot)
            if not segment.slots:
                self.used -= segment.length
        del chain[keep:]
        self._lengths[slot] = length

    def check_integrity(self) -> None:
        """Verify the books.

        Raises:
            AssertionError: An invariant of this module's docstring does not hold.
        """
        seen: dict[int, Segment] = {}
        for slot, chain in enumerate(self._chains):
            assert sum(each.length for each in chain) == self._lengths[slot], f"length of slot {slot}"
            for index, segment in enumerate(chain):
                assert segment.length > 0, f"empty segment in slot {slot}"
                assert slot in segment.slots, f"slot {slot} is missing from its segment"
                for other in segment.slots:
                    assert self._chains[other][: index + 1] == chain[: index + 1], f"slots {slot} and {other} diverge"
                seen[id(segment)] = segment
        assert sum(each.length for each in seen.values()) == self.used, "used cells"
        assert 0 <= self.used <= self.cells, "more cells used than there are"

    def _split(self, slot: int, length: int) -> int:
        """Cut the chain at `length` tokens and return how many segments lie before the cut."""
        before = 0
        for index, segment in enumerate(self._chains[slot]):
            if before >= length:
                return index
            if before + segment.length > length:
                tail = Segment(before + segment.length - length, set(segment.slots))
                segment.length = length - before
                for sharer in segment.slots:
                    self._chains[sharer].insert(index + 1, tail)
                return index + 1
            before += segment.length
        return len(self._chains[slot])
