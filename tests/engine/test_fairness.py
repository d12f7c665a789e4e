"""Fair sharing, in a toy server: shares follow weights, tiers and age pass nobody's share, and nothing starves."""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from appliance.core.types import Priority
from appliance.engine.llama.fairness import FairShare, aged, rank
from appliance.engine.llama.step import Sequence

PRIORITY, DEFAULT, FLEX = Priority
TIERS = st.sampled_from(Priority)


class Server:
    """A server in which every running sequence gains one token a step, and a step takes `step_s` seconds."""

    def __init__(self, slots: int = 2, step_s: float = 1.0) -> None:
        self.fair = FairShare()
        self.slots = slots
        self.step_s = step_s
        self.now = 0.0
        self.waiting: list[Sequence] = []
        self.running: list[Sequence] = []
        self.lengths: dict[int, int] = {}
        self.admitted: list[Sequence] = []
        self.finished: list[Sequence] = []
        self.parked: Counter[int] = Counter()
        self.service: Counter[str] = Counter()
        self.numbers = 0

    def ask(
        self,
        tenant: str = "",
        tier: Priority = DEFAULT,
        *,
        length: int = 5,
        prompt: int = 10,
        weight: float = 1.0,
        within_s: float | None = None,
    ) -> Sequence:
        self.numbers += 1
        deadline = None if within_s is None else self.now + within_s
        new = Sequence(
            *(self.numbers, array("i", [0] * prompt), tier, self.now), tenant=tenant, weight=weight, deadline=deadline
        )
        self.lengths[new.id] = length
        self.fair.arrive(new)
        self.waiting.append(new)
        return new

    def order(self) -> list[Sequence]:
        return self.fair.order(self.waiting, now=self.now)

    def _admit(self) -> None:
        for each in self.order()[: self.slots - len(self.running)]:
            self.waiting.remove(each)
            self.fair.admit(each, now=self.now)
            self.service[each.tenant] += each.pending
            each.evaluated = len(each.tokens)
            self.running.append(each)
            self.admitted.append(each)

    def step(self) -> None:
        self._admit()
        while len(self.running) == self.slots:
            giving_way = self.fair.yields(self.running, self.waiting, now=self.now)
            if giving_way is None:
                break
            self.running.remove(giving_way)
            self.waiting.append(giving_way)
            self.fair.park(giving_way)
            self.parked[giving_way.id] += 1
            self._admit()
            assert giving_way not in self.running, "parked for nothing"
        assert len(self.running) == self.slots or not self.waiting, "a slot is free though someone waits"
        for each in list(self.running):
            self.lengths[each.id] -= 1
            self.service[each.tenant] += 2
            self.fair.charge(each.tenant, generated_tokens=1, weight=each.weight)
            if self.lengths[each.id] <= 0:
                self.running.remove(each)
                self.finished.append(each)
                self.fair.leave(each)
        self.now += self.step_s
        self.fair.check_integrity(self.waiting, self.running)

    def run(self, steps: int, before_each: Callable[[], object] = lambda: None) -> None:
        for _ in range(steps):
            before_each()
            self.step()

    def keep_waiting(self, tenant: str, *, count: int = 3) -> None:
        """Let a tenant have so many default requests waiting."""
        for _ in range(count - sum(each.tenant == tenant and each.priority == DEFAULT for each in self.waiting)):
            self.ask(tenant)

    def keep_all_waiting(self, *tenants: str) -> None:
        for tenant in tenants:
            self.keep_waiting(tenant)

    def run_until(self, true: Callable[[], bool], before_each: Callable[[], object] = lambda: None) -> None:
        for _ in range(2000):
            if true():
                return
            before_each()
            self.step()
        raise AssertionError("it never came to that")


# Shares


