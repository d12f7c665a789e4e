"""The scheduler as a state machine: whatever arrives or leaves, its books stay true and everybody is served."""

from __future__ import annotations

from array import array
from collections.abc import Hashable, Iterable
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from appliance.core.types import Priority
from appliance.engine.llama.parked import ParkedStates
from appliance.engine.llama.parked_state import ParkedState
from appliance.engine.llama.scheduler import Scheduler
from appliance.engine.llama.step import Fork, Limits, Operation, Park, Resume, Run, Sequence, Step, Truncate


def sequence(number: int, tokens: list[int], priority: Priority = Priority.DEFAULT, arrived: float = 0.0) -> Sequence:
    return Sequence(number, array("i", tokens), priority, arrived)


class States(ParkedStates):
    """Parked states whose native part is imagined."""

    def __init__(self, *, can_rewind: bool = True) -> None:
        super().__init__(ram_bytes=10_000, disk_bytes=10_000, can_rewind=can_rewind)
        self.number = 0

    def keep(self, tokens: Iterable[int], adapter: str = "", session: str = "") -> ParkedState:
        self.number += 1
        held = array("i", tokens)
        state = ParkedState(str(self.number), held, adapter, size=len(held), session=session)
        self.put(state, tick=self.number)
        return state

    def move_to_disk(self, state: ParkedState) -> None:
        self.drop(state.id)
        state.in_ram, state.on_disk = False, True
        self.restore(state, tick=self.number)

    def carry_out(self, operations: Iterable[Operation]) -> None:
        for each in operations:
            if isinstance(each, Park) and self.wants(each.tokens, each.adapter, len(each.tokens)):
                self.keep(each.tokens, each.adapter, each.session)

    @property
    def kept(self) -> list[ParkedState]:
        return list(self._states.values())


def scheduler(
    *,
    cells: int = 256,
    slots: int = 4,
    batch: int = 16,
    latency: float = 1.0,
    rewind: bool = True,
    states: States | None = None,
    running: int = 64,
    drafts: int = 0,
) -> Scheduler:
    limits = Limits(cells, slots, batch, latency, can_rewind=rewind, running=running, draft_tokens=drafts)
    return Scheduler(limits, states)


def work(subject: Scheduler, seconds: float = 0.01) -> Step:
    """Plan and decode one step, sampling token 7 for everyone whose turn it is."""
    step = subject.plan()
    subject.complete(step, seconds)
    for run in step.runs:
        if run.sample:
            subject.append(run.sequence, 7)
    subject.check_integrity()
    return step


def prefill(subject: Scheduler, newcomer: Sequence) -> Step:
    """Submit a sequence and work until its first token is sampled; returns the first step."""
    subject.submit(newcomer)
    first = work(subject)
    for _ in range(100):
        if len(newcomer.tokens) > newcomer.prompt_length:
            return first
        work(subject)
    raise AssertionError("the prompt was never read")


def test_a_prompt_longer_than_a_batch_is_read_in_chunks_and_sampled_once() -> None:
    subject = scheduler()
    subject.submit(sequence(1, list(range(40))))
    counts = [(run.count, run.sample) for _ in range(3) for run in work(subject).runs]
    assert counts == [(16, False), (16, False), (8, True)]


def test_prefill_is_cut_to_the_target_latency_while_someone_decodes() -> None:
    subject = scheduler(cells=1000, batch=512, latency=0.1)
    prefill(subject, sequence(1, [1, 2, 3]))
    for prompt_tokens in (10, 40, 20, 80) * 40:
        subject.cost.observe(decoding=1, prefill_tokens=prompt_tokens, seconds=0.04 + 0.002 * prompt_tokens)
    subject.submit(sequence(2, list(range(600))))
    step = subject.plan()
    assert step.decoding == 1
    assert 28 <= step.prefill_tokens <= 32  # (0.1 - 0.04) / 0.002
    subject.complete(step, 0.1)
    subject.cancel(step.runs[0].sequence)
    assert subject.plan().prefill_tokens == 512


def test_a_slow_machine_still_advances_prompts() -> None:
    subject = scheduler(latency=0.001)
    prefill(subject, sequence(1, [1, 2, 3]))
    subject.submit(sequence(2, list(range(30))))
    assert subject.plan().prefill_tokens == 8


def test_the_oldest_prompt_advances_beside_shorter_ones() -> None:
    subject = scheduler(cells=256)
    long, short = sequence(1, list(range(60))), sequence(2, list(range(100, 112)))
    subject.submit(long)
    subject.submit(short)
    assert {run.sequence.id: run.count for run in subject.plan().runs} == {1: 4, 2: 12}


