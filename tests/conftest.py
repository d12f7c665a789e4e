"""Fixtures that more than one room's tests use."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.tiny_gguf import write_tiny_llama


@pytest.fixture(scope="session")
def anyio_backend() -> str:
    """Run `async def` tests (marked `anyio`) on asyncio, as the product does."""
    return "asyncio"


@pytest.fixture(scope="session")
def tiny_model_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a tiny llama model with random weights; shared, so read only."""
    return write_tiny_llama(tmp_path_factory.mktemp("models") / "tiny.gguf")
