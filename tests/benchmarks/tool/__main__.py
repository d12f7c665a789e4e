"""What `tests/benchmarks/tools` runs once everything is set up."""

from __future__ import annotations

import argparse
import asyncio
import os
import signal
import sys
from pathlib import Path

import msgspec

from appliance.bench.report import Machine, this_machine
from appliance.cli.tables import print_table
from appliance.core.errors import ApplianceError
from tests.benchmarks.__main__ import _registered
from tests.benchmarks.peers import THREADS, Appliance, Model, Peer, program_of
from tests.benchmarks.tool.measure import Counts, ToolServer, measure
from tests.benchmarks.tool.tasks import CATEGORIES, read_tasks

CHOICES = ("required", "auto")
PEERS = ("llama-server",)
TASKS = 100


class Row(msgspec.Struct, frozen=True, kw_only=True):
    """One server, one category, one `tool_choice`."""

    category: str
    choice: str
    server: str
    counts: Counts


class Results(msgspec.Struct, frozen=True, kw_only=True):
    """Everything of one call; `peers` says how each server was run."""

    machine: Machine
    model: str
    peers: dict[str, str]
    rows: list[Row]


def main() -> None:
    """Measure, print and write what was asked for."""
    options = _options()
    try:
        results = asyncio.run(_until_terminated(options))
    except asyncio.CancelledError:
        sys.exit(128 + signal.SIGTERM)
    except (ApplianceError, OSError) as error:
        sys.exit(f"Error: {error}")
    _print(results)
    if options.json is not None:
        options.json.write_bytes(msgspec.json.format(msgspec.json.encode(results)) + b"\n")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="tests/benchmarks/tools", usage="see tests/benchmarks/tools --help")
    parser.add_argument("data", type=Path)
    parser.add_argument("--category", nargs="+", choices=CATEGORIES, default=tuple(CATEGORIES))
    parser.add_argument("--choice", nargs="+", choices=CHOICES, default=CHOICES)
    parser.add_argument("--peer", nargs="*", choices=PEERS, default=PEERS)
    parser.add_argument("--tasks", type=_count, default=TASKS)
    parser.add_argument("--threads", type=_count, default=THREADS)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    options.models = Path(os.environ["APPLIANCE_TEST_MODEL_DATA"]).absolute()
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
    model = Model(_registered(options.models), options.models, (), options.threads)
    peers: list[Peer] = [Appliance(model)]
    peers += [ToolServer(model, program_of(each, build=True)) for each in options.peer]
    rows = []
    for category in options.category:
        tasks = read_tasks(options.data, category, options.tasks)
        for choice in options.choice:
            for peer in peers:
                counts = await measure(peer, tasks, choice, _say)
                rows.append(Row(category=category, choice=choice, server=peer.name, counts=counts))
    return Results(
        machine=this_machine(),
        model=model.registered.full_name,
        peers={each.name: each.about for each in peers},
        rows=rows,
    )


def _print(results: Results) -> None:
    for name, about in results.peers.items():
        print(f"{name}: {about}")
    headings = ["category", "choice", "server", *Counts.__struct_fields__]
    rows = [
        [each.category, each.choice, each.server, *map(str, msgspec.structs.astuple(each.counts))]
        for each in results.rows
    ]
    print_table(headings, rows)


def _say(progress: str) -> None:
    print(f"{progress} ...", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