@settings(deadline=None, max_examples=40)
@given(
    st.lists(st.floats(0.25, 4.0), min_size=2, max_size=4),
    st.integers(1, 4),
    st.sampled_from([PRIORITY, DEFAULT, FLEX, None]),
    st.randoms(use_true_random=False),
)
def test_tenants_that_always_want_more_are_served_in_proportion_to_their_weights(
    weights: list[float], slots: int, tier: Priority | None, random: object
) -> None:
    server = Server(slots)
    draw = random.randint  # type: ignore[attr-defined]

    def keep_all_waiting() -> None:
        for number, weight in enumerate(weights):
            while sum(each.tenant == f"key_{number}" for each in server.waiting) <= slots:
                server.ask(
                    f"key_{number}",
                    DEFAULT if tier is None else tier,
                    weight=weight,
                    length=draw(1, 12),
                    prompt=draw(1, 50),
                )

    allowed = (50 + slots * 12 * 2) / min(weights)
    for _ in range(400):
        keep_all_waiting()
        server.step()
        counters = [server.fair.counter(f"key_{number}") for number in range(len(weights))]
        assert max(counters) - min(counters) <= allowed * (1 + 1e-9)  # the counters are sums of rounded quotients
    for number, weight in enumerate(weights):
        due = sum(server.service.values()) * weight / sum(weights)
        assert abs(server.service[f"key_{number}"] - due) <= 2 * allowed * max(weights)


def test_idling_saves_no_credit() -> None:
    server = Server(slots=1)
    server.run(500, lambda: server.keep_waiting("busy"))
    before = len(server.admitted)
    server.run(60, lambda: server.keep_all_waiting("busy", "back"))
    counts = Counter(each.tenant for each in server.admitted[before:])
    assert abs(counts["busy"] - counts["back"]) <= 1


def test_what_was_used_while_nobody_else_wanted_it_is_not_held_against_anyone() -> None:
    server = Server(slots=2)
    long = server.ask("slow", length=10_000, prompt=1)
    server.run(300, lambda: server.keep_waiting("busy", count=1))
    before = len(server.admitted)
    server.run(60, lambda: server.keep_all_waiting("busy", "slow"))
    counts = Counter(each.tenant for each in server.admitted[before:])
    assert long in server.running
    assert counts["busy"] >= 3


def turns(server: Server, *tenants: str, each: int = 5) -> Counter[str]:
    """Let every tenant ask for more and tell whose requests come first, half of them in all."""
    for tenant in tenants:
        for _ in range(each):
            server.ask(tenant)
    return Counter(one.tenant for one in server.order()[: each * len(tenants) // 2])


def test_who_comes_while_another_only_runs_starts_level_with_him() -> None:
    server = Server(slots=1)
    server.ask("busy", length=500)
    server.run(100)
    counts = turns(server, "back", "busy")
    assert abs(counts["back"] - counts["busy"]) <= 1


def test_a_slow_stream_that_goes_on_does_not_lower_where_newcomers_start() -> None:
    server = Server(slots=2)
    server.ask("slow", length=10_000, prompt=1)
    server.run(200, lambda: server.ask("busy", length=1))
    server.run_until(lambda: not server.waiting and len(server.running) == 1)
    counts = turns(server, "back", "busy")
    assert abs(counts["back"] - counts["busy"]) <= 1


def test_those_whom_their_tier_keeps_waiting_do_not_lower_where_newcomers_of_a_better_one_start() -> None:
    server = Server(slots=1)
    server.run(3, lambda: server.keep_waiting("steady"))
    server.ask("patient", FLEX)
    server.run(50, lambda: server.keep_waiting("steady"))
    before = len(server.admitted)
    server.run(40, lambda: server.keep_all_waiting("steady", "back"))
    counts = Counter(each.tenant for each in server.admitted[before:])
    assert abs(counts["back"] - counts["steady"]) <= 1


def test_who_comes_to_an_empty_tier_starts_level_with_those_who_wait_below() -> None:
    server = Server(slots=1)
    for _ in range(3):
        server.ask("light", PRIORITY, weight=0.01, length=1)
    steady = [server.ask("steady"), server.ask("steady")]
    server.run(3)
    first = server.ask("back", PRIORITY, length=1)
    server.step()
    assert first in server.finished
    back = server.ask("back")
    assert server.order() == [steady[0], steady[1], back]
    assert server.fair.counter("back") < server.fair.counter("light") / 10


def test_giving_way_costs_nothing() -> None:
    server = Server(slots=1)
    parked = server.ask("a", prompt=100)
    server.fair.admit(parked, now=0.0)
    server.waiting.clear()
    other = server.ask("b", prompt=100)
    server.fair.charge("b", prompt_tokens=101)
    server.fair.park(parked)
    server.waiting.append(parked)
    second = server.ask("a")
    assert server.order() == [parked, second, other], "what was computed once is not claimed again"
    server.fair.admit(parked, now=0.0)
    assert server.fair.counter("a") == 100


def test_leaving_and_coming_back_pays_no_debt() -> None:
    server = Server(slots=1)
    server.ask("greedy", prompt=1000, length=1)
    server.run(5, lambda: server.keep_waiting("steady"))
    back, modest = server.ask("greedy"), server.ask("modest")
    assert [each.tenant for each in server.order()].index("modest") <= 1
    assert server.order()[-1] is back
    assert modest in server.waiting


def test_when_nothing_is_left_to_do_all_is_forgiven() -> None:
    server = Server(slots=1)
    server.ask("greedy", prompt=1000)
    server.run_until(lambda: not server.running and bool(server.finished))
    assert server.fair.counter("greedy") == 0.0
    again, other = server.ask("greedy"), server.ask("other")
    assert server.order() == [again, other]


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 300), TIERS, TIERS)
def test_a_hundred_requests_do_not_delay_the_single_one_of_another_tenant(
    elapsed: int, flood: Priority, single: Priority
) -> None:
    server = Server(slots=1)
    for _ in range(100):
        server.ask("flood", flood)
    server.run(elapsed)
    only = server.ask("single", min(single, flood))
    assert server.order().index(only) <= 1


