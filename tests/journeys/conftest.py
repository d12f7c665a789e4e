"""Data folders with a tiny or the real model."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.journeys.processes import appliance


@pytest.fixture
def tiny_data(tmp_path: Path, tiny_model_path: Path) -> Path:
    """Return a data folder with the model `tiny`."""
    data = tmp_path / "data"
    done = appliance("models", "import", str(tiny_model_path), "--name", "tiny", "--licence", "MIT", data=data)
    assert done.returncode == 0, done.stderr
    return data


@pytest.fixture(scope="module")
def real_data() -> Path:
    """Return the data folder with the real default model; tests only read it."""
    folder = os.environ.get("APPLIANCE_TEST_MODEL_DATA")
    if not folder:
        pytest.skip("APPLIANCE_TEST_MODEL_DATA is not set: tests/check pulls the model and sets it")
    return Path(folder)