def test_the_next_turn_reuses_its_own_past_in_place() -> None:
    subject = scheduler()
    first = sequence(1, list(range(20)))
    prefill(subject, first)
    subject.finish(first)
    second = sequence(2, [*range(20), 50, 51])
    step = prefill(subject, second)
    assert second.cached == 20
    assert step.operations == ()
    assert [run.count for run in step.runs] == [2]


def test_a_fully_cached_prompt_steps_back_one_token_to_have_logits() -> None:
    subject = scheduler()
    first = sequence(1, list(range(20)))
    prefill(subject, first)
    subject.finish(first)
    second = sequence(2, list(range(20)))
    step = prefill(subject, second)
    assert second.cached == 19
    assert step.operations == (Truncate(0, 19),)
    assert [(run.start, run.count) for run in step.runs] == [(19, 1)]


def test_a_prefix_of_a_running_sequence_is_forked_without_new_cells() -> None:
    subject = scheduler()
    prefill(subject, sequence(1, list(range(20))))
    used = subject.ledger.used
    other = sequence(2, [*range(18), 60])
    subject.submit(other)
    step = subject.plan()
    assert step.operations == (Fork(0, 1, 18),)
    assert other.cached == 18
    assert subject.ledger.used == used


def test_a_common_prompt_that_arrives_twice_at_once_is_read_once() -> None:
    subject = scheduler(cells=512, batch=64)
    shared = list(range(192))
    both = [sequence(1, [*shared, 300]), sequence(2, [*shared, 301])]
    for each in both:
        subject.submit(each)
    steps = [work(subject) for _ in range(6)]
    assert sum(step.prefill_tokens for step in steps) == 194
    assert both[1].cached == 192


def test_a_short_shared_part_is_kept_and_the_longer_past_of_another_conversation_too() -> None:
    subject = scheduler(cells=256, batch=64)
    first = sequence(1, list(range(40)))
    prefill(subject, first)
    subject.finish(first)
    prefill(subject, sequence(2, [*range(10), *range(100, 120)]))
    assert subject.ledger.length(0) == 40


def test_a_past_whose_beginning_is_shared_is_taken_over_where_both_have_no_room() -> None:
    states = States()
    subject = scheduler(cells=64, batch=64, slots=2, states=states)
    past = list(range(40))
    idle_past(subject, states, 1, past)
    newcomer = sequence(2, [*past[:10], *range(100, 130)])
    subject.submit(newcomer)
    step = subject.plan()
    assert step.operations == (Park(0, array("i", past), ""), Truncate(0, 10))
    assert (newcomer.slot, newcomer.cached) == (0, 10)
    subject.complete(step, 0.01)


def test_a_memory_that_cannot_rewind_reuses_only_a_whole_past() -> None:
    subject = scheduler(cells=256, batch=64, rewind=False)
    first = sequence(1, list(range(20)))
    prefill(subject, first)
    subject.finish(first)
    branch, same = sequence(2, [*range(10), 90, 91]), sequence(3, [*range(20), 70])
    prefill(subject, branch)
    prefill(subject, same)
    assert (branch.cached, same.cached) == (0, 20)


def test_idle_pasts_are_dropped_oldest_first_before_anyone_gives_way() -> None:
    subject = scheduler(cells=48, batch=64)
    for number in (1, 2):
        each = sequence(number, list(range(number * 100, number * 100 + 20)))
        prefill(subject, each)
        subject.finish(each)
    third = sequence(3, list(range(300, 325)))
    prefill(subject, third)
    assert subject.preemptions == 0
    assert [subject.ledger.length(slot) for slot in range(3)] == [0, 20, 25]


def test_the_last_in_order_gives_way_and_finishes_later_without_losing_a_token() -> None:
    subject = scheduler(cells=80, batch=64)
    old, young = sequence(1, list(range(20))), sequence(2, list(range(100, 120)), arrived=1.0)
    subject.submit(old)
    subject.submit(young)
    while subject.preemptions == 0:
        work(subject)
    written = list(young.tokens)
    assert young in subject.waiting
    while old.slot is not None and len(old.tokens) < 75:
        work(subject)
    subject.finish(old)
    work(subject)
    assert list(young.tokens[: len(written)]) == written
    assert len(young.tokens) == len(written) + 1


