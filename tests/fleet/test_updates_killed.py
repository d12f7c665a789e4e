"""SIGKILL before and after every journal write, fsync and rename of an update: the next start brings it to its end."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.fleet.updating import tiny_model

ALL = [*("seen", "verified", "reserved", "fetching", "fetched", "staged", "testing", "trial", "confirmed")]


def lives(folder: Path, every: int) -> list[dict[str, Any]]:
    tiny_model(folder / "old.gguf", seed=0)
    tiny_model(folder / "new.gguf", seed=1)
    run = subprocess.run(
        [sys.executable, "-m", "tests.fleet.killed_updates", str(folder), str(every)],
        check=False,
        capture_output=True,
        text=True,
        timeout=300,
        cwd=Path(__file__).parents[2],
    )
    assert run.returncode == 0, run.stderr
    return [json.loads(line) for line in run.stdout.splitlines()]


def check(life: dict[str, Any]) -> None:
    then = life["then"]
    assert then["states"] == ALL, life
    assert then["meant"] == "2", life
    assert then["versions"] == ["1", "2"], life
    assert then["right"], life
    assert then["partial"] == [], life
    assert then["floor"] == 2, life


@pytest.mark.parametrize("every", [pytest.param(9, id="some"), pytest.param(1, id="all", marks=pytest.mark.slow)])
@pytest.mark.timeout(300)
def test_an_update_that_is_killed_anywhere_is_brought_to_its_end_by_the_next_start(tmp_path: Path, every: int) -> None:
    found = lives(tmp_path, every)
    assert len(found) > 45 / every, "the moments of an update are no longer seen"
    assert {each["status"] for each in found[:-1]} == {-9}
    assert {"fsync", "rename", "submit"} <= {each["where"].split()[-1] for each in found} or every > 1
    for life in found:
        check(life)
