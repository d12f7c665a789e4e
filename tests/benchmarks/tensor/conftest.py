"""A tiny encoder, whose hidden states are easy to tell."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from onnx import helper

from tests.benchmarks.tensor.models import HIDDEN_STATE, MASK
from tests.tiny_onnx import tensor, write

WIDTH = 2
TABLE = np.array([[0, 0], [3, 0], [0, 4], [1, 1]], np.float32)
"""The hidden state of each token id."""


@pytest.fixture(scope="session")
def encoder_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return an encoder that looks each token up; shared, so read only."""
    shape = ("batch", "sequence")
    return write(
        tmp_path_factory.mktemp("models") / "encoder.onnx",
        [helper.make_node("Gather", ["table", "input_ids"], [HIDDEN_STATE])],
        [tensor("input_ids", "INT64", shape), tensor(MASK, "INT64", shape)],
        [tensor(HIDDEN_STATE, "FP32", (*shape, WIDTH))],
        {"table": TABLE},
    )


@pytest.fixture(autouse=True)
def work_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Let servers work in a folder of the test instead of the cache, where the peers stay."""
    monkeypatch.setattr("tests.benchmarks.peers.cache_folder", lambda: tmp_path)
    return tmp_path
