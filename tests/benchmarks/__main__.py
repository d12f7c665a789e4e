"""What `tests/benchmarks/engine` runs once everything is set up."""

from __future__ import annotations

import argparse
import logging
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from appliance.bench.report import Subject, software, this_machine
from appliance.core.settings import Settings
from appliance.engine.llama.model import LlamaModel
from appliance.registry.known import RegisteredModel
from appliance.registry.versions import open_registry
from appliance.store.database import Database
from tests.benchmarks import lookup, steps
from tests.benchmarks.options import finished, options, say, write
from tests.benchmarks.peers import CELLS, PEERS, THREADS, Appliance, Model, Peer, peers
from tests.benchmarks.results import Result, Results, print_results
from tests.benchmarks.suite import WORKLOADS, run
from tests.benchmarks.workload import QUICK, Effort

NAMES = (*WORKLOADS, steps.NAME)
PEERLESS = {lookup.WORKLOAD.name, steps.NAME}
"""Workloads of ours alone."""


def main() -> None:
    """Measure, print and write what was asked for."""
    given = _options()
    logging.getLogger("appliance.llama_cpp").setLevel(logging.ERROR)
    results = finished(_measure(given))
    print_results(results)
    write(results, given.json)


def _options() -> argparse.Namespace:
    found = options("tests/benchmarks/engine", workloads=NAMES, peers=PEERS, threads=THREADS)
    found.data = Path(os.environ["APPLIANCE_TEST_MODEL_DATA"]).absolute()
    return found


async def _measure(given: argparse.Namespace) -> Results:
    effort = QUICK if given.quick else Effort()
    effort = replace(effort, runs=given.runs or effort.runs)
    registered = _registered(given.data)
    vocabulary = LlamaModel(registered.files[0].path, gpu_layers=0)
    try:
        model = Model(registered, given.data, tuple(vocabulary.end_tokens), given.threads)
        found = peers(model, given.peer if set(given.workload) - PEERLESS else [], build=True)

        def count(text: str) -> int:
            return len(vocabulary.tokenize(text, add_special=False, parse_special=False))

        results = [
            await _steps(model, given) if name == steps.NAME else await run(WORKLOADS[name], found, effort, count, say)
            for name in given.workload
        ]
    finally:
        vocabulary.close()
    return _results(found, results, effort, given)


async def _steps(model: Model, given: argparse.Namespace) -> Result:
    cases = steps.QUICK_CASES if given.quick else steps.CASES
    return await steps.measure(model.path, cases, threads=model.threads, cells=CELLS, progress=say)


def _registered(data: Path) -> RegisteredModel:
    settings = Settings(data_dir=data)
    database = Database(settings.database_path)
    try:
        return open_registry(settings, database).resolve(settings.model)
    finally:
        database.close()


def _results(found: Sequence[Peer], results: list[Result], effort: Effort, given: argparse.Namespace) -> Results:
    ours = next(each for each in found if isinstance(each, Appliance))
    return Results(
        machine=this_machine(),
        software=software(Subject(ours.settings, ours.model.registered)),
        peers={each.name: each.about for each in found},
        runs=effort.runs,
        quick=given.quick,
        workloads=results,
    )


if __name__ == "__main__":
    main()
