"""SIGKILL before and after every journal write, fsync and rename of an import: the next start brings it to its end."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.parametrize("every", [pytest.param(13, id="some"), pytest.param(1, id="all", marks=pytest.mark.slow)])
@pytest.mark.timeout(600)
def test_an_import_that_is_killed_anywhere_is_brought_to_its_end_by_the_next_start(tmp_path: Path, every: int) -> None:
    run = subprocess.run(
        [sys.executable, "-m", "tests.fleet.killed_imports", str(tmp_path), str(every)],
        check=False,
        capture_output=True,
        text=True,
        timeout=600,
        cwd=Path(__file__).parents[2],
    )
    assert run.returncode == 0, run.stderr
    lives = [json.loads(line) for line in run.stdout.splitlines()]
    assert len(lives) > 60 / every, "the moments of an import are no longer seen"
    assert {each["status"] for each in lives[:-1]} == {-9}
    for life in lives:
        then = life["then"]
        assert then["meant"] == "v1", life
        assert then["versions"] == ["1", "v1"], life
        assert (then["right"], then["old"]) == (True, True), life
        assert (then["partial"], then["requests"]) == ([], []), life
        assert not then["open"], life
        assert (then["floor"], then["newest"], then["reports"]) == (1, 0, 0), "the hub's jobs keep their numbers"
