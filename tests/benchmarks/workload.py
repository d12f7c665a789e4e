"""What a workload is: something that one server is made to do, and the quantities seen meanwhile."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, Literal, Protocol, TypeVar

from tests.benchmarks import texts
from tests.benchmarks.peers import Appliance, Messages, Peer, user


class Contestant(Protocol):
    """Whoever is taken through a workload."""

    @property
    def name(self) -> str:
        """Return what the tables call it."""
        ...


ContestantT = TypeVar("ContestantT", bound=Contestant)
TrialT = TypeVar("TrialT")


@dataclass(frozen=True, slots=True)
class Effort:
    """How much each server is made to do; lengths are in tokens.

    Attributes:
        runs: Repetitions, of which the median counts.
        clients: At once, one case each.
        answer: Of each client where decoding is measured.
        idle_s: Between the last answer and SIGKILL.
        neighbour_answer: Of each client beside a busy program; short, since there may be little left for the servers.
    """

    runs: int = 3
    clients: tuple[int, ...] = (1, 4, 8, 16)
    answer: int = 128
    neighbour_answer: int = 48
    prompt: int = 900
    system_prompt: int = 850
    sharers: int = 8
    conversations: int = 12
    turns: int = 4
    at_once: int = 4
    turn: int = 100
    turn_answer: int = 40
    streamed: int = 500
    long_prompt: int = 3000
    history: int = 1500
    idle_s: float = 20.0
    quoted: int = 150
    free_answer: int = 160
    questions: int = 3


QUICK = Effort(
    runs=1,
    clients=(1, 4, 8, 16),
    answer=12,
    neighbour_answer=12,
    prompt=100,
    system_prompt=150,
    conversations=3,
    turns=2,
    turn=40,
    turn_answer=8,
    streamed=200,
    long_prompt=600,
    history=200,
    idle_s=10.0,
    quoted=60,
    free_answer=30,
    questions=1,
)
"""Whether it works at all; the figures mean nothing."""


@dataclass(frozen=True, slots=True)
class Trial:
    """One server's turn in one run; the texts are the same for all servers of a run, and others in the next.

    Attributes:
        run: Counted from 0.
    """

    peer: Peer
    effort: Effort
    run: int
    count: texts.CountTokens

    def text(self, name: object, tokens: int) -> str:
        """Return prose of so many tokens; another name gives another text."""
        return texts.text(f"{self.run}/{name}", tokens, self.count)

    def ask(self, name: object, tokens: int) -> Messages:
        """Return a chat of one message of so many tokens; another name gives another one."""
        return [user(self.text(name, tokens))]


@dataclass(frozen=True, slots=True)
class Sample:
    """What was seen: the value of each quantity by its name, and what else may explain it."""

    values: Mapping[str, float]
    details: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Quantity:
    """Something measured in `unit`s; `target` bounds the ratio of ours to the baseline's.

    Attributes:
        bound: Whether the ratio must be at `least` or at the `greatest` the target.
        target: Without one there is no verdict, and a ratio only where there is a `baseline`.
        baseline: The name of the one that ours is compared with, if it is not the workload's.
        compared: What is bounded: the ratio, the difference of ours and the baseline's, or our value alone.
        values_of: The quantity that is compared here once more, with another baseline; the default is this one.
    """

    name: str
    unit: str
    bound: Literal["least", "greatest"]
    target: float | None
    baseline: str = ""
    compared: Literal["ratio", "difference", "value"] = "ratio"
    values_of: str = ""

    @property
    def measured(self) -> str:
        """Return the name that its values have in a sample."""
        return self.values_of or self.name


@dataclass(frozen=True)
class WorkloadOf(Generic[ContestantT, TrialT]):
    """A named measurement.

    Attributes:
        counted: What exactly is counted, in words.
        measure: Takes one sample of one server.
        baseline: The name of the server that ours is divided by.
        contestants: Chooses who takes part.
        obstacle: Says why it cannot be measured, or nothing.
    """

    name: str
    counted: str
    quantities: Sequence[Quantity]
    measure: Callable[[TrialT], Awaitable[Sample]]
    baseline: str = "llama-server"
    contestants: Callable[[Sequence[ContestantT]], list[ContestantT]] = list
    obstacle: Callable[[], str] = str


Workload = WorkloadOf[Peer, Trial]
"""One of the engine."""


def without_speculation(peers: Sequence[Peer]) -> list[Peer]:
    """Return the servers with our prompt lookup off, which long greedy answers would flatter."""
    return [each.with_speculation(on=False) if isinstance(each, Appliance) else each for each in peers]
