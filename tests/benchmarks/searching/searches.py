"""How long searches take, how much of what is nearest they find, and what memory they need."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from appliance.bench.statistics import quantile
from tests.benchmarks.peers import OURS
from tests.benchmarks.searching.jobs import Kind, Made, Searched, Times
from tests.benchmarks.searching.peers import CHROMADB, Peer
from tests.benchmarks.searching.workload import Trial, Workload
from tests.benchmarks.workload import Quantity, Sample

NEAREST, NEAREST_TAIL, NEAREST_CPU = "nearest, median", "nearest, 95th percentile", "nearest, CPU time"
PASSING, PASSING_CPU = "nearest of 1 %, median", "nearest of 1 %, CPU time"
RECALL, RECALL_PASSING = "recall@10", "recall@10 of 1 %"
WHOLE, WHOLE_TAIL, WHOLE_CPU = "both legs, median", "both legs, 95th percentile", "both legs, CPU time"
FILTERED, FILTERED_CPU = "both legs with a filter, median", "both legs with a filter, CPU time"
FILTER_SHARE = "filter of 1 %: its share of the time"
RESIDENT, START = "resident memory", "start to first answer"
MADE, MAKING_PEAK, MERGING_PEAK = "index made", "most memory, made", "most memory, merged"
_COUNTED = (
    "Milliseconds on one core, queries one after another, their embedding excluded: the nearest 10 of {} vectors in "
    "clusters as MiniLM's, of all and of those 1 % that pass a filter; and, ours alone, whole searches by both legs."
)


async def many(trial: Trial) -> Sample:
    """Measure one contestant with as many texts as everyone can have."""
    return await _measure(trial, trial.effort.many)


async def most(trial: Trial) -> Sample:
    """Measure ours with as many texts as a box is to have."""
    return await _measure(trial, trial.effort.most)


async def _measure(trial: Trial, count: int) -> Sample:
    corpus = await asyncio.to_thread(trial.corpus, count)
    made = await trial.peer.build(corpus)
    found = await trial.peer.search(corpus)
    return Sample({**_values(found), **_building(made)}, {"effort": found.effort, "made": made})


def _values(found: Searched) -> dict[str, float]:
    values = {
        NEAREST: _ms(found.dense.wall),
        NEAREST_TAIL: _ms(found.dense.wall, 0.95),
        NEAREST_CPU: _ms(found.dense.cpu),
        PASSING: _ms(found.dense_filtered.wall),
        PASSING_CPU: _ms(found.dense_filtered.cpu),
        RECALL: found.recall,
        RECALL_PASSING: found.recall_filtered,
        RESIDENT: found.memory.now / 1e6,
        START: found.start_s,
    }
    if found.hybrid is not None and found.filtered is not None:
        values |= _both_legs(found.hybrid, found.filtered)
    return values


def _both_legs(whole: Times, filtered: Times) -> dict[str, float]:
    return {
        WHOLE: _ms(whole.wall),
        WHOLE_TAIL: _ms(whole.wall, 0.95),
        WHOLE_CPU: _ms(whole.cpu),
        FILTERED: _ms(filtered.wall),
        FILTERED_CPU: _ms(filtered.cpu),
        FILTER_SHARE: _ms(filtered.cpu) / _ms(whole.cpu),
    }


def _building(made: dict[Kind, Made]) -> dict[str, float]:
    values = {MADE: sum(each.seconds for each in made.values()), MAKING_PEAK: made["vectors"].peak / 1e6}
    if "merge" in made:
        values[MERGING_PEAK] = made["merge"].peak / 1e6
    return values


def _ms(seconds: Sequence[float], share: float = 0.5) -> float:
    return 1e3 * quantile(seconds, share)


def _quantities(median_ms: float, tail_ms: float) -> list[Quantity]:
    def ours(name: str, unit: str, target: float | None, *, least: bool = False) -> Quantity:
        return Quantity(name, unit, "least" if least else "greatest", target, compared="value")

    return [
        Quantity(NEAREST, "ms", "greatest", 1.0),
        Quantity(NEAREST_TAIL, "ms", "greatest", 1.0),
        Quantity(NEAREST_CPU, "ms", "greatest", None),
        Quantity(PASSING, "ms", "greatest", 1.0),
        Quantity(PASSING_CPU, "ms", "greatest", None),
        ours(RECALL, "", 0.95, least=True),
        ours(RECALL_PASSING, "", 0.95, least=True),
        ours(WHOLE, "ms", median_ms),
        ours(WHOLE_TAIL, "ms", tail_ms),
        ours(WHOLE_CPU, "ms", None),
        ours(FILTERED, "ms", None),
        ours(FILTERED_CPU, "ms", None),
        ours(FILTER_SHARE, "", 1.0),
        ours(RESIDENT, "MB", 700.0),
        ours(START, "s", 3.0),
        ours(MADE, "s", None),
        ours(MAKING_PEAK, "MB", None),
        ours(MERGING_PEAK, "MB", None),
    ]


def _ours_alone(peers: Sequence[Peer]) -> list[Peer]:
    return [each for each in peers if each.name == OURS]


SEARCHES = Workload(
    name="searches",
    counted=_COUNTED.format("100,000"),
    quantities=_quantities(15.0, 30.0),
    measure=many,
    baseline=CHROMADB,
)
MILLION = Workload(
    name="million",
    counted=_COUNTED.format("1,000,000"),
    quantities=_quantities(60.0, 120.0),
    measure=most,
    baseline=CHROMADB,
    contestants=_ours_alone,
)
