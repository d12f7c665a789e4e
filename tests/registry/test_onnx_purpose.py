from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from appliance.core.errors import InvalidRequestError, ModelFileError
from appliance.core.tensors import Datatype, ModelSignature, TensorSpec
from appliance.registry.onnx_purpose import MAX_CONFIG_BYTES, Purpose, read_purpose
from tests.registry.onnx_models import write_folder

HIDDEN = ("last_hidden_state", (-1, -1, 384))
LOGITS = ("logits", (-1, 3))
SCORE = ("logits", (-1, 1))
BERT = {"architectures": ["BertModel"], "model_type": "bert", "max_position_embeddings": 512}
CLASSIFIER = BERT | {"architectures": ["BertForSequenceClassification"]}


def signature(
    output: tuple[str, tuple[int, ...]] = HIDDEN,
    names: tuple[str, ...] = ("input_ids", "attention_mask"),
    datatype: Datatype = Datatype.INT64,
    shape: tuple[int, ...] = (-1, -1),
    answers: Datatype = Datatype.FP32,
) -> ModelSignature:
    inputs = tuple(TensorSpec(name, datatype, shape) for name in names)
    return ModelSignature(inputs, (TensorSpec(output[0], answers, output[1]),), batched=True)


def purpose(folder: Path, found: ModelSignature, files: dict[str, Any], task: str | None = None) -> Purpose:
    write_folder(folder, files)
    return read_purpose(found, {name: folder / name for name in files}, task)


TEXT: dict[str, Any] = {"tokenizer.json": {}}

TASKS: list[tuple[ModelSignature, dict[str, Any], str]] = [
    (signature(), TEXT | {"config.json": BERT}, "embedding"),
    (signature(), TEXT, "embedding"),
    (signature(("sentence_embedding", (-1, 384))), TEXT, "embedding"),
    (signature(SCORE), TEXT | {"config.json": CLASSIFIER}, "rerank"),
    (signature(SCORE), TEXT, "rerank"),
    (signature(LOGITS), TEXT | {"config.json": CLASSIFIER}, "classification"),
    (signature(LOGITS), TEXT, "classification"),
    (signature(("logits", (-1, -1))), TEXT | {"config.json": CLASSIFIER | {"id2label": {"0": "a"}}}, "rerank"),
    (signature(("logits", (-1, -1))), TEXT | {"config.json": CLASSIFIER | {"num_labels": 1}}, "rerank"),
    (signature(("logits", (-1, -1))), TEXT | {"labels.txt": "yes\n\n"}, "rerank"),
    (signature(("logits", (-1, -1))), TEXT | {"labels.txt": "yes\nno\n"}, "classification"),
    (signature(("logits", (-1, -1))), TEXT | {"config.json": CLASSIFIER}, "classification"),
    (signature(("logits", (-1, -1, 9))), TEXT | {"config.json": {"architectures": ["BertForMaskedLM"]}}, "tensor"),
    (signature(("logits", (-1, -1, 9))), TEXT | {"config.json": CLASSIFIER}, "tensor"),
    (signature(answers=Datatype.INT64), TEXT, "tensor"),
    (signature(datatype=Datatype.FP32), TEXT, "tensor"),
    (signature(shape=(-1,)), TEXT, "tensor"),
    (signature(names=("input_ids", "pixel_values")), TEXT, "tensor"),
    (signature(names=("pixel_values",)), TEXT, "tensor"),
    (signature(), {"config.json": BERT}, "tensor"),
    (signature(LOGITS, names=("image",)), {"labels.txt": "cat\ndog\n"}, "tensor"),
]


@pytest.mark.parametrize(("found", "files", "task"), TASKS)
def test_the_task_follows_from_the_files(
    tmp_path: Path, found: ModelSignature, files: dict[str, Any], task: str
) -> None:
    assert purpose(tmp_path, found, files).task == task


def test_what_a_person_says_counts(tmp_path: Path) -> None:
    assert purpose(tmp_path, signature(), TEXT, "tensor").task == "tensor"
    assert purpose(tmp_path, signature(SCORE), TEXT, "classification").task == "classification"


@pytest.mark.parametrize(
    ("found", "files", "reason"),
    [
        (signature(), {}, "it has no tokenizer.json"),
        (signature(names=("image",)), TEXT, "its inputs are 'image', not input_ids"),
        (signature(datatype=Datatype.FP32), TEXT, "not whole numbers in rows and columns"),
    ],
)
def test_a_task_that_the_files_do_not_allow_is_refused(
    tmp_path: Path, found: ModelSignature, files: dict[str, Any], reason: str
) -> None:
    with pytest.raises(InvalidRequestError, match=reason) as refused:
        purpose(tmp_path, found, files, "embedding")
    assert refused.value.param == "task"


@pytest.mark.parametrize(
    ("files", "length"),
    [
        ({"config.json": BERT}, 512),
        ({"config.json": BERT, "sentence_bert_config.json": {"max_seq_length": 256}}, 256),
        ({"sentence_bert_config.json": {"max_seq_length": None}}, 0),
        ({"config.json": BERT | {"max_position_embeddings": -1}}, 0),
        ({"config.json": BERT | {"max_position_embeddings": 2**60}}, 0),
        ({}, 0),
    ],
)
def test_the_length_is_that_of_sentence_transformers_or_else_of_the_model(
    tmp_path: Path, files: dict[str, Any], length: int
) -> None:
    assert purpose(tmp_path, signature(), TEXT | files).context_length == length


def test_the_architecture_is_the_one_that_the_configuration_names(tmp_path: Path) -> None:
    assert purpose(tmp_path / "a", signature(), TEXT | {"config.json": BERT}).architecture == "bert"
    assert purpose(tmp_path / "b", signature(), TEXT).architecture == "onnx"
    for hostile in ("\x1b[2J", "x" * 65):
        files = TEXT | {"config.json": {"model_type": hostile}}
        assert purpose(tmp_path / "c", signature(), files).architecture == "onnx"


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{",
        "[]",
        "null",
        '{"model_type": 1}',
        '{"max_position_embeddings": 1e99}',
        "[" * 100_000,
        '{"a": "\\ud800"}',
        '{"id2label": []}',
        '{"max_position_embeddings": 1' + "0" * 5000 + "}",
    ],
)
def test_a_damaged_configuration_is_named(tmp_path: Path, content: str) -> None:
    with pytest.raises(ModelFileError, match=r"config\.json cannot be read"):
        purpose(tmp_path, signature(), TEXT | {"config.json": content})


def test_a_configuration_that_is_no_utf_8_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes(b'{"model_type": "\xff"}')
    with pytest.raises(ModelFileError, match="cannot be read"):
        read_purpose(signature(), {"config.json": tmp_path / "config.json"})


def test_a_huge_configuration_is_not_read_to_its_end(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    with path.open("wb") as file:
        file.truncate(2**40)
    with pytest.raises(ModelFileError, match=f"over {MAX_CONFIG_BYTES:,} bytes"):
        read_purpose(signature(), {"config.json": path})
