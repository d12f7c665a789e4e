"""What the benchmark commands have in common: their options, how SIGTERM ends them, and how they tell progress."""

from __future__ import annotations

import argparse
import asyncio
import signal
import sys
from collections.abc import Callable, Coroutine, Iterable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from appliance.core.errors import ApplianceError

ResultsT = TypeVar("ResultsT")
Run = Callable[[Coroutine[Any, Any, ResultsT]], ResultsT]


def options(program: str, *, workloads: Iterable[str], peers: Sequence[str], threads: int | None) -> argparse.Namespace:
    """Read the command line of a benchmark.

    Args:
        program: Its path in the repository.
        workloads: Names of what can be measured; all of it by default.
        peers: Names of those who can be measured beside the appliance; all of them by default.
        threads: Default of `--threads`; None for a benchmark that has no such option.
    """
    names = tuple(workloads)
    parser = argparse.ArgumentParser(prog=program, usage=f"see {program} --help")
    parser.add_argument("--workload", nargs="+", choices=names, default=names)
    parser.add_argument("--peer", nargs="+", choices=peers, default=peers)
    parser.add_argument("--runs", type=_count)
    if threads is not None:
        parser.add_argument("--threads", type=_count, default=threads)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--quick", action="store_true")
    return parser.parse_args()


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of 1 or more")
    return int(text)


def finished(measurement: Coroutine[Any, Any, ResultsT], run: Run[ResultsT] = asyncio.run) -> ResultsT:
    """Measure, and leave the program with a message or after a signal; SIGTERM, as Ctrl-C, ends the servers first."""
    try:
        return run(_until_terminated(measurement))
    except asyncio.CancelledError:
        sys.exit(128 + signal.SIGTERM)
    except ApplianceError as error:
        sys.exit(f"Error: {error}")


async def _until_terminated(measurement: Coroutine[Any, Any, ResultsT]) -> ResultsT:
    task = asyncio.current_task()
    assert task is not None, "this runs in a task"
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
    return await measurement


def write(results: msgspec.Struct, path: Path | None) -> None:
    """Write everything to a file, if there is one."""
    if path is not None:
        path.write_bytes(msgspec.json.format(msgspec.json.encode(results)) + b"\n")


def say(progress: str) -> None:
    """Tell what is being measured now."""
    print(f"{progress} ...", file=sys.stderr, flush=True)
