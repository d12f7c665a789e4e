"""What the scheduler is given and what it answers with: sequences, limits and steps (pure data)."""

from __future__ import annotations

from array import array
from dataclasses import dataclass

from appliance.core.types import Priority

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
        tenant: Whose share of the engine it counts against.
        weight: The tenant's share, relative to the others'.
        deadline: When its caller gives up, on the clock of `arrived`; None is never.
    """

    id: int
    tokens: array[int]
    priority: Priority = Priority.DEFAULT
    arrived: float = 0.0
    prompt_length: int = 0
    evaluated: int = 0
    cached: int = -1
    slot: int | None = None
    tenant: str = ""
    weight: float = 1.0
    deadline: float | None = None

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
class Run:
    """Evaluate `count` tokens of a sequence from its token `start`; `sample` if its last pending one is among them."""

    sequence: Sequence
    start: int
    count: int
    sample: bool


@dataclass(frozen=True, slots=True)
class Step:
    """What to do next: the memory operations in order, then one batch. `runs` may be empty when nothing can run."""

    operations: tuple[Truncate | Fork, ...]
    runs: tuple[Run, ...]
    admitted: tuple[Sequence, ...]
    decoding: int = 0
    prefill_tokens: int = 0


@dataclass(frozen=True, slots=True)
class Limits:
    """What the context offers.

    Attributes:
        cells: KV cells shared by all slots.
        slots: Native sequence ids.
        batch_tokens: Most tokens of one step.
        target_latency: Seconds a step may take while anyone is decoding.
        can_rewind: False for recurrent and hybrid memories, which cannot drop a tail or share a part of a sequence.
    """

    cells: int
    slots: int
    batch_tokens: int
    target_latency: float
    can_rewind: bool = True
