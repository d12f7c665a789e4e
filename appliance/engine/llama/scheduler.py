"""Who runs next, and on which tokens: the policy of continuous batching, as a pure state machine.

A *sequence* is one choice of one request: its tokens, and how many of them have been evaluated. A *slot* is one of the
context's native sequence ids: it holds KV cells, for a running sequence or left behind by one that ended. The worker
calls, in a loop:

    submit / cancel …        as requests arrive and leave
    step = plan()            memory operations to carry out, then the tokens to decode
    complete(step, seconds)  the step was decoded; `append` or `finish` follows for each sampled sequence
    refuse()                 it was not, for want of cells: someone gives way, and `plan` is asked again

Admission is by priority aged by waiting time, strictly in that order, so that nothing starves: a sequence is admitted
when a slot is free and the cells suffice for its uncached prompt and a small reserve for everyone's answers. (Reserving
`max_tokens` instead would block everyone for answers that end early.) When answers outgrow the cells, idle slots are
dropped, least recently used first; then the running sequence last in order gives way: it goes back to the queue and is
recomputed later.

While anyone is decoding, a step's prefill tokens are cut so that the step takes `target_latency`, by measured cost.
"""

from __future__ import annotations

from array import array
from bisect import insort
from dataclasses import dataclass, field

from appliance.engine.llama.cells import CellLedger
from appliance.engine.llama.cost import StepCost
from appliance.engine.llama.prefix import common_prefix
from appliance.engine.llama.step import Fork, Limits, Run, Sequence, Step, Truncate

RESERVE_CELLS = 16
"""Cells kept per running sequence at admission, so that a newcomer is not sent back within a few steps."""
MINIMUM_PREFILL_TOKENS = 8
"""A step reads at least so many prompt tokens, however slow the machine, so that prompts always advance."""
WORTH_WAITING_TOKENS = 32
"""A prefix that another sequence is just computing is waited for if it saves at least so many tokens."""


@dataclass(eq=False, slots=True)
class _Slot:
    tokens: array[int] = field(default_factory=lambda: array("i"))
    owner: Sequence | None = None
    last_used: int = 0


