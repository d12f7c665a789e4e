"""Who runs next, and on which tokens: the policy of continuous batching, as a pure state machine.

A *sequence* is one choice of one request: its tokens, and how many of them have been evaluated. A *slot* is one of the
context's native sequence ids: it holds KV cells, for a running sequence or left behind by one that ended. The worker
calls, in a loop:

    submit / cancel …        as requests arrive and leave
    step = plan()            memory operations to carry out, then the tokens to decode
    complete(step, seconds)  the step was decoded; `append` or `finish` follows for each sampled sequence
    confirm(run, accepted)   before these, where a run had drafts: so many of them were right
    refuse()                 it was not, for want of cells: someone gives way, and `plan` is asked again

Admission is by priority aged by waiting time, strictly in that order, so that nothing starves: a sequence is admitted
when a slot is free and the cells suffice for its uncached prompt and a small reserve for everyone's answers. (Reserving
`max_tokens` instead would block everyone for answers that end early.) When answers outgrow the cells, idle slots are
dropped, least recently used first; then the running sequence last in order gives way: it goes back to the queue and is
recomputed later.

While anyone is decoding, a step's prefill tokens are cut so that the step takes `target_latency`, by measured cost.
While few are decoding and no prompt is read, a step checks guessed tokens too, if that pays, in cells nobody needs.
A step's sequences are all under one adapter; the adapters take turns.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import replace

from appliance.core.types import Priority
from appliance.engine.llama.cells import CellLedger
from appliance.engine.llama.cost import StepCost
from appliance.engine.llama.fairness import FairShare, rank
from appliance.engine.llama.parked import ParkedStates
from appliance.engine.llama.parked_state import ParkedState
from appliance.engine.llama.prefill import share_out
from appliance.engine.llama.residents import Residents, Source
from appliance.engine.llama.speculation import MOST_DECODING, Drafter, choose_drafts
from appliance.engine.llama.step import Limits, Run, Sequence, Step, Truncate
from appliance.engine.llama.turns import Turns

RESERVE_CELLS = 16
"""Cells kept per running sequence at admission, so that a newcomer is not sent back within a few steps."""
MINIMUM_PREFILL_TOKENS = 8
"""A step reads at least so many prompt tokens, however slow the machine, so that prompts always advance."""
WORTH_WAITING_TOKENS = 32
"""A prefix that another sequence is just computing is waited for if it saves at least so many tokens."""
MOST_WAITERS = 64
"""So many of those that wait are looked at in a step because somebody may compute a prefix for them."""
WORTH_RESUMING_TOKENS = 16
"""A parked state is resumed if it has at least so many tokens more than a slot."""


class Scheduler:
    """The state of all sequences and slots of one context."""

    def __init__(
        self, limits: Limits, parked: ParkedStates | None = None, shortest: Callable[[int], int] | None = None
    ) -> None:
        """Start with empty slots and an empty queue.

        Args:
            limits: What the context offers.
            parked: Where states that were kept aside are found.
            shortest: Tells the fewest tokens that a slot can be cut back to or forked at now; without it, any number.
        """
        self.limits = limits
        self.cost = StepCost()
        self.turns = Turns()
        self.shares = FairShare()
        self.residents = Residents(limits, parking=parked is not None, shortest=shortest)
        self.waiting: list[Sequence] = []
        self.running: list[Sequence] = []
        self._parked = parked
        self._fetches: dict[str, ParkedState] = {}
        self._preemptions = 0
        self._now = 0.0
        self._waiters: dict[int, list[Sequence]] = {}
        self._planned_drafts = 0
        self._drafts_refused = False

    @property
    def ledger(self) -> CellLedger:
        """Return the books of the KV cells."""
        return self.residents.ledger

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
        self.shares.arrive(sequence)
        self.waiting.append(sequence)

    def cancel(self, sequence: Sequence) -> None:
        """Forget a sequence, wherever it is; its cells stay for reuse until they are needed. Idempotent."""
        if sequence in self.waiting:
            self.waiting.remove(sequence)
            self.shares.leave(sequence)
        elif sequence in self.running:
            self.finish(sequence)

    def finish(self, sequence: Sequence) -> None:
        """End a running sequence; what it evaluated stays in its slot for the next turn."""
        self.running.remove(sequence)
        self.shares.leave(sequence)
        self.residents.release(sequence)

    def append(self, sequence: Sequence, token: int) -> None:
        """Add a sampled token, to be evaluated in the next step."""
        sequence.tokens.append(token)
        if sequence.drafter is not None:
            sequence.drafter.observe(token)

    def confirm(self, run: Run, accepted: int) -> Truncate:
        """Add the first `accepted` drafts of a decoded run, which were sampled as well.

        Returns:
            What takes the others out of native memory; to be carried out at once.
        """
        sequence = run.sequence
        assert sequence.drafter is not None, "who has drafts has a drafter"
        assert sequence.slot is not None, "the sequence is running"
        for token in run.drafts[:accepted]:
            self.append(sequence, token)
        self._charge(sequence, accepted)
        self.residents.evaluated(sequence, accepted)
        sequence.drafter.settle(checked=len(run.drafts), accepted=accepted)
        return Truncate(sequence.slot, sequence.evaluated)

    def plan(self, now: float = 0.0) -> Step:
        """Admit who can be admitted and choose the next batch.

        Args:
            now: Seconds, on the clock of the sequences' `arrived`.

        Raises:
            ValueError: A single sequence outgrew the cells; whoever samples must end it in time.
        """
        self._now = now
        admitted = self._admit()
        if self.waiting and not self._places:
            self._make_places()
            admitted += self._admit()
        if self.running and self._parked is not None:
            self.residents.tidy()
        runs, prefill_tokens = self._choose_runs()
        while sum(run.count for run in runs) > self.ledger.free:
            self._free_cells()
            runs, prefill_tokens = self._choose_runs()
        if prefill_tokens == 0:
            runs = self._with_drafts(runs)
        self._planned_drafts = sum(len(run.drafts) for run in runs)
        fetches, self._fetches = tuple(self._fetches.values()), {}
        return Step(
            operations=self.residents.take_operations(),
            runs=runs,
            admitted=tuple(each for each in admitted if each.slot is not None),
            decoding=sum(run.sequence.decoding for run in runs),
            prefill_tokens=prefill_tokens,
            draft_tokens=self._planned_drafts,
            fetches=fetches,
            adapter=runs[0].sequence.adapter if runs else self.turns.current,
        )

    def complete(self, step: Step, seconds: float) -> None:
        """Record that a step was decoded and how long that took."""
        cells = self.ledger.used
        for run in step.runs:
            sequence, count = run.sequence, run.count - len(run.drafts)
            if sequence.decoding:
                self._charge(sequence, count)
            self.residents.evaluated(sequence, count)
        self._drafts_refused = False
        work = {
            "decoding": step.decoding,
            "prefill_tokens": step.prefill_tokens,
            "draft_tokens": step.draft_tokens,
            "cells": cells,
        }
        if step.adapter == self.turns.current:
            self.cost.observe(**work, seconds=seconds)
            self.turns.served(step.adapter, seconds)
        else:  # the time is that of the switch too
            self.turns.served(step.adapter, seconds, self.cost.expected_s(**work))

    def _charge(self, sequence: Sequence, generated: int) -> None:
        self.shares.charge(sequence.tenant, generated_tokens=generated, weight=sequence.weight)

    def refuse(self) -> None:
        """Record that native code found no room for the planned step: the least useful holder of cells gives way.

        Guesses are the least useful of all: if the step had any, the next one has none.

        The ledger makes this rare; it covers memories that take more cells than tokens.

        Raises:
            ValueError: Nobody is left to give way: a single sequence does not fit.
        """
        if self._planned_drafts:
            self._drafts_refused = True
        else:
            self._free_cells()

    def drop(self, sequence: Sequence) -> None:
        """End a running sequence whose cells cannot be trusted any more; nothing of it is reused."""
        self.running.remove(sequence)
        self.shares.leave(sequence)
        self.residents.discard(sequence)

    def start_over(self) -> None:
        """Record that no cell can be trusted any more: everyone goes back to the queue and is computed anew."""
        for sequence in self.running:
            self.residents.discard(sequence)
            self.shares.park(sequence)
        self.waiting += self.running
        self.running.clear()
        self.residents.forget()

    def forget(self, sessions: Collection[str]) -> None:
        """Keep nothing of sessions, whose text was deleted; what runs does so to its end, and is forgotten then."""
        for sequence in (*self.waiting, *self.running):
            if sequence.session in sessions:
                sequence.kept = False
        self.residents.forget_sessions(sessions)

    def lost(self, sequence: Sequence) -> None:
        """Record that a running sequence's past or parked state could not be had; it begins again."""
        self.residents.lost(sequence)

    def check_integrity(self) -> None:
        """Verify that slots, sequences and cells agree.

        Raises:
            AssertionError: They do not.
        """
        self.residents.check_integrity(self.running)
        assert all(each.slot is None and each.evaluated == 0 for each in self.waiting), "a waiting sequence holds cells"
        self.shares.check_integrity(self.waiting, self.running)

    # Admission

    @property
    def _places(self) -> int:
        """Return how many more sequences may run."""
        return min(self.limits.running, self.limits.slots) - len(self.running)

    def _admit(self) -> list[Sequence]:
        self._waiters = {}
        if not self.waiting:
            return []
        prefill_token_s = self.cost.prefill_token_s(self.ledger.used)
        admitted: list[Sequence] = []
        places, delayed = self._places, 0
        order = self.shares.order(self.waiting, now=self._now, prefill_token_s=prefill_token_s) if places else []
        for sequence in order:
            if not places or delayed > MOST_WAITERS:
                break
            source, in_flight, reader = self._best_source(sequence)
            if reader is not None and in_flight >= source.length + WORTH_WAITING_TOKENS:
                self._waiters.setdefault(reader.id, []).append(sequence)
                delayed += 1
            elif source.state is not None and not (source.state.in_ram or source.state.in_hand):
                self._fetches[source.state.id] = source.state
                delayed += 1
            elif self._place(sequence, source):
                self.waiting.remove(sequence)
                self.running.append(sequence)
                self.shares.admit(sequence, now=self._now)
                admitted.append(sequence)
                places -= 1
            else:
                break
        return admitted

    def _make_places(self) -> None:
        """Have flex sequences yield to more urgent ones that wait for a slot."""
        if all(each.priority < Priority.FLEX for each in self.running):
            return
        for sequence in self.waiting[:MOST_WAITERS]:
            _, in_flight, reader = self.residents.longest_prefix(sequence)
            if reader is not None and in_flight >= WORTH_WAITING_TOKENS:
                self._waiters.setdefault(reader.id, []).append(sequence)
        while self.waiting and not self._places:
            chosen = self.shares.yields(
                self.running,
                self.waiting,
                now=self._now,
                prefill_token_s=self.cost.prefill_token_s(self.ledger.used),
                waiters=self._waiters,
            )
            if chosen is None:
                return
            self._send_back(chosen)

    def _place(self, sequence: Sequence, source: Source) -> bool:
        """Give a sequence a slot and its reusable cells, or return False and change nothing."""
        room = sum(each.pending for each in self.running) + len(sequence.tokens)
        if self.running:
            room += RESERVE_CELLS * (len(self.running) + 1)
        if self.residents.place(sequence, source, room - source.length):
            return True
        alone = Source(source.slot, source.slot_length)
        return source.state is not None and self.residents.place(sequence, alone, room - alone.length)

    def _best_source(self, sequence: Sequence) -> tuple[Source, int, Sequence | None]:
        """Return where most of a newcomer's prompt can be had from, and what which running sequence will have of it."""
        source, in_flight, reader = self.residents.longest_prefix(sequence)
        if self._parked is not None:
            found = self._parked.best(sequence.tokens, sequence.adapter, limit=len(sequence.tokens) - 1)
            if found is not None and found[1] >= source.length + WORTH_RESUMING_TOKENS:
                source = replace(source, state=found[0], state_length=found[1])
        return source, in_flight, reader

    # The batch

    def _choose_runs(self) -> tuple[tuple[Run, ...], int]:
        """Return the runs of the next batch and how many of their tokens are prefill."""
        adapters = {each.adapter for each in self.running}
        target_s = self.limits.target_latency
        turn = self.turns.next(adapters, target_s) if adapters else ""
        chosen = [each for each in self.running if each.adapter == turn]
        decoders = [each for each in chosen if each.decoding]
        readers = sorted((each for each in chosen if not each.decoding), key=lambda each: each.order)
        runs = [Run(each, each.evaluated, 1, sample=True) for each in decoders]
        room = self.limits.batch_tokens - len(runs)
        if any(each.decoding for each in self.running):
            seconds = self.turns.share_s(len(adapters), target_s)
            affordable = self.cost.prefill_tokens_within(seconds, decoding=len(decoders), cells=self.ledger.used)
            room = min(room, max(MINIMUM_PREFILL_TOKENS, affordable))
        shares = share_out(readers, room, [rank(each, now=self._now, waiters=self._waiters) for each in readers])
        runs += [
            Run(each, each.evaluated, n, sample=n == each.pending) for each, n in zip(readers, shares, strict=True) if n
        ]
        return tuple(runs), sum(shares)

    def _with_drafts(self, runs: tuple[Run, ...]) -> tuple[Run, ...]:
        """Return the runs, all of decoding sequences, with the guesses that are worth being checked beside them."""
        speculate = self.limits.draft_tokens and self.limits.can_rewind and not self._drafts_refused
        if not speculate or not 0 < len(runs) <= MOST_DECODING:
            return runs
        cells = self.ledger.used
        step_s, guess_s = self.cost.decode_s(len(runs), cells), self.cost.draft_token_s(cells)
        if step_s <= 0.0:
            return runs
        longest_s = self.limits.target_latency / len({each.adapter for each in self.running})
        price = guess_s * len(runs) / step_s
        drafters = []
        for sequence in (run.sequence for run in runs):
            drafter = sequence.drafter = sequence.drafter or Drafter(sequence.tokens)
            drafter.look(longest=sequence.token_limit - len(sequence.tokens) - 1, price=price)
            drafters.append(drafter)
        room = min(
            self.limits.draft_tokens,
            self.limits.batch_tokens - len(runs),
            self.ledger.free - len(runs),
            int((longest_s - step_s) / guess_s),
        )
        counts = choose_drafts(drafters, room=room, price=price)
        return tuple(
            replace(run, count=1 + n, drafts=tuple(each.guess[:n])) if n else run
            for run, each, n in zip(runs, drafters, counts, strict=True)
        )

    # Giving way

    def _free_cells(self) -> None:
        if not self.residents.drop_idle() and not self._give_way():
            raise ValueError(f"a single sequence does not fit {self.limits.cells} cells")

    def _give_way(self) -> bool:
        """Send the running sequence that is last in order back to the queue; return False if it is the only one."""
        if len(self.running) < 2:
            return False
        self._send_back(self.shares.victim(self.running, now=self._now, waiters=self._waiters))
        self._preemptions += 1
        return True

    def _send_back(self, sequence: Sequence) -> None:
        """Take a running sequence's slot; it waits, and goes on later from where it was."""
        self.running.remove(sequence)
        self.residents.park(sequence)
        self.shares.park(sequence)
        self.waiting.append(sequence)
