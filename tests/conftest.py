"""Fixtures that more than one room's tests use."""

from __future__ import annotations

import pytest


@pytest.fixture(scope="session")
def anyio_backend() -> str:
    """Run `async def` tests (marked `anyio`) on asyncio, as the product does."""
    return "asyncio"