def test_what_is_computed_anew_after_giving_way_is_not_charged_again() -> None:
    subject = scheduler(cells=80, batch=64)
    old, young = sequence(1, list(range(20))), sequence(2, list(range(100, 120)), arrived=1.0)
    young.tenant = "young"
    subject.submit(old)
    subject.submit(young)
    while subject.preemptions == 0:
        work(subject)
    before, generated = subject.shares.counter("young"), young.generated
    assert before == 20 + 2 * (generated - 1), "all but the last token were evaluated"
    subject.finish(old)
    step = work(subject)
    assert [run.count for run in step.runs] == [20 + generated]
    assert subject.shares.counter("young") == before


def test_native_refusal_drops_idle_pasts_then_the_youngest_then_gives_up() -> None:
    subject = scheduler()
    finished = sequence(1, list(range(20)))
    prefill(subject, finished)
    subject.finish(finished)
    for number in (2, 3):
        subject.submit(sequence(number, [number] * 5, arrived=float(number)))
    subject.plan()
    subject.refuse()
    assert subject.ledger.length(0) == 0
    assert [each.id for each in subject.running] == [2, 3]
    subject.refuse()
    assert [each.id for each in subject.running] == [2]
    with pytest.raises(ValueError, match="does not fit"):
        subject.refuse()


def test_a_sequence_that_was_not_ended_in_time_is_an_error_and_no_endless_loop() -> None:
    subject = scheduler(cells=32, batch=64)
    endless = sequence(1, list(range(30)))
    prefill(subject, endless)
    for _ in range(2):
        work(subject)
    with pytest.raises(ValueError, match="does not fit"):
        work(subject)


def test_a_dropped_sequence_leaves_nothing_to_reuse() -> None:
    subject = scheduler()
    broken = sequence(1, list(range(20)))
    prefill(subject, broken)
    subject.drop(broken)
    again = sequence(2, list(range(20)))
    step = prefill(subject, again)
    assert again.cached == 0
    assert Truncate(0, 0) in step.operations


def test_a_large_prompt_is_not_overtaken_forever_by_small_ones() -> None:
    subject = scheduler(cells=64, batch=64)
    running = sequence(1, list(range(30)))
    prefill(subject, running)
    large, small = sequence(2, list(range(100, 150)), arrived=1.0), sequence(3, [200, 201], arrived=2.0)
    subject.submit(large)
    subject.submit(small)
    work(subject)
    assert subject.waiting == [large, small]
    subject.finish(running)
    assert large in [run.sequence for run in work(subject).runs]


@pytest.mark.parametrize(
    ("tier", "arrived", "first"),
    [(Priority.PRIORITY, 19.0, 2), (Priority.PRIORITY, 21.0, 1), (Priority.FLEX, 0.0, 1), (Priority.DEFAULT, 1.0, 1)],
)
def test_tiers_are_head_starts_so_that_waiting_long_enough_wins(tier: Priority, arrived: float, first: int) -> None:
    subject = scheduler(slots=1)
    subject.submit(sequence(1, [1, 2]))
    subject.submit(sequence(2, [3, 4], tier, arrived))
    assert subject.plan(now=arrived).runs[0].sequence.id == first


def idle_past(subject: Scheduler, states: States, number: int, tokens: list[int]) -> None:
    """Let a conversation run and end; its past stays in a slot."""
    each = sequence(number, tokens)
    states.carry_out(prefill(subject, each).operations)
    subject.finish(each)


def test_an_idle_past_is_parked_as_soon_as_somebody_else_runs() -> None:
    states = States()
    subject = scheduler(states=states, batch=64)
    idle_past(subject, states, 1, list(range(40)))
    newcomer = sequence(2, list(range(100, 120)))
    subject.submit(newcomer)
    step = subject.plan()
    assert step.operations == (Park(0, array("i", range(40)), ""), Truncate(0, 0))
    assert subject.ledger.used == 0
    subject.complete(step, 0.01)


def test_the_idle_past_of_a_forgotten_session_is_neither_reused_nor_parked() -> None:
    states = States()
    subject = scheduler(states=states, batch=64)
    for number, session in ((1, "gone"), (2, "stays")):
        each = sequence(number, list(range(100 * number, 100 * number + 40)))
        each.session = session
        states.carry_out(prefill(subject, each).operations)
        if number == 2:
            subject.finish(each)
    [running] = subject.running
    waiting = sequence(9, list(range(300, 340)))
    subject.submit(waiting)
    assert running.session == "gone"
    subject.forget({"gone"})
    assert (running.kept, waiting.kept) == (False, True)
    subject.cancel(waiting)
    subject.finish(running)
    subject.check_integrity()
    again = sequence(3, list(range(100, 140)))
    states.carry_out(prefill(subject, again).operations)
    assert again.cached == 0
    assert {each.session for each in states.kept} <= {"stays"}


