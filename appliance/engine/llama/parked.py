"""Which parked states are kept, and where: the policy of parking, as a pure state machine.

A *state* is a copy of what the KV memory holds of a sequence, so that its tokens need not be computed again. It lies in
RAM, in a file, or in both. The caller does the work; here is decided what work:

    put(state)          it was copied into RAM      ┐
    promote(id)         its file was read into RAM  │   each returns actions, to be carried out in order
    write_behind(…)     there is time to write      │
    restore(state)      its file was found          │
    drop(id)            it is of no use any more    │
    forget(sessions)    their text was deleted      ┘
    written / failed    how a `Write` ended, at once or later; returns more actions

                 ┌───────── promote ────────┐
                 ▼                          │
    put ──▶ in RAM ──Write──▶ in both ──Free──▶ in a file ──Erase──▶ gone
                 └──Free──▶ gone

RAM over its cap: the state unused for longest leaves RAM. If it is in no file yet it is written first, and if it cannot
be, it is gone. Disk over its cap: files go, those unused for longest first; but a state is never written at the expense
of one that was used later. Pinned states stay in one of the two, unless writing fails.

A state that extends another takes its place: the shorter one leaves RAM at once, but its file only when the longer
one's is complete, so that a conversation can be resumed after a kill at any time.
"""

from __future__ import annotations

from array import array
from collections.abc import Collection, Hashable

from appliance.engine.llama.parked_state import Action, Erase, Free, ParkedState, Write
from appliance.engine.llama.prefix import PrefixTree


