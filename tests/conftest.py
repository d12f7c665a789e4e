"""Fixtures that more than one room's tests use."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from tests.tiny_gguf import write_tiny_llama

# How long an example takes says something of the machine, not of the code. Where CI runs, the same code has the same
# examples, as in Hypothesis' own profile for it; everywhere else, each run looks for new ones.
settings.register_profile(
    "any machine", deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize="CI" in os.environ
)
settings.load_profile("any machine")


@pytest.fixture(scope="session")
def anyio_backend() -> tuple[str, dict[str, bool]]:
    """Run `async def` tests (marked `anyio`) on asyncio with uvloop, as the product does."""
    return "asyncio", {"use_uvloop": True}


@pytest.fixture(scope="module", autouse=True)
def what_a_file_leaves_open_fails_there() -> Iterator[None]:
    """Collect garbage after each file of tests, or a socket that it forgot fails a test of another, some time later."""
    yield
    gc.collect()


@pytest.fixture(scope="session")
def tiny_model_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a tiny llama model with random weights; shared, so read only."""
    return write_tiny_llama(tmp_path_factory.mktemp("models") / "tiny.gguf")