def test_a_past_that_is_about_to_be_parked_is_not_once_its_session_is_forgotten() -> None:
    states = States()
    subject = scheduler(cells=128, states=states, batch=64, slots=2)
    one, two = sequence(1, list(range(40))), sequence(2, list(range(100, 116)))
    one.session = two.session = "gone"
    prefill(subject, one)
    prefill(subject, two)
    subject.refuse()  # one of them gives way, to be parked in the next step
    assert any(isinstance(each, Park) for each in subject.residents._operations)
    subject.forget({"gone"})
    assert not any(isinstance(each, Park) for each in subject.residents._operations)
    subject.check_integrity()


def test_a_past_that_a_running_sequence_shares_whole_is_left_alone() -> None:
    states = States()
    subject = scheduler(states=states, batch=64)
    idle_past(subject, states, 1, list(range(40)))
    prefill(subject, sequence(2, [*range(40), *range(100, 200)]))
    assert subject.ledger.length(0) == 140
    prefill(subject, sequence(3, [*range(40), *range(200, 240)]))
    assert states.kept == []


def test_a_parked_conversation_goes_on_from_its_state() -> None:
    states = States()
    subject = scheduler(states=states, batch=64)
    idle_past(subject, states, 1, list(range(40)))
    other = sequence(2, list(range(100, 120)))
    states.carry_out(prefill(subject, other).operations)
    subject.finish(other)
    again = sequence(3, [*range(40), 7, 8])
    step = prefill(subject, again)
    assert Resume(2, states.kept[0], 40) in step.operations
    assert again.cached == 40
    assert [run.count for run in step.runs] == [2]


def test_a_resumed_conversation_shares_with_a_slot_what_both_have() -> None:
    states = States()
    subject = scheduler(states=states, batch=64)
    states.keep(array("i", [*range(40), *range(50, 70)]))
    prefill(subject, sequence(1, [*range(40), 90]))
    used = subject.ledger.used
    again = sequence(2, [*range(40), *range(50, 70), 7, 8])
    subject.submit(again)
    step = subject.plan()
    assert step.operations == (Resume(1, states.kept[0], 60, 0, 40),)
    assert subject.ledger.used == used + 20


def test_a_state_on_disk_is_fetched_first_and_nobody_else_waits_for_it() -> None:
    states = States()
    subject = scheduler(states=states, batch=64)
    states.move_to_disk(states.keep(array("i", range(40))))
    waits, other = sequence(1, [*range(40), 7]), sequence(2, [3, 4, 5])
    subject.submit(waits)
    subject.submit(other)
    step = work(subject)
    assert step.fetches == (states.kept[0],)
    assert step.admitted == (other,)
    states.promote(states.kept[0].id)
    assert work(subject).admitted == (waits,)
    assert waits.cached == 40


def test_a_state_that_is_lost_while_it_is_fetched_means_to_begin_again() -> None:
    states = States()
    subject = scheduler(states=states, batch=64)
    states.move_to_disk(states.keep(array("i", range(40))))
    waits = sequence(1, [*range(40), 7])
    subject.submit(waits)
    assert subject.plan().runs == ()
    states.drop(states.kept[0].id)
    assert work(subject).admitted == (waits,)
    assert waits.cached == 0


def test_a_state_that_cannot_be_resumed_means_to_begin_again() -> None:
    states = States()
    subject = scheduler(states=states, batch=64)
    states.keep(array("i", range(40)))
    unlucky = sequence(1, [*range(40), 7])
    subject.submit(unlucky)
    assert [run.count for run in subject.plan().runs] == [1]
    subject.lost(unlucky)
    assert [run.count for run in work(subject).runs] == [41]
    assert unlucky.cached == 0


def test_a_state_with_more_cells_than_there_are_is_computed_rather_than_resumed() -> None:
    states = States()
    subject = scheduler(cells=64, states=states, batch=64)
    states.keep(array("i", range(60)))
    prefill(subject, sequence(1, list(range(100, 110))))
    short = sequence(2, [*range(20), 7])
    subject.submit(short)
    assert work(subject).admitted == (short,)
    assert short.cached == 0


def test_who_gives_way_is_parked_and_goes_on_without_reading_anything_again() -> None:
    states = States()
    subject = scheduler(cells=80, batch=64, states=states)
    old, young = sequence(1, list(range(20))), sequence(2, list(range(100, 120)), arrived=1.0)
    subject.submit(old)
    subject.submit(young)
    while subject.preemptions == 0:
        states.carry_out(work(subject).operations)
    states.carry_out(work(subject).operations)
    evaluated = len(young.tokens) - 1
    subject.finish(old)
    step = work(subject)
    assert step.admitted == (young,)
    assert [(run.start, run.count) for run in step.runs] == [(evaluated, 1)]


