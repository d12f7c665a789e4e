"""Who is admitted next, and who gives way: weighted fair sharing between tenants, tiers, ageing and deadlines (pure).

**Shares.** Every tenant has a counter of the service it received, divided by its weight: a prompt token that had to be
computed counts 1, a generated token 2 (Sheng et al., "Fairness in Serving Large Language Models", OSDI 2024). Whoever
has the least goes first, so tenants that always want more are served in proportion to their weights: while all of them
wait, two counters never differ by more than the cost of one prompt and of a whole set of running answers. A tenant that
had nothing waiting is lifted to the least counter of those that have, so that idling saves no credit; and when nothing
is left to do at all, every counter is forgotten. Of a tenant with a hundred requests, at most one is thus admitted
before the single request of another, however late that came.

**Tiers.** A request's tier is `priority`, `default` or `flex`; better tiers go first. Ageing lifts a request to another
tier once it has waited as long as their head starts differ (`HEAD_START_S`): flex counts as default after 60 s and as
priority after 80 s, default as priority after 20 s. In one tenant's queue this is the order of arrival less the head
start, strictly. Between tenants the lifted compete by their counters with those whose tier that is, without credit for
the time before, so that a flood of flex requests that all come of age at once takes no more than its tenant's share;
and those that stood before an aged request in its own tier or a better one still do, so that age is no way past
fairness.

**Nothing starves.** Behind an endless stream of priority work from other tenants, a tenant's first flex request is the
next one to be admitted once it has waited 80 s, unless a tenant is waiting that has had less service than its own;
later ones take turns with the stream in proportion to the weights. Behind priority work of its own tenant it waits for
those that arrived up to 80 s after itself, and no others.

**Deadlines** break ties only. An earlier deadline first would let whoever asks for the shortest time limit pass all
others, so it would be priority without a permit. A request that cannot have its first token in time any more goes
behind all others: its answer would be worth nothing, and the time is better spent on those who still wait; where there
is time for all, it is still tried.

**Giving way.** A running flex sequence yields its slot when default or priority work waits for one. It is parked, not
lost; the k-th time, it then has at least 2^(k-1) seconds to itself once it runs again, and from the age of 60 s on it
does not yield any more, so it yields six times at most. A sequence whose prefix others wait for has the best tier of
theirs: parking it would hold up those that it should make way for.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Protocol, TypeVar

from appliance.core.types import Priority
from appliance.engine.llama.step import HEAD_START_S

PROMPT_COST = 1.0
"""What a computed prompt token counts."""
GENERATED_COST = 2.0
"""What a generated token counts: a step computes a prompt's tokens in one pass, but one token of each answer."""
PROTECTED_S = 1.0
"""How long a sequence that yielded once runs unhindered after it is admitted again; doubled each further time."""
LAST = len(Priority)
"""Rank of a request that will miss its deadline, behind every tier."""

_AGES = {
    own: tuple((HEAD_START_S[tier] - HEAD_START_S[own], tier) for tier in Priority if tier < own) for own in Priority
}
"""From each tier, after how many seconds of waiting a request counts as one of a better tier, best first."""


class Fair(Protocol):
    """A sequence as this policy sees it; `step.Sequence` is one.

    Attributes:
        id: Distinct among all that have arrived and not left.
        tenant: Whose share it counts against.
        weight: The tenant's share, relative to the others'; over 0.
        arrived: When it was accepted, in seconds; every `now` is on the same clock.
        deadline: When its caller gives up, on that clock, or None.
        pending: Tokens to be evaluated before its next token can be sampled.
    """

    @property
    def id(self) -> int: ...  # noqa: D102  (the class describes its attributes)
    @property
    def tenant(self) -> str: ...  # noqa: D102
    @property
    def weight(self) -> float: ...  # noqa: D102
    @property
    def priority(self) -> Priority: ...  # noqa: D102
    @property
    def arrived(self) -> float: ...  # noqa: D102
    @property
    def deadline(self) -> float | None: ...  # noqa: D102
    @property
    def pending(self) -> int: ...  # noqa: D102


