"""Memory that was freed is kept, seen from a process of its own."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

PROGRAM = """
import resource
from appliance.observe.allocator import keep_freed_memory

def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

def take_and_free():
    return len([b"x" * (8 << 20) for _ in range(4)])

if {kept}:
    assert keep_freed_memory()
for _ in range(3):
    take_and_free()
before = faults()
for _ in range(10):
    take_and_free()
print(faults() - before)
"""


def page_faults(*, kept: bool) -> int:
    """Return the page faults of ten times four blocks of 8 MiB, all written to and then freed."""
    ran = subprocess.run(
        [sys.executable, "-c", PROGRAM.format(kept=kept)], capture_output=True, text=True, timeout=60, check=True
    )
    return int(ran.stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries have no such setting")
def test_large_blocks_are_taken_from_what_was_freed() -> None:
    assert 10 * page_faults(kept=True) < page_faults(kept=False)


SELDOM = """
import gc
from appliance.observe.allocator import GARBAGE_THRESHOLDS, collect_garbage_seldom

collections = []
gc.callbacks.append(lambda phase, _: collections.append(phase))
collect_garbage_seldom()
assert gc.get_freeze_count() > 1000
kept = [[] for _ in range(GARBAGE_THRESHOLDS[0] // 2)]
assert not collections
cycles = []
for _ in range(GARBAGE_THRESHOLDS[0]):
    cycles.append([]), cycles[-1].append(cycles[-1])
assert collections
"""


def test_garbage_is_looked_for_seldom_but_is_looked_for() -> None:
    subprocess.run([sys.executable, "-c", SELDOM], timeout=60, check=True)