def test_several_free_slots_are_shared_out_fairly_at_once() -> None:
    server = Server(slots=8)
    for _ in range(100):
        server.ask("many")
    for _ in range(4):
        server.ask("few")
    server.step()
    assert Counter(each.tenant for each in server.admitted) == {"many": 4, "few": 4}


# Tiers and age


@given(st.lists(st.tuples(TIERS, st.floats(0, 300), st.integers(1, 500)), max_size=30), st.floats(0, 200))
def test_one_tenants_requests_are_ordered_by_arrival_less_their_head_start(
    requests: list[tuple[Priority, float, int]], later: float
) -> None:
    server = Server()
    for tier, arrived, prompt in sorted(requests, key=lambda each: each[1]):
        server.now = arrived
        server.ask("", tier, prompt=prompt)
    server.now += later
    assert server.order() == sorted(server.waiting, key=lambda each: each.order)


def test_a_better_tier_goes_first_however_much_its_tenant_had() -> None:
    server = Server(slots=1)
    server.ask("greedy", prompt=5000, length=50)
    server.run(1)
    flex, default, first = server.ask("b", FLEX), server.ask("a", DEFAULT), server.ask("greedy", PRIORITY)
    assert server.order() == [first, default, flex]


@pytest.mark.parametrize(
    ("tier", "waited", "counts_as"),
    [
        (FLEX, 59.9, FLEX),
        (FLEX, 60.0, DEFAULT),
        (FLEX, 79.9, DEFAULT),
        (FLEX, 80.0, PRIORITY),
        (DEFAULT, 19.9, DEFAULT),
        (DEFAULT, 20.0, PRIORITY),
        (PRIORITY, 0.0, PRIORITY),
        (PRIORITY, -1.0, PRIORITY),
    ],
)
def test_waiting_lifts_a_request(tier: Priority, waited: float, counts_as: Priority) -> None:
    assert aged(Sequence(1, array("i", [1]), tier, 1000.0), 1000.0 + waited) == counts_as


@settings(deadline=None, max_examples=25)
@given(st.integers(1, 4), st.integers(1, 3), st.integers(1, 8))
def test_a_flex_request_behind_endless_priority_work_is_next_after_eighty_seconds(
    tenants: int, slots: int, length: int
) -> None:
    server = Server(slots)

    def endless() -> None:
        for number in range(tenants):
            while sum(each.tenant == f"key_{number}" for each in server.waiting) < 3:
                server.ask(f"key_{number}", PRIORITY, length=length)

    server.run(7, endless)
    flex = server.ask("patient", FLEX)
    server.run_until(lambda: flex in server.running or flex in server.finished, endless)
    # A slot is free `length` steps after the age is reached at the latest; the last step of the loop has begun.
    assert server.now - flex.arrived <= 80 + length + 1
    assert server.now - flex.arrived >= 80