FairT = TypeVar("FairT", bound=Fair)
Waiters = Mapping[int, Iterable[Fair]]
"""By the id of a running sequence, those that wait for it to compute a prefix of theirs."""
NOBODY: Waiters = MappingProxyType({})
"""Nobody waits for a prefix."""


@dataclass(slots=True)
class _Tenant:
    """One tenant's account.

    Attributes:
        counter: Service received, divided by the weight.
        lift: By tier, what the counter is at least for requests of that tier that wait.
        waiting: By tier, how many of its sequences wait.
        running: How many of its sequences run.
    """

    counter: float = 0.0
    lift: list[float] = field(default_factory=lambda: [0.0] * len(Priority))
    waiting: list[int] = field(default_factory=lambda: [0] * len(Priority))
    running: int = 0

    def standing(self, tier: Priority) -> float:
        """Return the counter that a waiting request of the tier competes with."""
        return max(self.counter, self.lift[tier])


@dataclass(slots=True)
class _Life:
    """What is remembered of one sequence from `arrive` to `leave`."""

    tenant: _Tenant
    tier: Priority
    admitted_at: float | None = None
    charged: bool = False
    parks: int = 0
    floor: float = 0.0


@dataclass(slots=True)
class _Place:
    """One waiting sequence's place while the order is made; `claim` is its tenant's, `tag` after ageing is paid for."""

    sequence: Fair
    life: _Life
    due: float
    rank: int
    cost: float
    claim: float = 0.0
    tag: float = 0.0


def due(sequence: Fair) -> float:
    """Return when the sequence would have arrived had it no tier: the order in one tenant's queue."""
    return sequence.arrived - HEAD_START_S[sequence.priority]


def aged(sequence: Fair, now: float) -> Priority:
    """Return the tier that the sequence counts as by now."""
    waited = now - sequence.arrived
    return next((tier for age, tier in _AGES[sequence.priority] if waited >= age), sequence.priority)


def rank(sequence: Fair, *, now: float, waiters: Waiters) -> Priority:
    """Return the tier that a running sequence counts as: its own by now, or the best of those that wait for it."""
    return min((aged(sequence, now), *(aged(each, now) for each in waiters.get(sequence.id, ()))))


