"""Sequences that do not run: their native states in RAM, and what is to be done with their files.

Belongs to the worker's thread, as the context does. Which states are kept is decided by `ParkedStates`; here the copies
are made and put back. Files are read and written elsewhere, by whoever `on_job` tells, and the outcome comes back
through `take`; so no sequence ever waits for a disk that another one needs.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass

from appliance.core.errors import ApplianceError
from appliance.engine.llama.buffers import StateMemory
from appliance.engine.llama.context import LlamaContext, State
from appliance.engine.llama.parked import ParkedStates
from appliance.engine.llama.parked_state import Action, Erase, Free, ParkedState, Write
from appliance.engine.llama.state_files import new_id
from appliance.engine.llama.state_format import StateHead
from appliance.engine.llama.step import Park, Resume

PINNED_S = 86_400.0
"""How long a pinned state is kept after its last use as a pinned one."""
PINNED_SHARE = 0.5
"""Share of the RAM for states that pinned ones may take."""
IN_HAND_S = 10.0
"""How long a state that was read from disk is held for those who wait for it; one step is enough with room."""
TEND_EVERY_S = 0.5
"""How often it is looked for something to write."""


@dataclass(frozen=True, slots=True)
class WriteState:
    """Write a state to a file of its own; the payload does not change until the outcome is told."""

    head: StateHead
    payload: State


@dataclass(frozen=True, slots=True)
class ReadState:
    """Read a state's file and verify it."""

    head: StateHead


@dataclass(frozen=True, slots=True)
class EraseState:
    """Delete a state's file."""

    id: str


@dataclass(frozen=True, slots=True)
class EraseForGood:
    """Delete states' files, even if the power fails next; then call `done`, with an error if that failed."""

    ids: Collection[str]
    done: Callable[[ApplianceError | None], None]


FileJob = WriteState | ReadState | EraseState | EraseForGood


@dataclass(frozen=True, slots=True)
class Found:
    """States whose files were there at the start, in the order of their last use."""

    states: tuple[ParkedState, ...]


@dataclass(frozen=True, slots=True)
class Written:
    """How a `WriteState` ended."""

    id: str
    succeeded: bool


@dataclass(frozen=True, slots=True)
class Fetched:
    """How a `ReadState` ended; without a payload the file was of no use and is gone."""

    id: str
    payload: State | None


Outcome = Found | Written | Fetched


@dataclass(frozen=True, slots=True)
class _InHand:
    """A state that was read from disk, and until when it is held, in monotonic seconds."""

    state: ParkedState
    payload: State
    until: float


@dataclass(frozen=True, slots=True)
class _Forgetting:
    """What is to be erased, what of it is still being written, and who waits for the end."""

    erase: EraseForGood
    writing: set[str]