def test_a_flex_request_behind_priority_work_of_its_own_tenant_waits_for_those_of_the_next_eighty_seconds() -> None:
    server = Server(slots=1)
    flex = server.ask("", FLEX)
    server.run_until(lambda: flex in server.running, lambda: server.ask("", PRIORITY, length=2))
    overtaking = [each for each in server.admitted if each is not flex]
    assert max(each.arrived for each in overtaking) <= 80


def test_flex_requests_that_come_of_age_together_take_no_more_than_their_tenants_share() -> None:
    server = Server(slots=1)
    server.run(3, lambda: server.keep_waiting("steady"))
    for _ in range(100):
        server.ask("flood", FLEX)
    server.run(58, lambda: server.keep_waiting("steady"))
    assert all(each.tenant == "steady" for each in server.admitted)
    before = len(server.admitted)
    server.run(200, lambda: server.keep_waiting("steady"))
    counts = Counter(each.tenant for each in server.admitted[before:])
    assert abs(counts["flood"] - counts["steady"]) <= 2


def test_a_flex_request_that_waits_saves_no_credit_for_default_ones() -> None:
    server = Server(slots=1)
    server.run(3, lambda: server.keep_waiting("steady"))
    server.ask("sly", FLEX)
    server.run(50, lambda: server.keep_waiting("steady"))
    before = len(server.admitted)
    server.run(60, lambda: server.keep_all_waiting("steady", "sly"))
    counts = Counter(each.tenant for each in server.admitted[before:])
    assert abs(counts["sly"] - counts["steady"]) <= 1


def test_age_does_not_let_a_flood_pass_a_modest_tenant_of_its_own_tier() -> None:
    server = Server(slots=1)
    for _ in range(60):
        server.ask("flood", DEFAULT)
    server.run(100)
    fresh = server.ask("modest", DEFAULT)
    assert aged(server.waiting[0], server.now) is PRIORITY
    assert server.order().index(fresh) <= 1


# Deadlines


def test_an_earlier_deadline_goes_first_only_where_all_else_is_equal() -> None:
    server = Server()
    later, sooner = server.ask("a", within_s=60), server.ask("a", within_s=30)
    assert server.order() == [later, sooner], "the first one's prompt is already claimed"
    for each in (later, sooner):
        server.fair.leave(each)
    server.waiting.clear()
    later, sooner, never = server.ask("a", within_s=60), server.ask("b", within_s=30), server.ask("c")
    assert server.order() == [sooner, later, never]


def test_a_short_time_limit_buys_no_place() -> None:
    server = Server()
    patient = server.ask("a", within_s=600)
    server.now = 1.0
    hurried = server.ask("b", within_s=5)
    assert server.order() == [patient, hurried]


def test_a_request_that_misses_its_deadline_anyway_goes_behind_all_others_and_is_still_tried() -> None:
    server = Server()
    doomed = server.ask("a", PRIORITY, prompt=100, within_s=0.9)
    flex = server.ask("b", FLEX, prompt=100, within_s=1.1)
    own = server.ask("a", FLEX)
    assert server.fair.order(server.waiting, now=0.0, prefill_token_s=0.01) == [flex, own, doomed]
    assert server.order()[0] is doomed
    server.now = 0.9
    assert server.order()[-1] is doomed


# Giving way


def test_flex_gives_way_first_then_the_tenant_that_had_most_then_the_latest() -> None:
    server = Server(slots=6)
    greedy = [server.ask("greedy", prompt=100), server.ask("greedy", prompt=100)]
    modest, urgent, flex = server.ask("modest"), server.ask("greedy", PRIORITY), server.ask("modest", FLEX)
    server.step()
    running = list(server.running)
    order = []
    while running:
        order.append(server.fair.victim(running, now=server.now))
        running.remove(order[-1])
    assert order == [flex, greedy[1], greedy[0], modest, urgent]


def test_one_that_has_just_come_back_is_spared_while_another_of_its_tier_can_give_way() -> None:
    server = Server(slots=2)
    first, second = server.ask("a", length=50), server.ask("b", length=50, prompt=500)
    server.step()
    assert server.fair.victim(server.running, now=server.now) is second
    server.fair.park(second)
    server.fair.admit(second, now=server.now)
    assert server.fair.victim(server.running, now=server.now) is first
    assert server.fair.victim(server.running, now=server.now + 1) is second


