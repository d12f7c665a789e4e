"""Who holds which KV cells, and what of them a newcomer can reuse (pure).

A *slot* is one of the context's native sequence ids. It is held by a running sequence, or it is *idle*: it keeps the
past of one that ended, for the next turn of the same conversation or another prompt with the same beginning. Every
change is noted as an operation, which the worker carries out in order before the next batch.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Collection
from collections.abc import Sequence as Row
from dataclasses import dataclass, field, replace

from appliance.engine.llama.cells import CellLedger
from appliance.engine.llama.parked_state import ParkedState
from appliance.engine.llama.prefix import PrefixTree
from appliance.engine.llama.step import Fork, Limits, Operation, Park, Resume, Sequence, Truncate

WORTH_PARKING_TOKENS = 16
"""A past with fewer cells of its own is dropped rather than kept aside: it is read again as fast."""


@dataclass(eq=False, slots=True)
class _Slot:
    """The past that an idle slot keeps, or the sequence that runs in it."""

    tokens: array[int] = field(default_factory=lambda: array("i"))
    adapter: str = ""
    session: str = ""
    owner: Sequence | None = None
    last_used: int = 0


@dataclass(frozen=True, slots=True)
class Source:
    """Where a newcomer's first `length` tokens come from: a slot, a parked state, or nowhere.

    Attributes:
        slot: The slot that shares the longest evaluated prefix, `slot_length` tokens.
        state: A parked state that has more than the slot.
    """

    slot: int | None = None
    slot_length: int = 0
    state: ParkedState | None = None
    state_length: int = 0

    @property
    def length(self) -> int:
        """Return how many tokens need not be computed."""
        return self.slot_length if self.state is None else self.state_length


class Residents:
    """The slots of one context and their cells."""

    def __init__(self, limits: Limits, *, parking: bool, shortest: Callable[[int], int] | None = None) -> None:
        """Start with every slot empty; with `parking`, what an idle slot loses is kept aside."""
        self._limits = limits
        self._shortest = shortest
        self._parking = parking
        self.ledger = CellLedger(cells=limits.cells, slots=limits.slots)
        self._slots = [_Slot() for _ in range(limits.slots)]
        self._tree: PrefixTree[int] = PrefixTree()
        """The past of each idle slot that has one, and the prompt of each running sequence."""
        self._operations: list[Operation] = []
        self._ticks = 0

    def take_operations(self) -> tuple[Operation, ...]:
        """Return what has to be carried out before the next batch, once."""
        operations, self._operations = tuple(self._operations), []
        return operations

    @property
    def idle(self) -> list[int]:
        """Return the slots that no running sequence holds."""
        return [index for index, slot in enumerate(self._slots) if slot.owner is None]

    @property
    def in_use(self) -> set[int]:
        """Return the slots of running sequences."""
        return {index for index, slot in enumerate(self._slots) if slot.owner is not None}

    def pasts(self) -> list[Park]:
        """Return what would keep aside the pasts of the idle slots, the one used last coming last."""
        idle = [index for index in self.idle if len(self._slots[index].tokens) >= WORTH_PARKING_TOKENS]
        idle.sort(key=lambda index: self._slots[index].last_used)
        return [self._park(index) for index in idle]

    def _park(self, index: int) -> Park:
        slot = self._slots[index]
        return Park(index, slot.tokens[:], slot.adapter, slot.session)

    def evaluated(self, sequence: Sequence, count: int) -> None:
        """Record that `count` more tokens of a running sequence have cells."""
        slot = self._of(sequence)
        self.ledger.extend(slot, count)
        sequence.evaluated += count
        self._ticks += 1
        self._slots[slot].last_used = self._ticks

    # Reuse

    def longest_prefix(self, sequence: Sequence) -> tuple[Source, int, Sequence | None]:
        """Return the slot that shares the longest evaluated prefix with a newcomer.

        Also returns how long a prefix will be had from a running sequence once that has read its own prompt, and from
        which one.
        """
        usable = len(sequence.tokens) - 1  # the last token is evaluated anew, since its logits are needed
        if not self._limits.can_rewind:
            whole = self._tree.prefixes(sequence.tokens, sequence.adapter, usable)
            length, slot = next((each for each in whole if self._slots[each[1]].owner is None), (0, None))
            return Source(slot, length), 0, None
        best, in_flight, reader = Source(), 0, None
        for length, slot in self._tree.matches(sequence.tokens, sequence.adapter, usable):
            held = min(length, self.ledger.length(slot))
            if held > best.slot_length and self._reaches(slot, held):
                best = Source(slot, held)
            if length > max(held, in_flight):
                in_flight, reader = length, self._slots[slot].owner
        return best, in_flight, reader

    def _reaches(self, slot: int, length: int) -> bool:
        """Return whether the memory has what it takes to go on after a slot's first `length` tokens.

        Of a slot that is about to change, that is not known before the next step.
        """
        if self._shortest is None:
            return True
        changed = {each.target if isinstance(each, Fork) else each.slot for each in self._operations}
        return slot not in changed and length >= self._shortest(slot)

    def place(self, sequence: Sequence, source: Source, room: int) -> bool:
        """Give a newcomer a slot with all that the source has, if `room` further cells can be had from idle slots.

        There must be an idle slot.

        Returns:
            False when there is no room; nothing has changed then.
        """
        idle = self.idle
        kept = source.length if source.state is not None or source.slot in idle else 0
        in_use = self.in_use
        used = self.ledger.used_by(in_use)
        if used + kept + room > self.ledger.cells:
            return False
        if source.state is not None:
            # It needs all its cells for a moment, beside those of whom it then shares with.
            whole = len(source.state.tokens)
            if used + whole > self.ledger.cells:
                return False
            target = self._emptiest([each for each in idle if each != source.slot] or idle)
            beside = used if source.slot is None else self.ledger.used_by({*in_use, source.slot})
            if target == source.slot or beside + whole > self.ledger.cells:
                source = replace(source, slot=None, slot_length=0)
            self._resume(sequence, source, target)
        else:
            target = self._target(idle, source)
            own = source.slot
            if own is not None and own in idle and self.ledger.used_by({*in_use, own}) + room > self.ledger.cells:
                target = own  # the cells do not suffice beside the source's tail: take it over
            self._fork(sequence, source, target)
        while room > self.ledger.free and self.drop_idle(keep=source.slot):
            pass
        return True

    def _fork(self, sequence: Sequence, source: Source, target: int) -> None:
        if target == source.slot:
            if self.ledger.length(target) - source.slot_length >= WORTH_PARKING_TOKENS:
                self._keep_aside(target)  # whoever's past it is may go on from its end
            self._truncate(target, source.slot_length)
        else:
            self._empty(target)
            self._share(source.slot, target, source.slot_length)
        self._own(target, sequence, source.slot_length)

    def _resume(self, sequence: Sequence, source: Source, target: int) -> None:
        """Put a parked state into an empty slot; what a resident slot has of it too, the two share from then on."""
        state = source.state
        assert state is not None
        self._empty(target)
        while len(state.tokens) > self.ledger.free and self.drop_idle(keep=source.slot):
            pass
        shared = source.slot_length if self._limits.can_rewind_states else 0
        self._operations.append(Resume(target, state, source.state_length, source.slot if shared else None, shared))
        if shared and source.slot is not None:
            self.ledger.fork(source.slot, target, shared)
        self.ledger.extend(target, source.state_length - shared)
        self._own(target, sequence, source.state_length)

    def _share(self, source: int | None, target: int, length: int) -> None:
        if source is not None and length:
            self._operations.append(Fork(source, target, length))
            self.ledger.fork(source, target, length)

    def _own(self, target: int, sequence: Sequence, evaluated: int) -> None:
        slot = self._slots[target]
        slot.tokens = array("i")
        if target in self._tree:
            self._tree.remove(target)
        self._tree.insert(target, sequence.tokens[: sequence.prompt_length], sequence.adapter)
        slot.adapter, slot.session = sequence.adapter, sequence.session
        slot.owner = sequence
        sequence.slot = target
        sequence.evaluated = evaluated
        if sequence.cached < 0:
            sequence.cached = evaluated

    def _target(self, idle: Row[int], source: Source) -> int:
        """Choose the slot to run in: the source itself when most of it is reused, else the emptiest, oldest one."""
        if (
            source.slot is not None
            and source.slot in idle
            and 2 * source.slot_length >= self.ledger.length(source.slot)
        ):
            return source.slot
        return self._emptiest([index for index in idle if index != source.slot] or idle)

    def _emptiest(self, idle: Row[int]) -> int:
        return min(idle, key=lambda index: (self.ledger.length(index) > 0, self._slots[index].last_used))

    # Leaving

    def release(self, sequence: Sequence) -> None:
        """Let an ended sequence go; what it evaluated stays in its slot for the next turn."""
        number = self._of(sequence)
        slot = self._slots[number]
        slot.tokens = sequence.tokens[: sequence.evaluated]
        slot.owner = None
        sequence.slot = None
        self._tree.truncate(number, sequence.evaluated)
        self._tree.extend(number, slot.tokens[self._tree.length(number) :])
        if not slot.tokens:
            self._tree.remove(number)
        elif not sequence.kept:
            self._truncate(number, 0)

    def park(self, sequence: Sequence) -> None:
        """Take a running sequence's cells, and keep its state aside so that it can go on from there."""
        slot = self._of(sequence)
        self.release(sequence)
        sequence.evaluated = 0
        self._empty(slot)

    def discard(self, sequence: Sequence) -> None:
        """Take a running sequence's cells, which cannot be trusted any more; nothing of them is reused."""
        slot = self._of(sequence)
        sequence.evaluated = 0
        self.release(sequence)
        self._operations.append(Truncate(slot, 0))  # even of an empty slot: a failed batch may have left cells there
        self.ledger.truncate(slot, 0)

    def lost(self, sequence: Sequence) -> None:
        """Record that a running sequence's past could not be had: it has no cells and begins again."""
        slot = self._of(sequence)
        sequence.evaluated = sequence.cached = 0
        self._truncate(slot, 0)

    def drop_idle(self, keep: int | None = None) -> bool:
        """Park the idle slot unused for longest and take its cells; return False when none holds any."""
        candidates = [index for index in self.idle if index != keep and self.ledger.length(index) > 0]
        if not candidates:
            return False
        self._empty(min(candidates, key=lambda index: self._slots[index].last_used))
        return True

    def forget_sessions(self, sessions: Collection[str]) -> None:
        """Take the cells of sessions' idle slots, whose text was deleted; nothing of them is kept aside."""
        self._operations = [
            each for each in self._operations if not (isinstance(each, Park) and each.session in sessions)
        ]
        for slot in self.idle:
            if self._slots[slot].session in sessions:
                self._truncate(slot, 0)

    def forget(self) -> None:
        """Take the cells of all idle slots, which cannot be trusted any more; nothing of them is kept aside."""
        self._operations = [each for each in self._operations if not isinstance(each, Park)]
        for slot in self.idle:
            self._truncate(slot, 0)

    def tidy(self) -> None:
        """Park one idle slot, if there is any with cells of its own.

        Attention reads every cell up to the last one in use, for every sequence of a batch, so an idle past costs all
        who decode beside it; to park it costs as much as a few steps.
        """
        candidates = [index for index in self.idle if self.ledger.exclusive(index) >= WORTH_PARKING_TOKENS]
        if candidates:
            self._empty(min(candidates, key=lambda index: self._slots[index].last_used))

    def _empty(self, slot: int) -> None:
        """Take all cells of an idle slot; its past is parked first."""
        self._keep_aside(slot)
        self._truncate(slot, 0)

    def _keep_aside(self, slot: int) -> None:
        if self._parking and len(self._slots[slot].tokens) >= WORTH_PARKING_TOKENS:
            self._operations.append(self._park(slot))

    def _truncate(self, slot: int, length: int) -> None:
        if self.ledger.length(slot) > length:
            self._operations.append(Truncate(slot, length))
            self.ledger.truncate(slot, length)
        del self._slots[slot].tokens[length:]
        if self._slots[slot].owner is None and slot in self._tree:
            self._tree.truncate(slot, length)
            if not length:
                self._tree.remove(slot)

    def _of(self, sequence: Sequence) -> int:
        assert sequence.slot is not None, "the sequence is not running"
        return sequence.slot

    def check_integrity(self, running: Row[Sequence]) -> None:
        """Verify that slots, sequences and cells agree.

        Raises:
            AssertionError: They do not.
        """
        self.ledger.check_integrity()
        self._tree.check_integrity()
        owners = [slot.owner for slot in self._slots if slot.owner is not None]
        assert len(owners) == len(running), "a running sequence without a slot"
        for index, slot in enumerate(self._slots):
            held = self.ledger.length(index)
            if slot.owner is None:
                assert held == len(slot.tokens), f"idle slot {index} holds {held} cells for {len(slot.tokens)} tokens"
                assert held == (self._tree.length(index) if held else 0), f"the tree is wrong about idle slot {index}"
                assert (index in self._tree) == (held > 0), f"the tree is wrong about idle slot {index}"
            else:
                assert slot.owner.slot == index, f"slot {index} and its sequence disagree"
                assert held == slot.owner.evaluated, f"slot {index} holds {held}, evaluated {slot.owner.evaluated}"