def test_a_memory_that_cannot_rewind_resumes_only_a_whole_state() -> None:
    states = States(can_rewind=False)
    subject = scheduler(states=states, batch=64, rewind=False)
    states.keep(array("i", range(40)))
    branch, whole = sequence(1, [*range(30), 90]), sequence(2, [*range(40), 70])
    prefill(subject, branch)
    prefill(subject, whole)
    assert (branch.cached, whole.cached) == (0, 40)


def test_states_of_another_adapter_are_not_reused() -> None:
    states = States()
    subject = scheduler(states=states, batch=64)
    idle_past(subject, states, 1, list(range(40)))
    states.keep(array("i", range(40)), "formal")
    styled = sequence(2, [*range(30), 7])
    styled.adapter = "other"
    prefill(subject, styled)
    assert styled.cached == 0


def test_flex_work_yields_its_slot_within_a_step_and_goes_on_later() -> None:
    states = States()
    subject = scheduler(batch=64, states=states, running=1)
    flex = sequence(1, list(range(40)), Priority.FLEX)
    prefill(subject, flex)
    urgent = sequence(2, list(range(100, 120)), arrived=1.0)
    subject.submit(urgent)
    step = subject.plan(now=1.0)
    states.carry_out(step.operations)
    assert step.admitted == (urgent,)
    assert subject.waiting == [flex]
    subject.complete(step, 0.01)
    subject.finish(urgent)
    again = subject.plan(now=2.0)
    assert [(run.sequence, run.start, run.count) for run in again.runs] == [(flex, 40, 1)]


def test_flex_work_that_reads_a_prefix_for_urgent_work_does_not_yield_to_it() -> None:
    subject = scheduler(cells=512, batch=16, states=States(), running=2)
    flex, other = sequence(1, list(range(200)), Priority.FLEX), sequence(2, list(range(300, 500)))
    subject.submit(flex)
    subject.submit(other)
    work(subject)
    waits = sequence(3, [*range(200), 7], arrived=1.0)
    subject.submit(waits)
    for _ in range(5):
        subject.complete(subject.plan(now=1.5), 0.01)
    assert flex in subject.running


@pytest.mark.parametrize("tokens", [0, 64, 65])
def test_what_cannot_fit_is_refused_at_once(tokens: int) -> None:
    subject = scheduler(cells=64)
    with pytest.raises(ValueError, match="do not fit"):
        subject.submit(sequence(1, [1] * tokens))
    assert subject.idle


QUOTED = [*range(100, 120), *range(100, 110)]
"""A prompt that begins to repeat itself."""


def guessing(*, beside: int = 0, **changes: Any) -> tuple[Scheduler, Sequence]:
    """Return a scheduler in which a sequence has just begun to quote its prompt, beside others that do not."""
    subject = scheduler(**{"batch": 64, "drafts": 12, **changes})
    subject.cost.observe(decoding=1, prefill_tokens=0, seconds=0.01)
    quoting = sequence(1, QUOTED)
    subject.submit(quoting)
    for number in range(beside):
        subject.submit(sequence(2 + number, [200 + number], arrived=1.0))
    subject.complete(subject.plan(), 0.03)
    for each in subject.running:
        subject.append(each, 110)
    subject.cost.observe(decoding=1 + beside, prefill_tokens=0, seconds=0.01 * (1 + beside))
    return subject, quoting


def test_what_followed_earlier_is_checked_beside_the_token_that_must_be_computed() -> None:
    subject, quoting = guessing()
    step = subject.plan()
    [run] = step.runs
    assert run.drafts == (111, 112, 113)  # as many as the account of a new sequence covers
    assert (run.start, run.count, run.sample) == (30, 4, True)
    assert (step.decoding, step.prefill_tokens, step.draft_tokens) == (1, 0, 3)
    used = subject.ledger.used
    subject.complete(step, 0.02)
    assert subject.ledger.used == used + 1
    assert subject.confirm(run, 2) == Truncate(0, 33)
    subject.append(quoting, 7)
    subject.check_integrity()
    assert list(quoting.tokens[30:]) == [110, 111, 112, 7]
    assert quoting.evaluated == 33
    assert [(each.start, each.count) for each in subject.plan().runs] == [(33, 1)]