@pytest.mark.parametrize("urgent", [PRIORITY, DEFAULT])
def test_flex_work_yields_at_once_and_is_finished_later(urgent: Priority) -> None:
    server = Server(slots=1)
    flex = server.ask("a", FLEX, length=10)
    server.step()
    other = server.ask("b", urgent, length=3)
    server.step()
    assert server.running == [other]
    server.run_until(lambda: flex in server.finished)
    assert server.parked == {flex.id: 1}


def test_no_one_yields_to_flex_work_and_default_work_yields_to_none() -> None:
    server = Server(slots=1)
    server.ask("a", DEFAULT, length=10)
    server.step()
    server.ask("b", PRIORITY)
    assert server.fair.yields(server.running, server.waiting, now=server.now) is None
    server = Server(slots=1)
    server.ask("a", FLEX, length=200)
    server.step()
    server.ask("b", FLEX)
    server.run(90)
    assert not server.parked


def test_nobody_is_parked_whose_slot_would_go_to_other_flex_work() -> None:
    server = Server(slots=1)
    server.now = 100.0
    young = server.ask("c", FLEX, length=50)
    server.step()
    aged_flex, late = server.ask("d", FLEX), server.ask("a", DEFAULT, prompt=5000)
    aged_flex.arrived -= 70
    server.fair.charge("a", prompt_tokens=5000)
    assert server.order() == [aged_flex, late]
    assert server.fair.yields(server.running, server.waiting, now=server.now) is None
    assert server.running == [young]


def test_short_default_requests_do_not_make_flex_work_thrash() -> None:
    server = Server(slots=1, step_s=0.1)
    flex = server.ask("a", FLEX, length=120)

    def a_request_every_second() -> None:
        if server.numbers - 1 < server.now:
            server.ask("b", DEFAULT, length=3, prompt=1)

    server.run_until(lambda: flex in server.finished, a_request_every_second)
    assert 1 <= server.parked[flex.id] <= 6


@settings(deadline=None, max_examples=25)
@given(st.floats(0.05, 3.0), st.integers(1, 20), st.integers(1, 2))
def test_flex_work_yields_six_times_at_most_and_finishes_beside_endless_default_work(
    step_s: float, length: int, slots: int
) -> None:
    server = Server(slots, step_s)
    flex = server.ask("a", FLEX, length=60)

    def endless() -> None:
        if len(server.waiting) < 3:
            server.ask("b", DEFAULT, length=length)

    server.run_until(lambda: flex in server.finished, endless)
    assert server.parked[flex.id] <= 6
    assert server.now <= 80 + (60 + slots * length + 2) * step_s + 64


def test_an_aged_flex_sequence_keeps_its_slot() -> None:
    server = Server(slots=1)
    server.ask("a", FLEX, length=200)
    server.run(61)
    server.ask("b", PRIORITY)
    server.step()
    assert not server.parked


def test_a_priority_inversion_attempt_fails() -> None:
    """Flex sequences that compute what urgent ones wait for run like those; a third tier cannot squeeze in between."""
    server = Server(slots=2)
    leader, bystander = server.ask("a", FLEX, length=50), server.ask("a", FLEX, length=50)
    server.step()
    follower = server.ask("b", PRIORITY)
    waiters = {leader.id: [follower]}
    assert rank(leader, now=server.now, waiters=waiters) is PRIORITY
    assert server.fair.yields(server.running, server.waiting, now=server.now, waiters=waiters) is None, (
        "no slot helps it"
    )
    server.ask("c", DEFAULT)
    assert server.fair.yields(server.running, server.waiting, now=server.now, waiters=waiters) is bystander
    assert server.fair.victim(server.running, now=server.now, waiters=waiters) is bystander
    server.fair.leave(bystander)
    server.running.remove(bystander)
    assert server.fair.yields(server.running, server.waiting, now=server.now, waiters=waiters) is None
    assert server.fair.yields(server.running, server.waiting, now=server.now) is leader


# The books


