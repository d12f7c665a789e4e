"""Starts Python programs beside the test and talks to them over pipes, always with a deadline."""

from __future__ import annotations

import select
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

DEADLINE_S = 30.0


@contextmanager
def child(program: str, *arguments: str | Path) -> Iterator[subprocess.Popen[str]]:
    """Run `python -c program arguments` with piped input and output; it is dead when the block ends."""
    process = subprocess.Popen(
        [sys.executable, "-c", program, *map(str, arguments)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        bufsize=1,
    )
    with process:
        try:
            yield process
        finally:
            process.kill()


def read_line(process: subprocess.Popen[str]) -> str:
    """Return the next line of the child's output, or "" once it has ended."""
    assert process.stdout is not None
    ready, _, _ = select.select([process.stdout], [], [], DEADLINE_S)
    assert ready, f"the child said nothing for {DEADLINE_S} s"
    return process.stdout.readline().rstrip("\n")


def wait_until_all_have_ended(processes: list[subprocess.Popen[str]]) -> list[int]:
    """Return the exit statuses, within one deadline for all."""
    deadline = time.monotonic() + DEADLINE_S
    return [process.wait(max(0.1, deadline - time.monotonic())) for process in processes]