def test_an_accepted_guess_counts_as_generated_for_the_tenant_and_a_wrong_one_does_not() -> None:
    subject, _ = guessing()
    step = subject.plan()
    charges: list[int] = []
    subject.shares.charge = lambda _, generated_tokens, weight: charges.append(generated_tokens)  # type: ignore[method-assign, assignment, misc]
    subject.complete(step, 0.02)
    subject.confirm(step.runs[0], 2)
    assert charges == [1, 2]


def test_nothing_is_guessed_before_a_decode_step_was_measured() -> None:
    subject = scheduler(batch=64, drafts=12)
    quoting = sequence(1, QUOTED)
    subject.submit(quoting)
    subject.complete(subject.plan(), 0.03)
    subject.append(quoting, 110)
    assert subject.plan().draft_tokens == 0


def test_nothing_is_guessed_while_a_prompt_is_read() -> None:
    subject, _ = guessing()
    subject.submit(sequence(2, list(range(300, 340))))
    step = subject.plan()
    assert step.prefill_tokens == 40
    assert step.draft_tokens == 0


@pytest.mark.parametrize(("decoding", "guesses"), [(4, True), (5, False)])
def test_nothing_is_guessed_beside_many(decoding: int, guesses: bool) -> None:
    subject, _ = guessing(beside=decoding - 1, slots=8)
    step = subject.plan()
    assert step.decoding == decoding
    assert (step.draft_tokens > 0) == guesses


def test_nothing_is_guessed_where_memory_cannot_rewind_or_it_is_turned_off() -> None:
    for changes in ({"rewind": False}, {"drafts": 0}):
        subject, quoting = guessing(**changes)
        assert subject.plan().draft_tokens == 0
        assert quoting.drafter is None


def test_guesses_take_only_cells_that_are_free_and_never_send_anyone_back() -> None:
    subject, _ = guessing(cells=32)
    assert subject.plan().draft_tokens == 1
    subject, _ = guessing(cells=31)
    assert subject.plan().draft_tokens == 0
    assert subject.preemptions == 0


def test_guesses_are_given_up_first_when_native_memory_has_no_room() -> None:
    subject, quoting = guessing(beside=1)
    assert subject.plan().draft_tokens > 0
    subject.refuse()
    step = subject.plan()
    assert step.draft_tokens == 0
    assert len(subject.running) == 2
    subject.complete(step, 0.01)
    for run in step.runs:
        subject.append(run.sequence, 111 if run.sequence is quoting else 300)
    assert subject.plan().draft_tokens > 0


def test_guesses_do_not_make_a_step_longer_than_streams_may_wait() -> None:
    subject, _ = guessing(latency=0.01 + 2.5 * 0.003)
    assert subject.plan().draft_tokens == 2


def test_no_guess_goes_beyond_the_end_of_the_answer() -> None:
    subject, quoting = guessing()
    quoting.token_limit = len(quoting.tokens) + 2
    assert subject.plan().draft_tokens == 1


def test_a_batch_is_of_one_adapter_and_the_adapters_take_turns() -> None:
    subject = scheduler(latency=0.001, batch=64)
    subject.cost.observe(decoding=1, prefill_tokens=0, seconds=0.01)
    for number, adapter in enumerate(["", "a", "", "b"]):
        each = sequence(number, [number, number])
        each.adapter = adapter
        subject.submit(each)
    served = [
        (step.adapter, sorted(run.sequence.id for run in step.runs)) for step in (work(subject) for _ in range(6))
    ]
    assert served == [("", [0, 2]), ("a", [1]), ("b", [3])] * 2


def test_a_prompt_under_one_adapter_is_cut_while_another_decodes() -> None:
    subject = scheduler(cells=1000, batch=512, latency=0.1)
    prefill(subject, sequence(1, [1, 2, 3]))
    long = sequence(2, list(range(600)))
    long.adapter = "a"
    subject.submit(long)
    subject.turns.served("", 1.0, 1.0)
    step = subject.plan()
    assert step.adapter == "a"
    within = subject.cost.prefill_tokens_within(0.05, decoding=0, cells=subject.ledger.used)
    assert step.prefill_tokens == max(8, within) < 512  # half of the target is each one's share
    assert step.decoding == 0


def test_a_step_that_changes_the_adapter_does_not_count_as_the_cost_of_its_tokens() -> None:
    subject = scheduler(latency=0.001)
    for number, adapter in ((1, ""), (2, "a")):
        each = sequence(number, [number])
        each.adapter = adapter
        prefill(subject, each)
    for _ in range(20):
        work(subject, seconds=0.01)
    usual = subject.cost.decode_s(1)
    work(subject, seconds=5.0)
    assert subject.cost.decode_s(1) == usual
    assert subject.turns.switch_s >= 0.9


