"""What models for texts are calibrated and compared on: sentences, as their own tokenizer reads them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from appliance.core.errors import InvalidRequestError
from appliance.engine.onnx.samples import SENTENCES
from appliance.engine.onnx.side_by_side import Session
from appliance.engine.onnx.trials import Trial, trial_of
from appliance.registry.onnx_header import read_onnx
from tests import tiny_encoders, tiny_onnx
from tests.tiny_encoders import TINY


def trial(task: str, folder: Path, path: Path | None = None) -> Trial:
    graph = folder / "model.onnx"
    return trial_of(task, read_onnx(graph).signature, graph, path, can_run=lambda _: False)


def answers(folder: Path, measured: Trial, index: int = 0) -> tuple[dict[str, Any], dict[str, Any]]:
    inputs = measured.samples[index]
    outputs = measured.read(index, Session(folder / "model.onnx", 1).run(inputs))
    return dict(inputs), dict(outputs)


def test_an_encoder_is_compared_by_its_vectors(tmp_path: Path) -> None:
    folder = tiny_encoders.write_tiny_encoder(tmp_path)
    sentences = tmp_path / "sentences.jsonl"
    sentences.write_text('"The pump stops."\n{"text": "Why is the motor hot?"}\n' * 5)
    measured = trial("embedding", folder, sentences)
    assert (len(measured), measured.data, measured.is_made_up) == (2, "10 sentences of sentences.jsonl", False)
    assert measured.has_lengths
    inputs, outputs = answers(folder, measured)
    weights = tiny_encoders.random_weights(TINY)
    assert len(outputs["embedding"]) == 8
    for ids, mask, vector in zip(inputs["input_ids"], inputs["attention_mask"], outputs["embedding"], strict=True):
        wanted = tiny_encoders.mean_vector(weights, TINY, ids[mask == 1].tolist())
        assert wanted @ vector == pytest.approx(1, abs=1e-5)
    assert len(answers(folder, measured, 1)[1]["embedding"]) == 2


def test_without_sentences_some_of_ours_are_taken(tmp_path: Path) -> None:
    measured = trial("embedding", tiny_encoders.write_tiny_encoder(tmp_path))
    assert measured.is_made_up
    assert sum(len(measured.samples[each]["input_ids"]) for each in range(len(measured))) == len(SENTENCES)
    assert max(measured.samples[each]["input_ids"].shape[1] for each in range(len(measured))) == 48


def test_a_cross_encoder_is_compared_by_the_scores_of_pairs(tmp_path: Path) -> None:
    folder = tiny_encoders.write_tiny_cross_encoder(tmp_path)
    inputs, outputs = answers(folder, trial("rerank", folder))
    assert outputs["probability"].shape == (8, 1)
    assert set(np.unique(inputs["token_type_ids"])) == {0, 1}


def test_a_classifier_is_compared_by_its_probabilities(tmp_path: Path) -> None:
    folder = tiny_encoders.write_tiny_classifier(tmp_path)
    _, outputs = answers(folder, trial("classification", folder))
    assert outputs["probability"].shape == (8, 3)
    assert outputs["probability"].sum(axis=1) == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("shape", [{"sizes": (1, "sequence")}, {"inputs": ("input_ids",)}])
def test_texts_that_cannot_share_a_run_come_one_by_one(tmp_path: Path, shape: Any) -> None:
    """A graph for one row, and one without a mask, which would read the padding."""
    folder = tiny_encoders.write_tiny_encoder(tmp_path)
    tiny_encoders.write_bert(folder / "model.onnx", tiny_encoders.random_weights(TINY), TINY, **shape)
    measured = trial("embedding", folder)
    assert len(measured) == len(SENTENCES)
    assert answers(folder, measured)[1]["embedding"].shape == (1, TINY.hidden)


@pytest.mark.parametrize("task", ["tensor", "embedding"])
def test_a_model_without_a_tokenizer_takes_tensors(tmp_path: Path, task: str) -> None:
    graph = tiny_onnx.tabular(tmp_path / "model.onnx")
    measured = trial_of(task, read_onnx(graph).signature, graph, None, can_run=Session(graph, 1).can_run)
    assert (measured.data, measured.has_lengths) == ("random numbers", False)
    assert set(answers(tmp_path, measured)[1]) == {"probabilities"}


def test_arrays_are_of_no_use_to_a_model_for_texts(tmp_path: Path) -> None:
    folder = tiny_encoders.write_tiny_encoder(tmp_path)
    with pytest.raises(InvalidRequestError, match="is a folder, and the model reads texts"):
        trial("embedding", folder, folder)
