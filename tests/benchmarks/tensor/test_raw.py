"""Raw onnxruntime in a process of its own; how fast it is proves nothing and is not looked at."""

from __future__ import annotations

from pathlib import Path

import pytest

from appliance.core.errors import UnavailableError
from tests.benchmarks.tensor.raw import Measured, SingleJob, TextsJob, batches, lanes, measure
from tests.tiny_onnx import TABULAR_FEATURES, tabular

ROWS = [[1], [1, 2, 3], [2, 2]]


def test_batches_are_in_arrival_order_and_padded_to_their_longest() -> None:
    job = TextsJob(model="", threads=1, rows=ROWS, batch_sizes=[2], lanes=[1])
    first, second = batches(job, 2, ["input_ids", "attention_mask"])
    assert first["input_ids"].tolist() == [[1, 0, 0], [1, 2, 3]]
    assert first["attention_mask"].tolist() == [[1, 0, 0], [1, 1, 1]]
    assert second["input_ids"].tolist() == [[2, 2]]


def test_batches_are_padded_to_a_length_if_there_is_one() -> None:
    job = TextsJob(model="", threads=1, rows=ROWS, batch_sizes=[3], lanes=[1], padded_to=4)
    (batch,) = batches(job, 3, ["token_type_ids"])
    assert batch["token_type_ids"].tolist() == [[0] * 4] * 3


def test_the_best_way_is_the_fastest() -> None:
    measured = Measured(rates={"one": 10.0, "two": 30.0, "three": 20.0})
    assert (measured.best_way, measured.best_rate) == ("two", 30.0)


def test_one_evaluation_with_all_threads_and_one_for_each_are_tried() -> None:
    assert (lanes(1), lanes(4)) == ([1], [1, 4])


@pytest.mark.slow
@pytest.mark.anyio
async def test_every_batch_size_is_measured_with_every_number_of_evaluations_at_once(encoder_path: Path) -> None:
    job = TextsJob(model=str(encoder_path), threads=2, rows=ROWS, batch_sizes=[1, 2], lanes=[1, 2])
    measured = await measure(job)
    assert list(measured.rates) == [
        "1 rows, 1 at once, 2 threads each",
        "2 rows, 1 at once, 2 threads each",
        "1 rows, 2 at once, 1 threads each",
        "2 rows, 2 at once, 1 threads each",
    ]
    assert measured.best_rate > 0


@pytest.mark.slow
@pytest.mark.anyio
async def test_one_row_is_measured(tmp_path: Path) -> None:
    path = tabular(tmp_path / "tabular.onnx")
    measured = await measure(SingleJob(model=str(path), threads=1, features=[0.5] * TABULAR_FEATURES, runs=5))
    assert measured.median_s > 0


@pytest.mark.slow
@pytest.mark.anyio
async def test_a_model_that_cannot_be_evaluated_is_told(tmp_path: Path) -> None:
    job = SingleJob(model=str(tmp_path / "missing.onnx"), threads=1, features=[], runs=1)
    with pytest.raises(UnavailableError, match="did not evaluate"):
        await measure(job)