class NativeMemory:
    """What llama.cpp would hold: for each slot the token at each position and its adapter. Cells are shared objects."""

    def __init__(self, slots: int, cells: int) -> None:
        self.slots: list[list[list[Hashable]]] = [[] for _ in range(slots)]
        self.capacity = cells

    def apply(self, step: Step) -> None:
        for operation in step.operations:
            match operation:
                case Truncate(slot, length):
                    del self.slots[slot][length:]
                case Fork(source, target, length):
                    assert self.slots[target] == []
                    self.slots[target] = self.slots[source][:length]
                case Park(slot, tokens, adapter):
                    parked = [[token, adapter] for token in tokens]
                    assert self.slots[slot] == parked, "what is parked is what is held"
                case Resume(slot, state, length, sharer, shared):
                    assert self.slots[slot] == []
                    assert self.cells + len(state.tokens) <= self.capacity, "a state needs all its cells for a moment"
                    self.slots[slot] = [[token, state.space] for token in state.tokens[:length]]
                    if sharer is not None:
                        self.slots[slot][:shared] = self.slots[sharer][:shared]
        for run in step.runs:
            held = self.slots[run.sequence.slot or 0]
            assert len(held) == run.start, "positions must be consecutive"
            known = run.sequence.tokens[run.start : run.start + run.count - len(run.drafts)]
            held += [[token, step.adapter] for token in (*known, *run.drafts)]
            assert self.cells <= self.capacity, "there are no more cells"

    @property
    def cells(self) -> int:
        return len({id(cell) for slot in self.slots for cell in slot})


class SchedulerMachine(RuleBasedStateMachine):
    """Random traffic on few cells, against a model of native memory."""

    cells = 48
    latency = 0.05
    drafts = 0
    period = 100
    """Tokens after which a prompt repeats itself."""

    @staticmethod
    def shelf() -> States | None:
        return None

    def __init__(self) -> None:
        super().__init__()
        self.states = self.shelf()
        self.subject = scheduler(
            cells=self.cells, slots=4, batch=16, latency=self.latency, states=self.states, running=3, drafts=self.drafts
        )
        self.memory = NativeMemory(4, self.cells)
        self.alive: list[Sequence] = []
        self.session = "session"
        self.number = 0
        self.now = 0.0

    @rule(
        family=st.integers(0, 2),
        length=st.integers(1, 40),
        tail=st.lists(st.integers(0, 9), max_size=6),
        tier=st.sampled_from(Priority),
        whose=st.tuples(st.sampled_from("ab"), st.sampled_from(["", "styled", "terse"])),
    )
    def submit(self, family: int, length: int, tail: list[int], tier: Priority, whose: tuple[str, str]) -> None:
        self.number += 1
        tokens = [family * 100 + index % self.period for index in range(length)] + tail
        new = sequence(self.number, tokens, tier, self.now)
        new.tenant, new.adapter = whose
        new.token_limit = 47
        new.session = self.session if self.number % 2 else ""
        self.subject.submit(new)
        self.alive.append(new)

    @precondition(lambda self: self.alive)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        gone = data.draw(st.sampled_from(self.alive))
        self.subject.cancel(gone)
        self.alive.remove(gone)
        self.subject.cancel(gone)

    def carry_out(self, step: Step) -> None:
        self.memory.apply(step)
        if self.states is not None:
            self.states.carry_out(step.operations)

    def sampled(self, sequence: Sequence, token: int) -> int:
        return token

    def confirm(self, run: Run, accepted: int) -> None:
        if run.drafts:
            self.memory.apply(Step((self.subject.confirm(run, min(accepted, len(run.drafts))),), (), ()))

    @rule(seconds=st.floats(0.001, 0.2), token=st.integers(0, 2), accepted=st.integers(0, 12))
    def step(self, seconds: float, token: int, accepted: int) -> None:
        step = self.subject.plan(self.now)
        self.now += seconds
        self.carry_out(step)
        self.subject.complete(step, seconds)
        assert step.runs or not self.alive, "there is work, but nothing runs"
        assert sum(run.count for run in step.runs) <= 16
        assert {run.sequence.adapter for run in step.runs} <= {step.adapter}, "adapters are mixed in a batch"
        for run in step.runs:
            if run.sample:
                self.confirm(run, accepted)
                self.subject.append(run.sequence, self.sampled(run.sequence, token))
                if len(run.sequence.tokens) >= 47:
                    self.subject.finish(run.sequence)
                    self.alive.remove(run.sequence)

    @precondition(lambda self: len(self.subject.running) > 1)
    @rule()
    def native_refusal(self) -> None:
        self.carry_out(Step(self.subject.plan(self.now).operations, (), ()))
        if len(self.subject.running) > 1:
            self.subject.refuse()

    @rule()
    def forget(self) -> None:
        """Forget the session of those who came since the last time; its name does not come again."""
        session, self.session = self.session, f"session {self.number}"
        self.subject.forget({session})
        if self.states is not None:
            self.states.forget({session})

    @invariant()
    def nothing_outlives_a_forgotten_session(self) -> None:
        known = {"", self.session}
        residents = self.subject.residents
        assert {slot.session for slot in residents._slots if slot.owner is None and slot.tokens} <= known
        assert {each.session for each in residents._operations if isinstance(each, Park)} <= known
        assert self.states is None or {each.session for each in self.states.kept} <= known
        for each in self.alive:
            assert each.kept == (each.session in known)

    @rule()
    def start_over(self) -> None:
        self.subject.start_over()
        self.memory.slots = [[] for _ in self.memory.slots]
        assert self.subject.ledger.used == 0

    @invariant()
    def books_are_true(self) -> None:
        self.subject.check_integrity()
        assert self.subject.ledger.used <= self.cells
        assert set(self.alive) == set(self.subject.waiting) | set(self.subject.running)

    @invariant()
    def every_slot_holds_what_the_scheduler_believes(self) -> None:
        pending = {each.target if isinstance(each, Fork) else each.slot for each in self.subject.residents._operations}
        for each in self.subject.running:
            assert each.slot is not None
            if each.slot not in pending:
                held = [tuple(cell) for cell in self.memory.slots[each.slot]]
                assert held == [(token, each.adapter) for token in each.tokens[: each.evaluated]]
        if not pending:
            assert self.memory.cells == self.subject.ledger.used

    def teardown(self) -> None:
        """Everybody left is served to the end within a bounded number of steps."""
        for _ in range(200):
            if not self.alive:
                break
            self.now += 1.0
            step = self.subject.plan(self.now)
            self.carry_out(step)
            self.subject.complete(step, 0.01)
            for run in step.runs:
                if run.sample:
                    self.confirm(run, accepted=2)
                    self.subject.finish(run.sequence)
                    self.alive.remove(run.sequence)
        assert not self.alive, "somebody was never served"