class StateKeeper:
    """The parked states of one context.

    Attributes:
        states: What is kept, for the scheduler to look up.
    """

    def __init__(
        self,
        context: LlamaContext,
        states: ParkedStates,
        *,
        on_job: Callable[[FileJob], None],
        write_after_s: float,
    ) -> None:
        """Keep states of the context.

        Args:
            context: Where they are copied from and to.
            states: The books, empty.
            on_job: Called with work on files; must return at once.
            write_after_s: How long a state is unused before it is written to disk.
        """
        self.states = states
        self._context = context
        self._memory = StateMemory(states.ram_bytes)
        self._payloads: dict[str, State] = {}
        self._on_job = on_job
        self._write_after_s = write_after_s
        self._writing: set[str] = set()
        self._staying: set[str] = set()
        self._pinned_until: dict[str, float] = {}
        self._tended_at = 0.0
        self._fetching: set[str] = set()
        self._in_hand: dict[str, _InHand] = {}
        self._forgetting: list[_Forgetting] = []

    def park(self, operation: Park, *, stays: bool = False) -> None:
        """Copy a slot's state, unless that is kept already or fits nowhere.

        With `stays` the slot goes on to hold it, so the copy is for the disk only and is in RAM until it is there.

        Raises:
            EngineError: llama.cpp could not copy it.
        """
        if stays and not self.states.disk_bytes:
            return
        kept = self._kept(operation)
        size = self._context.state_bytes(operation.slot)
        if kept is not None and not kept.in_ram and not stays and len(kept.tokens) == len(operation.tokens):
            self._staying.discard(kept.id)
            self._payloads[kept.id] = self._copy(operation.slot, size)
            self._carry_out(self.states.promote(kept.id))
        elif self.states.wants(operation.tokens, operation.adapter, size):
            state = ParkedState(new_id(), operation.tokens, operation.adapter, size, operation.session)
            self._payloads[state.id] = self._copy(operation.slot, size)
            if stays:
                self._staying.add(state.id)
            self._carry_out(self.states.put(state, _tick()))
        elif kept is not None and not stays:
            self._staying.discard(kept.id)

    def _kept(self, operation: Park) -> ParkedState | None:
        """Return a parked state that has all of a slot's tokens."""
        found = self.states.best(operation.tokens, operation.adapter)
        return found[0] if found is not None and found[1] == len(operation.tokens) else None

    def _copy(self, slot: int, size: int) -> State:
        payload = self._memory.take(size)
        self._context.save_state(slot, payload)
        return payload

    def pin(self, operation: Park) -> None:
        """Copy a slot's state and keep it for a day, whatever else needs the room; up to half of the RAM."""
        self.park(operation)
        state = self._kept(operation)
        if state is None:
            return
        pinned = sum(self.states[each].size for each in self._pinned_until if each in self.states)
        if state.id in self._pinned_until or pinned + state.size <= PINNED_SHARE * self.states.ram_bytes:
            self.states.pin(state.id, pinned=True)
            self._pinned_until[state.id] = time.monotonic() + PINNED_S

    def forget(self, sessions: Collection[str], done: Callable[[ApplianceError | None], None]) -> None:
        """Forget all states of sessions; `done` is called once no file of them is left."""
        writing, actions = self.states.forget(sessions)
        freed = {each.id for each in actions if isinstance(each, Free)}
        self._staying |= writing | freed  # so their pages go to the system
        self._carry_out([each for each in actions if not isinstance(each, Erase)])
        self._staying -= freed
        for state_id in [each for each in self._in_hand if each not in self.states]:
            del self._in_hand[state_id]
        ids = writing | {each.id for each in actions if isinstance(each, Erase)}
        self._forgetting.append(_Forgetting(EraseForGood(ids, done), set(writing)))
        self._note_erased()

    def _note_erased(self, written: str = "") -> None:
        for each in self._forgetting:
            each.writing.discard(written)
            if not each.writing:
                self._on_job(each.erase)
        self._forgetting = [each for each in self._forgetting if each.writing]

    def _unpin(self, now: float) -> None:
        for state_id in [each for each, until in self._pinned_until.items() if until <= now]:
            del self._pinned_until[state_id]
            if state_id in self.states:
                self.states.pin(state_id, pinned=False)

    def resume(self, operation: Resume) -> bool:
        """Put a state into a slot; False if it is gone or llama.cpp refuses it, and then the slot is empty."""
        state = operation.state
        payload = self._payloads.get(state.id)
        if payload is None and state.id in self._in_hand:
            payload = self._in_hand[state.id].payload
        if payload is None or state.id not in self.states:
            return False
        if not self._context.resume(operation, payload):
            self._carry_out(self.states.drop(state.id))
            return False
        self.states.touch(state.id, _tick())
        return True

    def fetch(self, states: Iterable[ParkedState]) -> None:
        """Have states read from disk."""
        for state in states:
            if state.id not in self._fetching:
                self._fetching.add(state.id)
                self._on_job(ReadState(_head(state)))

    @property
    def fetching(self) -> bool:
        """Return True while somebody waits for a state to be read from disk."""
        return bool(self._fetching)

    def tend(self) -> None:
        """Have one state written that has not been used for a while; costs nothing when called often."""
        now = time.monotonic()
        if now < self._tended_at + TEND_EVERY_S:
            return
        self._tended_at = now
        self._unpin(now)
        self._let_go(now)
        if not self._writing:
            self._carry_out(self.states.write_behind(_tick() - int(1000 * self._write_after_s)))

    def flush(self) -> None:
        """Have everything written that fits the disk: the model is about to be unloaded."""
        while actions := self.states.write_behind(_tick()):
            self._carry_out(actions)

    def take(self, outcome: Outcome) -> None:
        """Take note of what has been done with a file."""
        match outcome:
            case Found(states):
                for state in states:
                    self._carry_out(self.states.restore(state, 0))
            case Written(state_id, succeeded):
                self._writing.discard(state_id)
                self._carry_out(self.states.written(state_id) if succeeded else self.states.failed(state_id))
                if state_id in self._staying:
                    self._carry_out(self.states.leave_ram(state_id))
                    self._staying.discard(state_id)
                self._note_erased(state_id)
            case Fetched(state_id, payload):
                self._fetching.discard(state_id)
                self._take_fetched(state_id, payload)

    def _take_fetched(self, state_id: str, payload: State | None) -> None:
        if state_id not in self.states or self.states[state_id].in_ram:
            return
        if payload is None:
            self._carry_out(self.states.drop(state_id))
            return
        state = self.states[state_id]
        state.in_hand = True
        self._in_hand[state_id] = _InHand(state, payload, time.monotonic() + IN_HAND_S)

    def _let_go(self, now: float) -> None:
        for state_id in [each for each, held in self._in_hand.items() if held.until <= now]:
            self._in_hand.pop(state_id).state.in_hand = False

    def _carry_out(self, actions: Iterable[Action]) -> None:
        for action in actions:
            match action:
                case Write(state_id):
                    state = self.states.being_written(state_id)
                    self._writing.add(state_id)
                    self._on_job(WriteState(_head(state), self._payloads[state_id]))
                case Free(state_id):
                    self._memory.give_back(self._payloads.pop(state_id), keep=state_id not in self._staying)
                case Erase(state_id):
                    self._on_job(EraseState(state_id))


def _head(state: ParkedState) -> StateHead:
    return StateHead(state.id, str(state.space), state.tokens, state.size, state.session)


def _tick() -> int:
    """Return the milliseconds by which states age."""
    return int(1000 * time.monotonic())