class ParkedStates:
    """The books of all parked states of one model."""

    def __init__(self, *, ram_bytes: int, disk_bytes: int, can_rewind: bool = True) -> None:
        """Start with none.

        Args:
            ram_bytes: Cap of RAM; exceeded only by the state that is being put, until the actions are carried out.
            disk_bytes: Cap of the files, those being written included. 0 is no files.
            can_rewind: False for recurrent and hybrid memories: a state is of use only as a whole.
        """
        self.ram_bytes = ram_bytes
        self.disk_bytes = disk_bytes
        self.can_rewind = can_rewind
        self.ram_used = 0
        self.disk_used = 0
        self._leaving_bytes = 0
        self._tick = 0
        self._tree: PrefixTree[str] = PrefixTree()
        self._states: dict[str, ParkedState] = {}  # this and the next two: least recently used first
        self._in_ram: dict[str, ParkedState] = {}
        self._on_disk: dict[str, ParkedState] = {}
        self._dropped: dict[str, ParkedState] = {}  # while they are being written

    def __len__(self) -> int:
        return len(self._states)

    def __contains__(self, state_id: str) -> bool:
        return state_id in self._states

    def __getitem__(self, state_id: str) -> ParkedState:
        return self._states[state_id]

    def being_written(self, state_id: str) -> ParkedState:
        """Return a state that a `Write` names, which may have been dropped since."""
        return self._states.get(state_id) or self._dropped[state_id]

    def wants(self, tokens: array[int], space: Hashable, size: int) -> bool:
        """Return whether a state of these tokens, of `size` bytes, would be kept; asked before it is copied."""
        return size <= max(self.ram_bytes, self.disk_bytes) and not self._covering(tokens, space)

    def put(self, state: ParkedState, tick: int) -> list[Action]:
        """Take in a state that was copied into RAM.

        It is freed at once if others hold all of it already, which then count as used, or if it fits nowhere.

        Raises:
            ValueError: There is one of this id.
        """
        self._check_new(state)
        covering = self._covering(state.tokens, state.space)
        if covering and not state.pinned:
            for each in covering:
                self.touch(each.id, tick)
            return [Free(state.id)]
        self._add(state, tick)
        self._into_ram(state)
        return self._supersede_in_ram(state) + self._make_ram_room(state)

    def restore(self, state: ParkedState, tick: int) -> list[Action]:
        """Take in a state whose file was found; to be called in the order of their last use."""
        self._check_new(state)
        if self._covering(state.tokens, state.space) and not state.pinned:
            return [Erase(state.id)]
        self._add(state, tick)
        self._onto_disk(state)
        state.on_disk = True
        actions = self._supersede_on_disk(state)
        for each in list(self._on_disk.values()):
            if self.disk_used <= self.disk_bytes:
                break
            if not each.pinned and not each.writing:
                actions += self._leave_disk(each)
        return actions if self.disk_used <= self.disk_bytes else actions + self._leave_disk(state)

    def promote(self, state_id: str) -> list[Action]:
        """Record that a state's file was read into RAM, to be kept there if it fits."""
        state = self._states[state_id]
        if state.in_ram:
            raise ValueError(f"the state {state_id} is in RAM already")
        self._into_ram(state)
        return self._make_ram_room(state)

    def write_behind(self, unused_since: int) -> list[Action]:
        """Return what writes one more state that is only in RAM, used last at the given tick or before; or nothing.

        So a kill loses little, and RAM can be had without waiting for the disk.
        """
        for state in self._in_ram.values():
            if state.last_used > unused_since:
                break
            if not state.on_disk and not state.writing and (actions := self._write(state)):
                return actions
        return []

    def leave_ram(self, state_id: str) -> list[Action]:
        """Give up the RAM of a state that is in a file, because it can be copied again from where it came."""
        state = self._states.get(state_id)
        return self._leave_ram(state) if state is not None and state.in_ram and state.on_disk else []

    def written(self, state_id: str) -> list[Action]:
        """Record that a `Write` succeeded."""
        if (dropped := self._end_dropped(state_id)) is not None:
            return [*dropped, Erase(state_id)]
        state = self._states[state_id]
        state.writing, state.on_disk = False, True
        actions = self._leave_ram(state) if state.leaving else []
        return actions + self._supersede_on_disk(state)

    def failed(self, state_id: str) -> list[Action]:
        """Record that a `Write` failed and left no file; it is not tried again."""
        if (dropped := self._end_dropped(state_id)) is not None:
            return dropped
        state = self._states[state_id]
        state.writing = state.writable = False
        self._off_disk(state)
        return self._leave_ram(state) if state.leaving else []

    def touch(self, state_id: str, tick: int) -> None:
        """Record that a state was used."""
        state = self._states[state_id]
        self._tick = state.last_used = max(self._tick, tick)
        for order in (self._states, self._in_ram, self._on_disk):
            if order.pop(state_id, None) is not None:
                order[state_id] = state

    def pin(self, state_id: str, *, pinned: bool) -> None:
        """Keep a state for good, or no longer."""
        self._states[state_id].pinned = pinned

    def drop(self, state_id: str) -> list[Action]:
        """Forget a state, pinned or not. Unknown ones are forgotten already."""
        return self._forget(self._states[state_id]) if state_id in self._states else []

    def forget(self, sessions: Collection[str]) -> tuple[frozenset[str], list[Action]]:
        """Forget all states of sessions, pinned or not.

        Returns:
            Those whose `Write` has not ended, which are gone only after it, and the actions.
        """
        found = [each for each in self._states.values() if each.session in sessions]
        actions = [action for each in found for action in self._forget(each)]
        return frozenset(each.id for each in self._dropped.values() if each.session in sessions), actions

    def best(
        self, tokens: array[int], space: Hashable = None, limit: int | None = None
    ) -> tuple[ParkedState, int] | None:
        """Return the state that saves most of `tokens[:limit]`, and how many; or None.

        Of several that save the same, those in RAM come first, then small ones.
        """
        if self.can_rewind:
            length, ids = self._tree.match(tokens, space, limit)
        else:
            whole = self._tree.prefixes(tokens, space, limit)
            length = whole[0][0] if whole else 0
            ids = {each for reach, each in whole if reach == length}
        if not ids:
            return None
        found = (self._states[each] for each in ids)
        return min(found, key=lambda each: (not each.in_ram, each.size, -each.last_used)), length

    def check_integrity(self) -> None:
        """Verify the books.

        Raises:
            AssertionError: They do not agree with each other, or a cap does not hold.
        """
        self._tree.check_integrity()
        assert len(self._tree) == len(self._states), "a state outside the tree"
        everyone = [*self._states.values(), *self._dropped.values()]
        in_ram = [each for each in everyone if each.in_ram]
        on_disk = [each for each in everyone if each.on_disk or each.writing]
        assert {each.id for each in in_ram} == self._in_ram.keys(), "states in RAM"
        assert {each.id for each in on_disk} == self._on_disk.keys(), "states on disk"
        assert sum(each.size for each in in_ram) == self.ram_used, "RAM in use"
        assert sum(each.size for each in on_disk) == self.disk_used, "disk in use"
        assert sum(each.size for each in in_ram if each.leaving) == self._leaving_bytes, "RAM about to be free"
        assert self.ram_used - self._leaving_bytes <= self.ram_bytes, "RAM over its cap"
        assert self.disk_used <= self.disk_bytes, "disk over its cap"
        for each in everyone:
            assert each.in_ram or each.on_disk, f"the state {each.id} is nowhere"
            assert not each.leaving or each.writing, f"the state {each.id} leaves RAM without being written"
            assert not each.writing or (each.in_ram and not each.on_disk), f"the state {each.id} is written for nothing"
        for order in (self._states, self._in_ram, self._on_disk):
            ticks = [each.last_used for each in order.values() if each.id in self._states]
            assert ticks == sorted(ticks), "out of the order of use"

    # Which states are of use

    def _covering(self, tokens: array[int], space: Hashable) -> list[ParkedState]:
        """Return the states that can stand for one of these tokens."""
        length, ids = self._tree.match(tokens, space)
        if length < len(tokens):
            return []
        return [self._states[each] for each in ids if self.can_rewind or self._tree.length(each) == length]

    def _extended_by(self, state: ParkedState) -> list[ParkedState]:
        """Return the states, pinned ones aside, whose tokens are the beginning of another's."""
        found = (self._states[each] for _, each in self._tree.prefixes(state.tokens, state.space) if each != state.id)
        return [each for each in found if not each.pinned]

    def _supersede_in_ram(self, state: ParkedState) -> list[Action]:
        return [action for each in self._extended_by(state) if each.in_ram for action in self._leave_ram(each)]

    def _supersede_on_disk(self, state: ParkedState) -> list[Action]:
        return [action for each in self._extended_by(state) for action in self._forget(each)]

    # Making room

    def _make_ram_room(self, newcomer: ParkedState) -> list[Action]:
        """Let states leave RAM until the cap holds; the newcomer goes first if it is larger than all of it."""
        actions: list[Action] = []
        candidates = [newcomer] if newcomer.size > self.ram_bytes else list(self._in_ram.values())
        for each in candidates:
            if self.ram_used - self._leaving_bytes <= self.ram_bytes:
                return actions
            if not each.leaving:
                actions += self._demote(each)
        if self.ram_used - self._leaving_bytes > self.ram_bytes:
            actions += self._forget(newcomer)  # the rest is pinned and has nowhere to go
        return actions

    def _demote(self, state: ParkedState) -> list[Action]:
        """Let a state leave RAM, written first if need be; a pinned one stays if it cannot be written."""
        actions = [] if state.on_disk or state.writing else self._write(state)
        if state.pinned and not state.on_disk and not state.writing:
            return actions
        return actions + self._leave_ram(state)

    def _write(self, state: ParkedState) -> list[Action]:
        """Begin to write a state if there is room on disk, or can be made; else do nothing."""
        victims = self._disk_victims(state)
        if victims is None:
            return []
        actions = [action for each in victims for action in self._leave_disk(each)]
        self._onto_disk(state)
        state.writing = True
        return [*actions, Write(state.id)]

    def _disk_victims(self, state: ParkedState) -> list[ParkedState] | None:
        """Return whose files must go for a state's to fit: only states used no later. None when it cannot fit."""
        if not state.writable:
            return None
        missing = self.disk_used + state.size - self.disk_bytes
        victims: list[ParkedState] = []
        for each in self._on_disk.values():
            if missing <= 0 or each.last_used > state.last_used:
                break
            if not each.pinned and not each.writing:
                victims.append(each)
                missing -= each.size
        return victims if missing <= 0 else None

    # The books

    def _check_new(self, state: ParkedState) -> None:
        if state.id in self._states or state.id in self._dropped:
            raise ValueError(f"there is a state {state.id} already")

    def _add(self, state: ParkedState, tick: int) -> None:
        self._tree.insert(state.id, state.tokens, state.space)
        self._states[state.id] = state
        self.touch(state.id, tick)

    def _into_ram(self, state: ParkedState) -> None:
        state.in_ram = True
        self.ram_used += state.size
        self._in_ram[state.id] = state
        self.touch(state.id, self._tick)

    def _onto_disk(self, state: ParkedState) -> None:
        """Count a state's file, complete or not yet."""
        later = [each for each in self._on_disk.values() if each.last_used > state.last_used]
        self._on_disk[state.id] = state
        for each in later:  # a state may be written long after its last use
            self._on_disk[each.id] = self._on_disk.pop(each.id)
        self.disk_used += state.size

    def _off_disk(self, state: ParkedState) -> None:
        del self._on_disk[state.id]
        self.disk_used -= state.size

    def _leave_ram(self, state: ParkedState) -> list[Action]:
        """Give up a state's RAM, after its `Write` if it is being written; it is forgotten if it is in no file."""
        if state.writing:
            self._leaving_bytes += 0 if state.leaving else state.size
            state.leaving = True
            return []
        del self._in_ram[state.id]
        self.ram_used -= state.size
        self._leaving_bytes -= state.size if state.leaving else 0
        state.in_ram = state.leaving = False
        return [Free(state.id), *([] if state.on_disk else self._forget(state))]

    def _leave_disk(self, state: ParkedState) -> list[Action]:
        """Give up a state's file; it is forgotten if it is not in RAM."""
        self._off_disk(state)
        state.on_disk = False
        return [Erase(state.id), *([] if state.in_ram else self._forget(state))]

    def _forget(self, state: ParkedState) -> list[Action]:
        """Give up a state wherever it is; what is being written goes when that has ended."""
        if self._states.pop(state.id, None) is None:
            return []
        self._tree.remove(state.id)
        if state.writing:
            self._dropped[state.id] = state
            return self._leave_ram(state)
        return [*(self._leave_ram(state) if state.in_ram else []), *(self._leave_disk(state) if state.on_disk else [])]

    def _end_dropped(self, state_id: str) -> list[Action] | None:
        """End the books of a state that was dropped while it was being written; None if it was not."""
        state = self._dropped.pop(state_id, None)
        if state is None:
            return None
        state.writing = False
        self._off_disk(state)
        return self._leave_ram(state)