class ParkingMachine(SchedulerMachine):
    """The same, and what gives way is parked; now and then a state is lost, or cannot be resumed."""

    @staticmethod
    def shelf() -> States | None:
        return States()

    @precondition(lambda self: self.states.kept)
    @rule(data=st.data())
    def lose(self, data: st.DataObject) -> None:
        assert self.states is not None
        self.states.drop(data.draw(st.sampled_from(self.states.kept)).id)

    @rule()
    def fail_to_resume(self) -> None:
        step = self.subject.plan(self.now)
        failed = {each.slot for each in step.operations if isinstance(each, Resume)}
        self.carry_out(Step(step.operations, (), ()))
        for slot in failed:
            self.memory.slots[slot] = []
        for each in self.subject.running:
            if each.slot in failed:
                self.subject.lost(each)


class SpeculationMachine(ParkingMachine):
    """The same, and what may follow is guessed; any number of the guesses is right."""

    cells = 72
    latency = 10.0
    drafts = 12
    period = 4

    def __init__(self) -> None:
        super().__init__()
        self.subject.cost.observe(decoding=1, prefill_tokens=0, seconds=0.1)
        for _ in range(60):  # so cheap that almost any guess is worth being checked
            self.subject.cost.observe(decoding=1, prefill_tokens=0, draft_tokens=1, seconds=0.1)

    def sampled(self, sequence: Sequence, token: int) -> int:
        """Return mostly what was guessed, so that texts repeat themselves."""
        return sequence.drafter.guess[0] if token and sequence.drafter and sequence.drafter.guess else token

    @precondition(lambda self: self.alive)
    @rule(accepted=st.lists(st.integers(0, 12), min_size=2, max_size=8), token=st.integers(0, 2))
    def many_steps(self, accepted: list[int], token: int) -> None:
        for each in accepted:
            self.step(0.1, token, each)
            self.books_are_true()


TestSchedulerMachine = SchedulerMachine.TestCase
TestSchedulerMachine.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
TestParkingMachine = ParkingMachine.TestCase
TestParkingMachine.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestSpeculationMachine = SpeculationMachine.TestCase
TestSpeculationMachine.settings = settings(max_examples=100, stateful_step_count=40, deadline=None)
