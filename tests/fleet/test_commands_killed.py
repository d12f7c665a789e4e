"""A command acts at most once, wherever a power cut falls."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

CHILD = Path(__file__).with_name("killed_commands.py")


class Run:
    def __init__(self, tmp_path: Path) -> None:
        self._database = tmp_path / "fleet.db"
        self._notes = tmp_path / "notes"
        self._expires = str(time.time() + 250)

    def __call__(self, point: str) -> tuple[int, list[dict[str, object]]]:
        arguments = [sys.executable, str(CHILD), str(self._database), str(self._notes), point, self._expires]
        done = subprocess.run(arguments, capture_output=True, text=True, timeout=100, check=False)
        assert done.returncode in {0, -signal.SIGKILL}, done.stderr
        return done.returncode, [json.loads(line) for line in done.stdout.splitlines()]

    @property
    def acts(self) -> int:
        return len(self._notes.read_text().splitlines()) if self._notes.exists() else 0


@pytest.mark.parametrize(
    ("point", "acts_before", "acts", "code"),
    [
        ("before_begin", 0, 1, ""),
        ("after_begin", 0, 0, "interrupted"),
        ("acting", 1, 1, "interrupted"),
        ("after_finish", 1, 1, ""),
    ],
)
def test_a_command_acts_at_most_once_and_is_always_answered(
    tmp_path: Path, point: str, acts_before: int, acts: int, code: str
) -> None:
    run = Run(tmp_path)
    assert run(point) == (-signal.SIGKILL, [])
    assert run.acts == acts_before
    returned, sent = run("never")
    assert returned == 0
    assert [(each["id"], each["ok"], each["code"]) for each in sent] == [("once", not code, code)]
    assert run.acts == acts
    assert run("never")[1] == sent, "and from memory ever after"
    assert run.acts == acts
