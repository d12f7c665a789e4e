"""What `tests/benchmarks/tensors` runs once everything is set up."""

from __future__ import annotations

import argparse
import asyncio
import os
import subprocess
import sys
from dataclasses import replace
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path

import msgspec
import uvloop

from appliance import __version__
from appliance.bench.report import Machine, this_machine
from appliance.core.errors import UnavailableError
from appliance.core.settings import Settings
from appliance.registry.versions import Registry, open_registry
from appliance.store.database import Database
from tests.benchmarks.options import finished, options, say, write
from tests.benchmarks.results import Result, print_workloads
from tests.benchmarks.tensor.models import DERIVED, ENCODER, Models, Tokens
from tests.benchmarks.tensor.peers import PEERS, THREADS, peers
from tests.benchmarks.tensor.suite import WORKLOADS, run, tuned
from tests.benchmarks.tensor.workload import QUICK, Effort

TOKENIZER = "tokenizer.json"


class Results(msgspec.Struct, frozen=True, kw_only=True):
    """Everything of one call; `peers` says how each was run."""

    machine: Machine
    appliance: str
    onnxruntime: str
    python: str
    model: str
    threads: int
    peers: dict[str, str]
    runs: int
    quick: bool
    workloads: list[Result]


def main() -> None:
    """Measure, print and write what was asked for."""
    given = _options()
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        results = finished(_measure(given), runner.run)
    _print(results)
    write(results, given.json)


def _options() -> argparse.Namespace:
    found = options("tests/benchmarks/tensors", workloads=WORKLOADS, peers=PEERS, threads=THREADS)
    found.data = Path(os.environ["BENCHMARK_DATA"]).absolute()
    return found


async def _measure(given: argparse.Namespace) -> Results:
    effort = QUICK if given.quick else Effort()
    effort = replace(effort, runs=given.runs or effort.runs)
    models = registered_models(given.data)
    tokens = Tokens(models.tokenizer)
    found = peers(models, given.data, given.peer, given.threads, build=True)
    if "sentences" in given.workload and not given.quick:
        found = await tuned(found, effort, tokens, say)
    results = [await run(name, found, effort, tokens, say) for name in given.workload]
    return Results(
        machine=this_machine(),
        appliance=__version__,
        onnxruntime=version("onnxruntime"),
        python=sys.version.split()[0],
        model=ENCODER,
        threads=given.threads,
        peers={each.name: each.about for name in given.workload for each in WORKLOADS[name].contestants(found)},
        runs=effort.runs,
        quick=given.quick,
        workloads=results,
    )


def registered_models(data: Path) -> Models:
    """Return the files of all models, after those that are derived have been imported.

    Args:
        data: A data folder that has the catalog's encoder.

    Raises:
        ApplianceError: The encoder is not there, or a model could not be imported.
    """
    settings = Settings(data_dir=data)
    database = Database(settings.database_path)
    try:
        registry = open_registry(settings, database)
        models = _files(registry, data / "derived")
        models.write()
        known = {(each.name, file.sha256) for each in registry.list() for file in each.files}
        missing = [name for name in DERIVED if (name, sha256(models.path(name).read_bytes()).hexdigest()) not in known]
    finally:
        database.close()
    for name in missing:
        _import(models.path(name), name, data)
    return models


def _files(registry: Registry, folder: Path) -> Models:
    model = registry.resolve(ENCODER)
    paths = {each.role: each.path for each in model.files}
    if TOKENIZER not in paths:
        raise UnavailableError(f"{model.full_name} has no {TOKENIZER}.")
    return Models(encoder=paths["model"], tokenizer=paths[TOKENIZER], folder=folder)


def _import(path: Path, name: str, data: Path) -> None:
    command = [sys.executable, "-m", "appliance", "models", "import", str(path), "--name", name]
    done = subprocess.run([*command, "--licence", "Apache-2.0", "--data", str(data)], stdout=sys.stderr, check=False)
    if done.returncode != 0:
        raise UnavailableError(f"{path.name} could not be imported; the reason is above.")


def _print(results: Results) -> None:
    machine = results.machine
    print(
        f"{results.model}, {results.threads} threads on {machine.cores} cores of {machine.cpu}; "
        f"onnxruntime {results.onnxruntime}; median of {results.runs}."
    )
    if results.quick:
        print("Quick: the figures mean nothing.")
    print_workloads(results.peers, results.workloads)


if __name__ == "__main__":
    main()
