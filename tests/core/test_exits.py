"""Every program of ours ends cleanly: its last garbage collection leaves msgspec's types alone."""

from __future__ import annotations

import subprocess
import sys

import pytest

PROGRAM = """
import atexit, gc, runpy, sys
atexit.register(lambda: print("frozen", gc.get_freeze_count() > 0, file=sys.stderr))  # the last to be called
module, *sys.argv[1:] = sys.argv[1:]
if module == "tests":
    import tests
else:
    runpy.run_module(module, run_name="__main__")
"""


@pytest.mark.parametrize(
    "program",
    [
        ("appliance", "--version"),
        ("appliance.serving.template_process",),
        ("appliance.retrieval.parsing.process",),
        ("appliance.engine.llama.bare_loop",),
        ("tests",),
    ],
    ids=lambda each: each[0],
)
def test_what_is_there_at_the_end_is_frozen(program: tuple[str, ...]) -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, *program], input=b"", capture_output=True, timeout=60, check=False
    )
    assert done.returncode >= 0, "it ended by a signal"
    assert b"frozen True" in done.stderr, done.stderr
