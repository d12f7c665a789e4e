from __future__ import annotations

from pathlib import Path

import numpy as np
import onnxruntime

from tests.benchmarks.tensor.models import EMBEDDING, MASK, echo, pooled, ramp


def run(path: Path, feed: dict[str, object], outputs: list[str] | None = None) -> list[np.ndarray]:
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    found: list[np.ndarray] = session.run(outputs, feed)
    return found


def test_the_pooled_encoder_returns_the_mean_of_the_real_tokens_at_length_1(encoder_path: Path, tmp_path: Path) -> None:
    path = pooled(encoder_path, tmp_path / "pooled.onnx")
    ids = np.array([[1, 2, 0], [3, 3, 1]], np.int64)
    mask = np.array([[1, 1, 0], [1, 1, 0]], np.int64)
    (embedding,) = run(path, {"input_ids": ids, MASK: mask}, [EMBEDDING])
    assert np.allclose(embedding, [[0.6, 0.8], [0.5**0.5, 0.5**0.5]])


def test_the_echo_returns_its_input_or_only_a_column(tmp_path: Path) -> None:
    x = np.arange(6, dtype=np.float32).reshape(2, 3)
    y, first = run(echo(tmp_path / "echo.onnx"), {"x": x}, ["y", "first"])
    assert np.array_equal(y, x)
    assert np.array_equal(first, [[0], [3]])


def test_the_ramp_fills_the_shape_that_is_asked_for(tmp_path: Path) -> None:
    (y,) = run(ramp(tmp_path / "ramp.onnx"), {"shape": np.array([2, 3])})
    assert y.shape == (2, 3)
    assert y.dtype == np.float32
