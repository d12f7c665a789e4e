"""Which kind of index a store gets, when it is compacted, how it is searched, and which stores are closed (pure)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal

Kind = Literal["flat", "ivf"]
"""An exact scan of 8-bit codes; or the same codes in lists around centroids, of which the nearest are scanned."""

Step = Literal["none", "merge", "train"]
"""What makes the next generation: there is none, what is there with what came since, or the truth alone."""


TRIAL_NEAREST = 10
"""So many nearest a trial looks for, to find out how many lists must be scanned."""


@dataclass(frozen=True, slots=True)
class Limits:
    """Where the kinds of index give way to each other, in vectors.

    Attributes:
        most_loose: So many are searched as float32 without any file.
        most_delta: No more than so many of them stand beside a generation.
        most_flat: So many are scanned as a whole.
        most_gathered: So few that pass a filter are scored one by one, where the index has lists.
    """

    most_loose: int = 4096
    most_delta: int = 16_384
    most_flat: int = 50_000
    most_gathered: int = 20_000

    def delta(self, count: int) -> int:
        """Return how many vectors may stand beside a generation of `count`, so that compaction stays rare."""
        return min(max(self.most_loose, count // 8), self.most_delta)

    def gathered(self, kind: Kind) -> int:
        """Return how many that pass a filter are scored one by one; a scan of a flat index is cheaper for more."""
        return self.most_gathered if kind == "ivf" else self.most_gathered // 16


@dataclass(frozen=True, slots=True)
class Made:
    """What is known of a generation: its kind, its vectors, and how many there were when it was trained."""

    kind: Kind
    count: int
    trained_on: int


@dataclass(frozen=True, slots=True)
class Plan:
    """How a generation is searched.

    Attributes:
        method: What passes is scored one by one, or lists or the whole are scanned.
        probes: Lists that are scanned.
    """

    method: Literal["gather", "scan"]
    probes: int = 0


def kind_for(count: int, now: Kind | None, limits: Limits) -> Kind | None:
    """Return the kind of index for so many vectors, None for no file.

    A store that shrinks keeps what it has for a while, so that one at the border is not made anew at each change.
    """
    if count <= (limits.most_loose if now is None else limits.most_loose // 2):
        return None
    return "ivf" if count > (limits.most_flat * 3 // 4 if now == "ivf" else limits.most_flat) else "flat"


def lists_for(count: int) -> int:
    """Return the number of lists for so many vectors."""
    return max(1, round(4 * math.sqrt(count)))


def step(count: int, made: Made | None, limits: Limits) -> Step:
    """Return what makes the next generation of `count` vectors after the present one."""
    kind = kind_for(count, made.kind if made else None, limits)
    if kind is None:
        return "none"
    if made is None or made.kind != kind or not made.trained_on // 4 <= count <= made.trained_on * 2:
        return "train"
    return "merge"


def is_compaction_due(count: int, delta: int, dead: int, limits: Limits) -> bool:
    """Tell whether a generation of `count` has too many vectors beside it, or too many removed ones in it."""
    return delta > limits.delta(count) or dead > max(limits.most_loose // 4, count // 4)


def candidates(k: int) -> int:
    """Return how many are taken from the 8-bit codes, so that the best k by the stored vectors are among them."""
    return k + k // 8 + 16


def plan(made: Made, *, k: int, passing: int, lists: int, probes: int, limits: Limits) -> Plan:
    """Return how to search a generation for the `k` nearest of the `passing` vectors that may be found.

    The fewer pass the farther the nearest are, so more lists are scanned, by the fourth root; and less in each of them.
    The 100 nearest are harder to find than the trial's 10: a sixteenth of the lists costs little.
    """
    if passing <= limits.gathered(made.kind):
        return Plan("gather")
    if k > candidates(TRIAL_NEAREST):
        probes = max(probes, lists // 16)
    return Plan("scan", min(lists, math.ceil(probes * (made.count / passing) ** 0.25)))


def least_probes(recall: Callable[[int], float], lists: int, wanted: float) -> int:
    """Return the fewest lists to scan with which the recall is as wanted, in steps of about a quarter; or all.

    They are a fortieth at least: real queries are harder than those of a trial.
    """
    probes = min(max(4, lists // 40), lists)
    while probes < lists and recall(probes) < wanted:
        probes = min(lists, probes + max(1, probes // 4))
    return probes


def to_close(sizes: Iterable[tuple[int, int]], most: int, keep: int) -> list[int]:
    """Return which stores to close so that the open ones take no more than `most` bytes.

    Args:
        sizes: Store and bytes, the one longest unused first.
        most: The cap; one store alone may be above it.
        keep: The store that is in use now, which stays.
    """
    held = list(sizes)
    excess = sum(size for _, size in held) - most
    closed: list[int] = []
    for store, size in held:
        if excess <= 0:
            break
        if store != keep:
            closed.append(store)
            excess -= size
    return closed
