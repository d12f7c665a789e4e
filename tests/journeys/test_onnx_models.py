"""The catalog's ONNX models as the command line pulled them: whole, sound, and fit for the libraries that run them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime
import pytest
from tokenizers import Tokenizer

from appliance.registry.blobs import Blobs
from appliance.registry.layout import lay_out
from appliance.registry.versions import Registry
from appliance.store.database import Database
from tests.journeys.processes import appliance

pytestmark = [pytest.mark.journey, pytest.mark.timeout(300)]

ENCODER = "all-minilm-l6-v2"
TENSORS = ("silero-vad", "pp-ocrv6-det-small", "pp-ocrv6-rec-small", "pp-ocr-cls-mobile")


@pytest.fixture
def registry(real_data: Path) -> Iterator[Registry]:
    with closing(Database(real_data / "appliance.db")) as database:
        yield Registry(database, Blobs(real_data / "models" / "blobs"))


@pytest.fixture
def encoder(registry: Registry, tmp_path: Path) -> Path:
    return lay_out(registry.resolve(ENCODER), tmp_path / "onnx")


def told(data: Path, *arguments: str) -> Any:
    done = appliance("models", *arguments, "--json", data=data)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def session(path: Path) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def embed(folder: Path, texts: Sequence[str]) -> npt.NDArray[np.float32]:
    """Return mean-pooled unit vectors, as 1_Pooling/config.json asks for."""
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.enable_padding()
    found = tokenizer.encode_batch(list(texts))
    mask = np.array([each.attention_mask for each in found])
    inputs = {
        "input_ids": np.array([each.ids for each in found]),
        "attention_mask": mask,
        "token_type_ids": np.zeros_like(mask),
    }
    (states,) = session(folder / "model.onnx").run(None, inputs)
    means = (states * mask[..., None]).sum(1) / mask.sum(1, keepdims=True)
    vectors: npt.NDArray[np.float32] = means / np.linalg.norm(means, axis=1, keepdims=True)
    return vectors


def test_the_encoder_is_pulled_with_all_its_files(real_data: Path) -> None:
    pulled = told(real_data, "pull", ENCODER)
    assert pulled["was_present"] is True
    assert (pulled["kind"], pulled["task"], pulled["architecture"]) == ("onnx", "embedding", "bert")
    assert (pulled["quantisation"], pulled["context_length"]) == ("int8", 256)
    assert pulled["signature"]["batched"] is True
    assert [each["name"] for each in pulled["signature"]["inputs"]] == ["input_ids", "attention_mask", "token_type_ids"]
    assert pulled["signature"]["outputs"] == [{"name": "last_hidden_state", "datatype": "FP32", "shape": [-1, -1, 384]}]
    assert {each["role"] for each in pulled["files"]} == {
        "model",
        "tokenizer.json",
        "config.json",
        "1_Pooling/config.json",
        "modules.json",
        "sentence_bert_config.json",
        "tokenizer_config.json",
        "special_tokens_map.json",
    }
    assert all(each["sound"] for each in told(real_data, "verify", ENCODER))


def test_the_encoder_tells_alike_from_unlike(encoder: Path) -> None:
    heat, warmth, tax = embed(
        encoder, ["A heat pump moves heat.", "Heat pumps transport warmth.", "The tax return is due in May."]
    )
    assert heat @ warmth > 0.6
    assert heat @ tax < 0.2


def test_the_folder_can_be_imported_under_a_name_of_ones_own(encoder: Path, real_data: Path, tmp_path: Path) -> None:
    data = tmp_path / "data"
    imported = told(data, "import", str(encoder), "--name", "mine")
    pulled = told(real_data, "show", ENCODER)
    alike = ("task", "architecture", "quantisation", "context_length", "signature", "size")
    assert {each: imported[each] for each in alike} == {each: pulled[each] for each in alike}


@pytest.mark.parametrize("name", TENSORS)
def test_a_model_of_tensors_is_what_onnxruntime_says_of_it(registry: Registry, name: str) -> None:
    model = registry.resolve(name)
    graph = model.file("model")
    assert graph is not None
    assert model.signature is not None
    loaded = session(graph.path)
    for specs, found in (
        (model.signature.inputs, loaded.get_inputs()),
        (model.signature.outputs, loaded.get_outputs()),
    ):
        assert [each.name for each in specs] == [each.name for each in found]
        for spec, value in zip(specs, found, strict=True):
            shape = [size if isinstance(size, int) and size >= 0 else -1 for size in value.shape]
            assert len(spec.shape) == len(shape)
            # What the file leaves open onnxruntime may find out from the operators.
            assert all(said in (-1, known) for said, known in zip(spec.shape, shape, strict=True))
