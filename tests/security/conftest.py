"""A database and a clock for the vault's tests."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from appliance.store.database import Database


class HandClock:
    """A wall clock that the test sets by hand."""

    def __init__(self, now: float) -> None:
        self.now = now

    def monotonic(self) -> float:
        return self.now

    def unix(self) -> float:
        return self.now


@pytest.fixture
def database(tmp_path: Path) -> Iterator[Database]:
    with closing(Database(tmp_path / "appliance.db")) as each:
        yield each


@pytest.fixture
def clock() -> HandClock:
    return HandClock(1_800_000_000.0)