class Scheduler:
    """The state of all sequences and slots of one context."""

    def __init__(self, limits: Limits) -> None:
        """Start with empty slots and an empty queue."""
        self.limits = limits
        self.cost = StepCost()
        self.ledger = CellLedger(cells=limits.cells, slots=limits.slots)
        self.waiting: list[Sequence] = []
        self.running: list[Sequence] = []
        self._slots = [_Slot() for _ in range(limits.slots)]
        self._operations: list[Truncate | Fork] = []
        self._ticks = 0
        self._preemptions = 0

    @property
    def idle(self) -> bool:
        """Return True when there is nothing to do."""
        return not self.waiting and not self.running

    @property
    def preemptions(self) -> int:
        """Return how often a running sequence had to give way for want of cells."""
        return self._preemptions

    def submit(self, sequence: Sequence) -> None:
        """Queue a sequence. Its tokens must be one or more, and fewer than there are cells."""
        if not 0 < len(sequence.tokens) < self.limits.cells:
            raise ValueError(f"{len(sequence.tokens)} tokens do not fit {self.limits.cells} cells")
        insort(self.waiting, sequence, key=lambda each: each.order)

    def cancel(self, sequence: Sequence) -> None:
        """Forget a sequence, wherever it is; its cells stay for reuse until they are needed. Idempotent."""
        if sequence in self.waiting:
            self.waiting.remove(sequence)
        elif sequence in self.running:
            self.finish(sequence)

    def finish(self, sequence: Sequence) -> None:
        """End a running sequence; what it evaluated stays in its slot for the next turn."""
        slot = self._slot_of(sequence)
        slot.tokens = sequence.tokens[: sequence.evaluated]
        slot.owner = None
        self.running.remove(sequence)
        sequence.slot = None

    def append(self, sequence: Sequence, token: int) -> None:
        """Add a sampled token, to be evaluated in the next step."""
        sequence.tokens.append(token)

    def plan(self) -> Step:
        """Admit who can be admitted and choose the next batch.

        Raises:
            ValueError: A single sequence outgrew the cells; whoever samples must end it in time.
        """
        admitted = self._admit()
        runs, prefill_tokens = self._choose_runs()
        while sum(run.count for run in runs) > self.ledger.free:
            self._free_cells()
            runs, prefill_tokens = self._choose_runs()
        operations, self._operations = tuple(self._operations), []
        return Step(
            operations=operations,
            runs=runs,
            admitted=tuple(each for each in admitted if each.slot is not None),
            decoding=sum(run.sequence.decoding for run in runs),
            prefill_tokens=prefill_tokens,
        )

    def complete(self, step: Step, seconds: float) -> None:
        """Record that a step was decoded and how long that took."""
        self._ticks += 1
        cells = self.ledger.used
        for run in step.runs:
            sequence = run.sequence
            slot = self._slot_of(sequence)
            assert sequence.slot is not None
            self.ledger.extend(sequence.slot, run.count)
            sequence.evaluated += run.count
            slot.last_used = self._ticks
        self.cost.observe(decoding=step.decoding, prefill_tokens=step.prefill_tokens, cells=cells, seconds=seconds)

    def refuse(self) -> None:
        """Record that native code found no room for the planned step: the least useful holder of cells gives way.

        The ledger makes this rare; it covers memories that take more cells than tokens.

        Raises:
            ValueError: Nobody is left to give way: a single sequence does not fit.
        """
        self._free_cells()

    def drop(self, sequence: Sequence) -> None:
        """End a running sequence whose cells cannot be trusted any more; nothing of it is reused."""
        slot = sequence.slot
        assert slot is not None
        sequence.evaluated = 0
        self.finish(sequence)
        self._operations.append(Truncate(slot, 0))  # even of an empty slot: a failed batch may have left cells there
        self.ledger.truncate(slot, 0)

    def check_integrity(self) -> None:
        """Verify that slots, sequences and cells agree.

        Raises:
            AssertionError: They do not.
        """
        self.ledger.check_integrity()
        owners = [slot.owner for slot in self._slots if slot.owner is not None]
        assert len(owners) == len(self.running), "a running sequence without a slot"
        for index, slot in enumerate(self._slots):
            held = self.ledger.length(index)
            if slot.owner is None:
                assert held == len(slot.tokens), f"idle slot {index} holds {held} cells for {len(slot.tokens)} tokens"
            else:
                assert slot.owner.slot == index, f"slot {index} and its sequence disagree"
                assert held == slot.owner.evaluated, f"slot {index} holds {held}, evaluated {slot.owner.evaluated}"
        assert all(each.slot is None and each.evaluated == 0 for each in self.waiting), "a waiting sequence holds cells"
        assert self.waiting == sorted(self.waiting, key=lambda each: each.order), "the queue is out of order"

    # Admission

    def _admit(self) -> list[Sequence]:
        admitted: list[Sequence] = []
        for sequence in list(self.waiting):
            source, prefix = self._best_source(sequence)
            if self._prefix_in_flight(sequence) >= prefix + WORTH_WAITING_TOKENS:
                continue
            if not self._place(sequence, source, prefix):
                break
            self.waiting.remove(sequence)
            self.running.append(sequence)
            admitted.append(sequence)
        return admitted

    def _place(self, sequence: Sequence, source: int | None, prefix: int) -> bool:
        """Give a sequence a slot and its reusable cells, or return False and change nothing."""
        idle = self._idle_slots()
        if not idle:
            return False
        in_use = self._slots_in_use()
        promised = sum(each.pending for each in self.running) + len(sequence.tokens) - prefix
        if self.running:
            promised += RESERVE_CELLS * (len(self.running) + 1)
        kept_prefix = prefix if source in idle else 0
        if self.ledger.used_by(in_use) + kept_prefix + promised > self.limits.cells:
            return False
        target = self._target(idle, source, prefix)
        if source in idle and self.ledger.used_by({*in_use, source}) + promised > self.limits.cells:
            target = source  # the cells do not suffice beside the source's tail: take it over
        self._move_in(sequence, target, source, prefix)
        return True

    def _move_in(self, sequence: Sequence, target: int, source: int | None, prefix: int) -> None:
        if target == source:
            self._truncate(target, prefix)
        else:
            self._truncate(target, 0)
            if source is not None:
                self._operations.append(Fork(source, target, prefix))
                self.ledger.fork(source, target, prefix)
        self._slots[target].tokens = array("i")
        self._slots[target].owner = sequence
        sequence.slot = target
        sequence.evaluated = prefix
        if sequence.cached < 0:
            sequence.cached = prefix
        wanted = sum(each.pending for each in self.running) + sequence.pending
        while wanted > self.ledger.free and self._drop_idle(keep=source):
            pass

    def _target(self, idle: list[int], source: int | None, prefix: int) -> int:
        """Choose the slot to run in: the source itself when most of it is reused, else the emptiest, oldest one."""
        if source in idle and 2 * prefix >= self.ledger.length(source):
            return source
        others = [index for index in idle if index != source] or idle
        return min(others, key=lambda index: (self.ledger.length(index) > 0, self._slots[index].last_used))

    def _best_source(self, sequence: Sequence) -> tuple[int | None, int]:
        """Return the slot that shares the longest evaluated prefix, and its length."""
        usable = len(sequence.tokens) - 1  # the last token is evaluated anew, since its logits are needed
        best: tuple[int | None, int] = (None, 0)
        for index, slot in enumerate(self._slots):
            held = self.ledger.length(index)
            tokens = slot.owner.tokens if slot.owner is not None else slot.tokens
            length = common_prefix(sequence.tokens, tokens, min(usable, held))
            if not self.limits.can_rewind and (slot.owner is not None or length < held):
                continue
            if length > best[1]:
                best = (index, length)
        return best

    def _prefix_in_flight(self, sequence: Sequence) -> int:
        """Return the longest prefix that a running sequence has in its prompt but has not evaluated yet."""
        if not self.limits.can_rewind:
            return 0
        usable = len(sequence.tokens) - 1
        lengths = (
            common_prefix(sequence.tokens, each.tokens, min(usable, each.prompt_length))
            for each in self.running
            if each.evaluated < each.prompt_length
        )
        return max(lengths, default=0)

    # The batch

    def _choose_runs(self) -> tuple[tuple[Run, ...], int]:
        """Return the runs of the next batch and how many of their tokens are prefill."""
        decoders = [each for each in self.running if each.decoding]
        readers = sorted((each for each in self.running if not each.decoding), key=lambda each: each.order)
        runs = [Run(each, each.evaluated, 1, sample=True) for each in decoders]
        room = self.limits.batch_tokens - len(runs)
        if decoders:
            affordable = self.cost.prefill_tokens_within(
                self.limits.target_latency, decoding=len(decoders), cells=self.ledger.used
            )
            room = min(room, max(MINIMUM_PREFILL_TOKENS, affordable))
        shares = _share_out(readers, room)
        runs += [
            Run(each, each.evaluated, n, sample=n == each.pending) for each, n in zip(readers, shares, strict=True) if n
        ]
        return tuple(runs), sum(shares)

    # Giving way

    def _free_cells(self) -> None:
        if not self._drop_idle() and not self._give_way():
            raise ValueError(f"a single sequence does not fit {self.limits.cells} cells")

    def _drop_idle(self, keep: int | None = None) -> bool:
        """Drop the idle slot unused for longest; return False when none holds any cells."""
        candidates = [index for index in self._idle_slots() if index != keep and self.ledger.length(index) > 0]
        if not candidates:
            return False
        self._truncate(min(candidates, key=lambda index: self._slots[index].last_used), 0)
        return True

    def _give_way(self) -> bool:
        """Send the running sequence that is last in order back to the queue; return False if it is the only one."""
        if len(self.running) < 2:
            return False
        last = max(self.running, key=lambda each: each.order)
        slot = last.slot
        assert slot is not None
        self.drop(last)
        self.submit(last)
        self._preemptions += 1
        return True

    def _truncate(self, slot: int, length: int) -> None:
        if self.ledger.length(slot) > length:
            self._operations.append(Truncate(slot, length))
            self.ledger.truncate(slot, length)
        del self._slots[slot].tokens[length:]

    def _idle_slots(self) -> list[int]:
        return [index for index, slot in enumerate(self._slots) if slot.owner is None]

    def _slots_in_use(self) -> set[int]:
        return {index for index, slot in enumerate(self._slots) if slot.owner is not None}

    def _slot_of(self, sequence: Sequence) -> _Slot:
        assert sequence.slot is not None, "the sequence is not running"
        return self._slots[sequence.slot]


def _share_out(readers: list[Sequence], room: int) -> list[int]:
    """Divide the step's prefill tokens among the prompts being read, which are given in order of age.

    The oldest is sure of a quarter, so that a long prompt advances however many short ones arrive; the rest goes by
    priority, short prompts first, since those are answered soonest.
    """
    shares = [0] * len(readers)
    by_shortness = sorted(range(len(readers)), key=lambda index: (readers[index].priority, readers[index].pending))
    if readers:
        shares[0] = min(readers[0].pending, -(-room // 4))
        room -= shares[0]
    for index in by_shortness:
        more = min(readers[index].pending - shares[index], room)
        shares[index] += more
        room -= more
    return shares