def test_what_makes_no_sense_is_refused() -> None:
    server = Server()
    once = server.ask("a")
    with pytest.raises(ValueError, match="has arrived already"):
        server.fair.arrive(once)
    for weight in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="is not over 0"):
            server.fair.arrive(Sequence(99, array("i", [1]), weight=weight))
    server.fair.charge("nobody", generated_tokens=5)
    assert server.fair.counter("nobody") == 0.0
    server.fair.check_integrity(server.waiting, [])
    with pytest.raises(AssertionError, match="not accounted for"):
        server.fair.check_integrity([], [])


class FairShareMachine(RuleBasedStateMachine):
    """Sequences that come, run, give way and leave in any order."""

    def __init__(self) -> None:
        super().__init__()
        self.fair = FairShare()
        self.now = 0.0
        self.number = 0
        self.waiting: list[Sequence] = []
        self.running: list[Sequence] = []

    @rule(
        tenant=st.sampled_from(["", "a", "b"]),
        tier=TIERS,
        prompt=st.integers(1, 50),
        weight=st.floats(0.01, 100),
        within_s=st.none() | st.floats(0, 50),
    )
    def arrive(self, tenant: str, tier: Priority, prompt: int, weight: float, within_s: float | None) -> None:
        self.number += 1
        deadline = None if within_s is None else self.now + within_s
        tokens = array("i", [0] * prompt)
        new = Sequence(self.number, tokens, tier, self.now, tenant=tenant, weight=weight, deadline=deadline)
        self.fair.arrive(new)
        self.waiting.append(new)

    @precondition(lambda self: self.waiting)
    @rule(count=st.integers(1, 3))
    def admit(self, count: int) -> None:
        for each in self.fair.order(self.waiting, now=self.now, prefill_token_s=0.1)[:count]:
            before = self.fair.counter(each.tenant)
            self.fair.admit(each, now=self.now)
            assert self.fair.counter(each.tenant) >= before
            self.waiting.remove(each)
            self.running.append(each)

    @precondition(lambda self: self.running)
    @rule(tokens=st.integers(0, 9))
    def generate(self, tokens: int) -> None:
        for each in self.running:
            self.fair.charge(each.tenant, generated_tokens=tokens, weight=each.weight)

    @precondition(lambda self: self.running)
    @rule(data=st.data())
    def give_way(self, data: st.DataObject) -> None:
        waiters = {data.draw(st.sampled_from(self.running)).id: self.waiting[:2]}
        chosen = self.fair.yields(self.running, self.waiting, now=self.now, waiters=waiters)
        assert chosen is None or chosen.priority is FLEX
        victim = self.fair.victim(self.running, now=self.now, waiters=waiters)
        worst = max(rank(each, now=self.now, waiters=waiters) for each in self.running)
        assert rank(victim, now=self.now, waiters=waiters) is worst
        parked = chosen or victim
        self.fair.park(parked)
        self.running.remove(parked)
        self.waiting.append(parked)

    @precondition(lambda self: self.waiting or self.running)
    @rule(data=st.data())
    def leave(self, data: st.DataObject) -> None:
        gone = data.draw(st.sampled_from([*self.waiting, *self.running]))
        (self.waiting if gone in self.waiting else self.running).remove(gone)
        self.fair.leave(gone)
        self.fair.leave(gone)

    @rule(seconds=st.floats(0, 40))
    def wait(self, seconds: float) -> None:
        self.now += seconds

    @invariant()
    def books_are_true(self) -> None:
        self.fair.check_integrity(self.waiting, self.running)

    @invariant()
    def the_order_is_of_everyone_and_always_the_same(self) -> None:
        order = self.fair.order(self.waiting, now=self.now)
        assert sorted(each.id for each in order) == sorted(each.id for each in self.waiting)
        assert self.fair.order(list(reversed(self.waiting)), now=self.now) == order

    @invariant()
    def nobody_of_his_own_tenant_and_tier_overtakes_anyone(self) -> None:
        order = [each for each in self.fair.order(self.waiting, now=self.now) if each.deadline is None]
        for tenant in ("", "a", "b"):
            for tier in Priority:
                own = [(each.arrived, each.id) for each in order if (each.tenant, each.priority) == (tenant, tier)]
                assert own == sorted(own)


TestFairShareMachine = FairShareMachine.TestCase
TestFairShareMachine.settings = settings(max_examples=100, stateful_step_count=30, deadline=None)
