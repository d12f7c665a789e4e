"""What `tests/benchmarks/engine` runs once everything is set up."""

from __future__ import annotations

import argparse
import asyncio
import logging
import os
import signal
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import msgspec

from appliance.bench.report import Subject, software, this_machine
from appliance.core.errors import ApplianceError
from appliance.core.settings import Settings
from appliance.engine.llama.model import LlamaModel
from appliance.registry.versions import RegisteredModel, open_registry
from appliance.store.database import Database
from tests.benchmarks import lookup, steps
from tests.benchmarks.peers import CELLS, PEERS, THREADS, Appliance, Model, Peer, peers
from tests.benchmarks.results import Result, Results, print_results
from tests.benchmarks.suite import WORKLOADS, run
from tests.benchmarks.workload import QUICK, Effort

NAMES = (*WORKLOADS, steps.NAME)
PEERLESS = {lookup.WORKLOAD.name, steps.NAME}
"""Workloads of ours alone."""


def main() -> None:
    """Measure, print and write what was asked for."""
    options = _options()
    logging.getLogger("appliance.llama_cpp").setLevel(logging.ERROR)
    try:
        results = asyncio.run(_until_terminated(options))
    except asyncio.CancelledError:
        sys.exit(128 + signal.SIGTERM)
    except ApplianceError as error:
        sys.exit(f"Error: {error}")
    print_results(results)
    if options.json is not None:
        options.json.write_bytes(msgspec.json.format(msgspec.json.encode(results)) + b"\n")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="tests/benchmarks/engine", usage="see tests/benchmarks/engine --help")
    parser.add_argument("--workload", nargs="+", choices=NAMES, default=NAMES)
    parser.add_argument("--peer", nargs="+", choices=PEERS, default=PEERS)
    parser.add_argument("--runs", type=_count)
    parser.add_argument("--threads", type=_count, default=THREADS)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    options.data = Path(os.environ["APPLIANCE_TEST_MODEL_DATA"]).absolute()
    return options


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of 1 or more")
    return int(text)


async def _until_terminated(options: argparse.Namespace) -> Results:
    """Measure; SIGTERM, as Ctrl-C, ends the servers before it ends this program."""
    task = asyncio.current_task()
    assert task is not None, "this runs in a task"
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
    return await _measure(options)


async def _measure(options: argparse.Namespace) -> Results:
    effort = QUICK if options.quick else Effort()
    effort = replace(effort, runs=options.runs or effort.runs)
    registered = _registered(options.data)
    vocabulary = LlamaModel(registered.files[0].path, gpu_layers=0)
    try:
        model = Model(registered, options.data, tuple(vocabulary.end_tokens), options.threads)
        found = peers(model, options.peer if set(options.workload) - PEERLESS else [], build=True)

        def count(text: str) -> int:
            return len(vocabulary.tokenize(text, add_special=False, parse_special=False))

        results = [
            await _steps(model, options)
            if name == steps.NAME
            else await run(WORKLOADS[name], found, effort, count, _say)
            for name in options.workload
        ]
    finally:
        vocabulary.close()
    return _results(found, results, effort, options)


async def _steps(model: Model, options: argparse.Namespace) -> Result:
    cases = steps.QUICK_CASES if options.quick else steps.CASES
    return await steps.measure(model.path, cases, threads=model.threads, cells=CELLS, progress=_say)


def _registered(data: Path) -> RegisteredModel:
    settings = Settings(data_dir=data)
    database = Database(settings.database_path)
    try:
        return open_registry(settings, database).resolve(settings.model)
    finally:
        database.close()


def _results(found: Sequence[Peer], results: list[Result], effort: Effort, options: argparse.Namespace) -> Results:
    ours = next(each for each in found if isinstance(each, Appliance))
    return Results(
        machine=this_machine(),
        software=software(Subject(ours.settings, ours.model.registered)),
        peers={each.name: each.about for each in found},
        runs=effort.runs,
        quick=options.quick,
        workloads=results,
    )


def _say(progress: str) -> None:
    print(f"{progress} ...", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
