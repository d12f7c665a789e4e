"""Boxes for the door's tests."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.api.boxes import Box, ScriptedBox, real_box, scripted_box


@pytest.fixture
async def box(tmp_path: Path) -> AsyncIterator[ScriptedBox]:
    """Return a box whose serving floor follows a script."""
    async with scripted_box(tmp_path) as each:
        yield each


@pytest.fixture(params=["scripted", "engine"])
async def any_box(request: pytest.FixtureRequest, tmp_path: Path, tiny_model_path: Path) -> AsyncIterator[Box]:
    """Return a box of either kind: what holds for the scripted floor must hold for the real one."""
    if request.param == "scripted":
        async with scripted_box(tmp_path) as scripted:
            yield scripted
    else:
        async with real_box(tmp_path, tiny_model_path) as real:
            yield real
