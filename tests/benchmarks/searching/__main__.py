"""What `tests/benchmarks/retrieval` runs once everything is set up."""

from __future__ import annotations

import argparse
import os
import sys
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

import msgspec

from appliance import __version__
from appliance.bench.report import Machine, this_machine
from tests.benchmarks.options import finished, options, say, write
from tests.benchmarks.peers import new_home
from tests.benchmarks.results import Result, print_workloads
from tests.benchmarks.searching.peers import PEERS, peers
from tests.benchmarks.searching.suite import WORKLOADS, run
from tests.benchmarks.searching.workload import QUICK, Effort


class Results(msgspec.Struct, frozen=True, kw_only=True):
    """Everything of one call; `peers` says how each was run."""

    machine: Machine
    appliance: str
    faiss: str
    python: str
    peers: dict[str, str]
    runs: int
    quick: bool
    workloads: list[Result]


def main() -> None:
    """Measure, print and write what was asked for."""
    given = _options()
    results = finished(_measure(given))
    machine = results.machine
    print(f"{machine.cores} cores of {machine.cpu}; faiss {results.faiss}; median of {results.runs}.")
    if results.quick:
        print("Quick: the figures mean nothing.")
    print_workloads(results.peers, results.workloads)
    write(results, given.json)


def _options() -> argparse.Namespace:
    found = options("tests/benchmarks/retrieval", workloads=WORKLOADS, peers=PEERS, threads=None)
    found.data = Path(os.environ["BENCHMARK_DATA"]).absolute()
    return found


async def _measure(given: argparse.Namespace) -> Results:
    effort = QUICK if given.quick else Effort()
    effort = replace(effort, runs=given.runs or effort.runs)
    with new_home() as home:
        found = peers(home, given.peer if "searches" in given.workload else ())
        results = [await run(name, found, effort, given.data, say) for name in given.workload]
    return Results(
        machine=this_machine(),
        appliance=__version__,
        faiss=version("faiss-cpu"),
        python=sys.version.split()[0],
        peers={each.name: each.about for each in found},
        runs=effort.runs,
        quick=given.quick,
        workloads=results,
    )


if __name__ == "__main__":
    main()
