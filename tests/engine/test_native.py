"""How llama.cpp's library is loaded."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest

NAMES = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")
SCRIPT = """
import ctypes, appliance.engine.llama.native
get = ctypes.CDLL(None).getenv
get.restype = ctypes.c_char_p
print(*((get(name.encode()) or b"-").decode() for name in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")))
"""


def _environment_of_the_library(**given: str) -> list[str]:
    """Return what the C library's `getenv` says in a process that has loaded llama.cpp."""
    inherited = {name: value for name, value in os.environ.items() if name not in NAMES}
    result = subprocess.run(
        [sys.executable, "-c", SCRIPT], env=inherited | given, capture_output=True, text=True, timeout=60, check=True
    )
    return result.stdout.split()


@pytest.mark.skipif(platform.machine() != "x86_64", reason="elsewhere a round of spinning is next to nothing")
def test_threads_spin_for_microseconds_only() -> None:
    """Or one busy program beside it slows decoding 20-fold."""
    assert _environment_of_the_library() == ["1500", "active"]


@pytest.mark.parametrize("given", [{"GOMP_SPINCOUNT": "7"}, {"OMP_WAIT_POLICY": "passive"}])
def test_the_operators_own_setting_stays(given: dict[str, str]) -> None:
    assert _environment_of_the_library(**given) == [given.get(name, "-") for name in NAMES]
