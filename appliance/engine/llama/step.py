"""What the scheduler is given and what it answers with: sequences, limits and steps (pure data)."""

from __future__ import annotations

from array import array
from dataclasses import dataclass

from appliance.core.types import Priority
from appliance.engine.llama.parked_state import ParkedState
from appliance.engine.llama.speculation import Drafter

HEAD_START_S = {Priority.PRIORITY: 20.0, Priority.DEFAULT: 0.0, Priority.FLEX: -60.0}
"""How much earlier a request counts as having arrived; so one tier only delays another, and nothing starves."""


@dataclass(eq=False, slots=True)
class Sequence:
    """One choice on its way.

    Attributes:
        tokens: Prompt and what was generated, as C ints.
        evaluated: How many of `tokens` have their KV in `slot`. While decoding, all but the last.
        cached: Prompt tokens that were reused rather than computed, at the first admission.
        slot: The native sequence id, or None while waiting.
        adapter: The adapter it runs under; tokens that another one evaluated are not reused.
        tenant: Whose share of the engine it counts against.
        weight: The tenant's share, relative to the others'.
        deadline: When its caller gives up, on the clock of `arrived`; None is never.
        token_limit: Most tokens of prompt and answer; nothing is guessed beyond.
        drafter: What guesses its next tokens, from the first time on that few sequences decode.
        session: Whose text the tokens are, "" if that is nobody's to delete.
        kept: False once that text was deleted: nothing of the sequence outlives it.
    """

    id: int
    tokens: array[int]
    priority: Priority = Priority.DEFAULT
    arrived: float = 0.0
    prompt_length: int = 0
    evaluated: int = 0
    cached: int = -1
    slot: int | None = None
    adapter: str = ""
    tenant: str = ""
    weight: float = 1.0
    deadline: float | None = None
    token_limit: int = 2**31 - 1
    drafter: Drafter | None = None
    session: str = ""
    kept: bool = True

    def __post_init__(self) -> None:
        self.prompt_length = len(self.tokens)

    @property
    def order(self) -> tuple[float, int]:
        """Return the place in the queue; ageing is in it, since all keys age alike."""
        return (self.arrived - HEAD_START_S[self.priority], self.id)

    @property
    def pending(self) -> int:
        """Return how many tokens must be evaluated before the next one can be sampled."""
        return len(self.tokens) - self.evaluated

    @property
    def generated(self) -> int:
        """Return how many tokens have been sampled."""
        return len(self.tokens) - self.prompt_length

    @property
    def decoding(self) -> bool:
        """Return True once an answer token has been sampled and only that one is pending."""
        return self.pending == 1 and len(self.tokens) > self.prompt_length


@dataclass(frozen=True, slots=True)
class Truncate:
    """Drop a slot's cells past its first `length` tokens."""

    slot: int
    length: int


@dataclass(frozen=True, slots=True)
class Fork:
    """Let the empty slot `target` share the first `length` tokens of `source`."""

    source: int
    target: int
    length: int


@dataclass(frozen=True, slots=True)
class Park:
    """Keep a copy of a slot's state, which is that of a session's `tokens`, aside; its cells are taken next."""

    slot: int
    tokens: array[int]
    adapter: str
    session: str = ""


@dataclass(frozen=True, slots=True)
class Resume:
    """Put a parked state into the empty slot and keep its first `length` tokens.

    Of these the first `shared` are then shared with the slot `source`, which has them too.
    """

    slot: int
    state: ParkedState
    length: int
    source: int | None = None
    shared: int = 0


Operation = Truncate | Fork | Park | Resume


@dataclass(frozen=True, slots=True)
class Run:
    """Evaluate `count` tokens of a sequence from its token `start`; `sample` if its last pending one is among them.

    The last of them may be `drafts`: guesses, which the sequence does not have yet. The token that is sampled in front
    of each tells whether it was right.
    """

    sequence: Sequence
    start: int
    count: int
    sample: bool
    drafts: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Step:
    """What to do next: the memory operations in order, then one batch. `runs` may be empty when nothing can run.

    Attributes:
        fetches: Parked states that somebody waits for and that must be fetched from disk.
        adapter: The adapter that all runs are under.
    """

    operations: tuple[Operation, ...]
    runs: tuple[Run, ...]
    admitted: tuple[Sequence, ...]
    fetches: tuple[ParkedState, ...] = ()
    decoding: int = 0
    prefill_tokens: int = 0
    draft_tokens: int = 0
    adapter: str = ""


@dataclass(frozen=True, slots=True)
class Limits:
    """What the context offers.

    Attributes:
        cells: KV cells shared by all slots.
        slots: Native sequence ids, for running sequences and idle pasts.
        batch_tokens: Most tokens of one step.
        target_latency: Seconds a step may take while anyone is decoding.
        running: Most sequences that run at once; never more than there are slots.
        can_rewind: False for recurrent and hybrid memories, which cannot drop a tail or share a part of a sequence.
        can_rewind_states: False for these and sliding windows: a parked state is of use as a whole only.
        draft_tokens: Most guessed tokens of one step; without `can_rewind` there are none.
    """

    cells: int
    slots: int
    batch_tokens: int
    target_latency: float
    can_rewind: bool = True
    running: int = 2**31 - 1
    can_rewind_states: bool = True
    draft_tokens: int = 0
