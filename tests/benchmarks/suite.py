"""The workloads by name, and how the servers are taken through them turn about."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from appliance.bench.report import Progress
from appliance.bench.suite import ungrouped
from tests.benchmarks import conversations, decode, first_token, long_prompt, lookup, neighbour, restart
from tests.benchmarks.peers import Peer
from tests.benchmarks.results import Result, compare
from tests.benchmarks.texts import CountTokens
from tests.benchmarks.workload import ContestantT, Effort, Sample, Trial, TrialT, Workload, WorkloadOf

WORKLOADS: dict[str, Workload] = {
    each.name: each
    for each in (
        decode.WORKLOAD,
        first_token.FIRST_TOKEN,
        first_token.SHARED_PROMPT,
        conversations.WORKLOAD,
        long_prompt.WORKLOAD,
        neighbour.WORKLOAD,
        restart.WORKLOAD,
        lookup.WORKLOAD,
    )
}


async def run(
    workload: Workload, peers: Sequence[Peer], effort: Effort, count: CountTokens, progress: Progress
) -> Result:
    """Take every server through a workload of the engine; see `take_turns`.

    Args:
        workload: What to measure.
        peers: Whoever is there; the workload chooses from them.
        effort: How much to do.
        count: Returns the tokens of a text.
        progress: Told what is being measured now.

    Raises:
        ApplianceError: A server did not become ready, or its answers are not whole.
    """
    return await take_turns(
        workload, peers, lambda peer, number: Trial(peer, effort, number, count), effort.runs, progress
    )


async def take_turns(
    workload: WorkloadOf[ContestantT, TrialT],
    peers: Sequence[ContestantT],
    trial: Callable[[ContestantT, int], TrialT],
    runs: int,
    progress: Progress,
) -> Result:
    """Take every contestant through a workload so many times, never two at once.

    Args:
        workload: What to measure.
        peers: Whoever is there; the workload chooses from them.
        trial: Returns a contestant's turn in a run, which is counted from 0.
        runs: Repetitions.
        progress: Told what is being measured now.

    Raises:
        ApplianceError: A server did not become ready, or its answers are not whole.
    """
    obstacle = workload.obstacle()
    if obstacle:
        progress(f"{workload.name}: skipped, since {obstacle}")
        return Result(name=workload.name, counted=workload.counted, skipped=f"skipped, since {obstacle}.")
    contestants = workload.contestants(peers)
    samples: dict[str, list[Sample]] = {each.name: [] for each in contestants}
    for number in range(runs):
        for peer in contestants if number % 2 == 0 else reversed(contestants):
            progress(f"{workload.name}, run {number + 1} of {runs}: {peer.name}")
            with ungrouped():
                samples[peer.name].append(await workload.measure(trial(peer, number)))
    return compare(workload, samples)