class FairShare:
    """The accounts of all tenants, which the scheduler keeps by telling of every sequence.

    First `arrive`, then `admit`, perhaps `park` and `admit` again, then `leave`; and `charge` for what was generated.
    Each takes O(number of tenants) at most.
    """

    def __init__(self) -> None:
        """Start with nobody."""
        self._tenants: dict[str, _Tenant] = {}
        self._lives: dict[int, _Life] = {}
        self._virtual_time = 0.0

    def counter(self, tenant: str) -> float:
        """Return the service that a tenant has received in this busy period, divided by its weight."""
        known = self._tenants.get(tenant)
        return 0.0 if known is None else known.counter

    def arrive(self, sequence: Fair) -> None:
        """Note that a new sequence waits."""
        if sequence.id in self._lives:
            raise ValueError(f"sequence {sequence.id} has arrived already")
        if not 0 < sequence.weight < math.inf:
            raise ValueError(f"the weight {sequence.weight} is not over 0")
        tenant = self._tenants.setdefault(sequence.tenant, _Tenant())
        tier = sequence.priority
        own = [tenant.lift[better] for better in range(tier + 1) if tenant.waiting[better]]
        tenant.lift[tier] = max(tenant.lift[tier], min(own) if own else self._least(tenant, tier))
        tenant.waiting[tier] += 1
        self._lives[sequence.id] = _Life(tenant, tier)

    def admit(self, sequence: Fair, *, now: float) -> None:
        """Note that a waiting sequence has a slot, and charge what is left to compute of its prompt.

        Call it once the reused prefix is accounted for in `pending`. Coming back after `park` is not charged again.
        """
        life = self._lives[sequence.id]
        tenant = life.tenant
        tenant.counter = max(tenant.standing(life.tier), life.floor)
        self._virtual_time = max(self._virtual_time, tenant.counter)
        if not life.charged:
            tenant.counter += PROMPT_COST * sequence.pending / sequence.weight
        tenant.waiting[life.tier] -= 1
        tenant.running += 1
        life.charged, life.admitted_at, life.floor = True, now, 0.0

    def charge(self, tenant: str, *, prompt_tokens: int = 0, generated_tokens: int = 0, weight: float = 1.0) -> None:
        """Count service for a tenant beyond the prompts that `admit` counts."""
        known = self._tenants.get(tenant)
        if known is not None:
            known.counter += (PROMPT_COST * prompt_tokens + GENERATED_COST * generated_tokens) / weight

    def park(self, sequence: Fair) -> None:
        """Note that a running sequence gave way and waits again; its tenant loses nothing by that."""
        life = self._lives[sequence.id]
        life.admitted_at = None
        life.parks += 1
        life.tenant.running -= 1
        life.tenant.waiting[life.tier] += 1

    def leave(self, sequence: Fair) -> None:
        """Note that a sequence has ended, wherever it was. Idempotent."""
        life = self._lives.pop(sequence.id, None)
        if life is None:
            return
        if life.admitted_at is None:
            life.tenant.waiting[life.tier] -= 1
        else:
            life.tenant.running -= 1
        if not self._lives:
            self._tenants.clear()
            self._virtual_time = 0.0

    def order(self, waiting: Collection[FairT], *, now: float, prefill_token_s: float = 0.0) -> list[FairT]:
        """Return the waiting sequences in the order of admission; several may be admitted from one answer.

        Takes O(n log n), about a millisecond for 300, so ask when a slot is free and not at every step.

        Args:
            waiting: All that have arrived and have no slot.
            now: Seconds, on the clock of `arrived`.
            prefill_token_s: Seconds to evaluate a token, by which a request is known to miss its deadline.
        """
        places = [self._place(each, now, prefill_token_s) for each in waiting]
        places.sort(key=lambda each: (each.due, each.sequence.id))
        _set_claims(places)
        _let_age_not_pass_claims(places)
        self._set_tags(places)
        places.sort(key=_admission_key)
        by_id = {each.id: each for each in waiting}
        return [by_id[each.sequence.id] for each in places]

    def victim(self, running: Collection[FairT], *, now: float, waiters: Waiters = NOBODY) -> FairT:
        """Return the running sequence that gives way first when the cells run short; there must be one.

        The worst tier first; then one that has not just come back; then the tenant with the most service; then the
        latest.
        """
        return max(running, key=lambda each: self._dispensability(each, now, waiters))

    def yields(
        self,
        running: Collection[FairT],
        waiting: Collection[FairT],
        *,
        now: float,
        prefill_token_s: float = 0.0,
        waiters: Waiters = NOBODY,
    ) -> FairT | None:
        """Return the flex sequence that must give up its slot within this step, or None.

        Call it when no slot is free, park the answer, admit, and ask again.

        Args:
            running: Those with a slot.
            waiting: All that have none.
            now: Seconds, on the clock of `arrived`.
            prefill_token_s: As for `order`.
            waiters: Those that wait for a running sequence to compute their prefix; a slot would not help them.
        """
        if not any(each.priority < Priority.FLEX for each in waiting):
            return None
        candidates = [
            each
            for each in running
            if rank(each, now=now, waiters=waiters) is Priority.FLEX and not self._protected(each, now)
        ]
        if not candidates:
            return None
        chosen = max(candidates, key=lambda each: self._dispensability(each, now, waiters))
        blocked = {each.id for group in waiters.values() for each in group}
        takers = [chosen, *(each for each in waiting if each.id not in blocked)]
        taker = self.order(takers, now=now, prefill_token_s=prefill_token_s)[0]
        return chosen if taker.priority < Priority.FLEX else None

    def check_integrity(self, waiting: Collection[Fair], running: Collection[Fair]) -> None:
        """Verify that the accounts are about these sequences and no others.

        Raises:
            AssertionError: They are not.
        """
        assert {each.id for each in (*waiting, *running)} == self._lives.keys(), "sequences that are not accounted for"
        for name, tenant in self._tenants.items():
            for tier in Priority:
                count = sum(each.tenant == name and each.priority == tier for each in waiting)
                assert tenant.waiting[tier] == count, f"{count} sequences of {name!r} wait in tier {tier.name}"
            count = sum(each.tenant == name for each in running)
            assert tenant.running == count, f"{count} sequences of {name!r} run"

    def _least(self, newcomer: _Tenant, tier: Priority) -> float:
        """Return what a tenant that had nothing waiting in this tier or a better one is lifted to.

        That is the least counter of the others that wait there; if none do, that wait at all; if none do, that run.
        """
        others = [each for each in self._tenants.values() if each is not newcomer]
        for tiers in (range(tier + 1), range(len(Priority))):
            standings = [each.standing(Priority(t)) for each in others for t in tiers if each.waiting[t]]
            if standings:
                return min(standings)
        counters = (each.counter for each in others if each.running)
        return max(self._virtual_time, min(counters, default=0.0))

    def _place(self, sequence: Fair, now: float, prefill_token_s: float) -> _Place:
        life = self._lives[sequence.id]
        doomed = sequence.deadline is not None and now + sequence.pending * prefill_token_s >= sequence.deadline
        counts = not (life.charged or doomed)
        return _Place(
            sequence,
            life,
            due=due(sequence),
            rank=LAST if doomed else aged(sequence, now),
            cost=PROMPT_COST * sequence.pending / sequence.weight if counts else 0.0,
        )

    def _set_tags(self, places: list[_Place]) -> None:
        """Give each its claim, or where age lifted it, at least the least counter of those whose tier that is."""
        floors = [
            min(
                (
                    tenant.standing(tier)
                    for tenant in self._tenants.values()
                    for tier in Priority
                    if tier <= lifted and tenant.waiting[tier]
                ),
                default=0.0,
            )
            for lifted in Priority
        ]
        fronts: dict[int, float] = {}
        for each in places:
            life = each.life
            life.floor = floors[each.rank] if each.rank < life.tier else 0.0
            each.tag = max(fronts.get(id(life.tenant), 0.0), life.tenant.standing(life.tier), life.floor)
            fronts[id(life.tenant)] = each.tag + each.cost

    def _protected(self, sequence: Fair, now: float) -> bool:
        life = self._lives[sequence.id]
        if life.admitted_at is None or life.parks == 0:
            return False
        return now < life.admitted_at + PROTECTED_S * 2.0 ** min(life.parks - 1, 30)

    def _dispensability(self, sequence: Fair, now: float, waiters: Waiters) -> tuple[int, bool, float, float, int]:
        tier = rank(sequence, now=now, waiters=waiters)
        counter = self._lives[sequence.id].tenant.counter
        return (tier, not self._protected(sequence, now), counter, due(sequence), sequence.id)


def _set_claims(places: list[_Place]) -> None:
    """Let each tenant's requests, in the order they are due, claim the service that its counter leaves it."""
    fronts: dict[int, float] = {}
    for each in places:
        tenant = each.life.tenant
        each.claim = max(fronts.get(id(tenant), 0.0), tenant.standing(each.life.tier))
        fronts[id(tenant)] = each.claim + each.cost


def _let_age_not_pass_claims(places: list[_Place]) -> None:
    """Let whoever stands before an aged request, in its own tier or a better one, have its rank too."""
    best = [LAST] * len(Priority)
    for each in sorted(places, key=lambda each: each.claim, reverse=True):
        if each.rank < LAST:
            tier = each.life.tier
            each.rank = min(each.rank, *best[tier:])
            best[tier] = min(best[tier], each.rank)


def _admission_key(place: _Place) -> tuple[int, float, float, float, float, int]:
    deadline = math.inf if place.sequence.deadline is None else place.sequence.deadline
    return (place.rank, place.tag, place.claim, place.due, deadline, place.sequence.id)
