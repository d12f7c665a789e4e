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

if {kept}:
    assert keep_freed_memory()
for _ in range(3):
    bytearray(8 << 20)
before = faults()
for _ in range(20):
    bytearray(8 << 20)
print(faults() - before)
"""


def page_faults(*, kept: bool) -> int:
    """Return the page faults of 20 times 8 MiB."""
    ran = subprocess.run(
        [sys.executable, "-c", PROGRAM.format(kept=kept)], capture_output=True, text=True, timeout=60, check=True
    )
    return int(ran.stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries have no such setting")
def test_large_blocks_are_taken_from_what_was_freed() -> None:
    assert page_faults(kept=True) < 2048, "one block of 8 MiB has 2,048 pages, and 20 were taken"
