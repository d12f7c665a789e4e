"""What the files beside an encoder's graph say, damaged and hostile ones included."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from appliance.core.errors import ModelFileError
from appliance.engine.onnx import dense as dense_room
from appliance.engine.onnx import folder as folder_room
from appliance.engine.onnx.dense import read_dense
from appliance.engine.onnx.folder import read_encoder_files
from appliance.engine.onnx.pooling import Pooling
from tests.tiny_encoders import write_json, write_safetensors

TYPES = "sentence_transformers.models."
WEIGHT = np.array([[1.0, 2.0, 3.0], [-1.0, 0.5, 0.0]], np.float32)
BIAS = np.array([0.25, -0.25], np.float32)
WHOLE = {"linear.weight": WEIGHT, "linear.bias": BIAS}


def modules(*steps: tuple[str, str]) -> list[dict[str, str]]:
    return [{"type": TYPES + kind, "path": path} for kind, path in steps]


def with_header(header: bytes) -> bytes:
    return len(header).to_bytes(8, "little") + header


def write_dense(folder: Path, weights: bytes | Mapping[str, Any] = WHOLE, **changes: Any) -> Path:
    config = {"in_features": 3, "out_features": 2, "bias": True, "activation_function": "torch.nn.Identity"}
    write_json(folder / "config.json", config | changes)
    if isinstance(weights, bytes):
        (folder / "model.safetensors").write_bytes(weights)
    else:
        write_safetensors(folder / "model.safetensors", weights)
    return folder


def test_a_folder_without_files_is_pooled_by_the_mean_and_has_no_limits(tmp_path: Path) -> None:
    files = read_encoder_files(tmp_path)
    assert files.poolings == (Pooling.MEAN,)
    assert files.lengths == {}
    assert (files.vocabulary_size, files.hidden_size, files.padding_id, files.labels) == (None, None, 0, ())
    assert files.exclusive
    assert not files.lower_case
    assert not files.matryoshka


def test_every_file_that_has_a_limit_is_heard(tmp_path: Path) -> None:
    write_json(tmp_path / "sentence_bert_config.json", {"max_seq_length": 256, "do_lower_case": True})
    write_json(tmp_path / "tokenizer_config.json", {"model_max_length": 512})
    write_json(tmp_path / "config.json", {"max_position_embeddings": 514, "pad_token_id": 1, "model_type": "roberta"})
    files = read_encoder_files(tmp_path)
    limits = {"sentence_bert_config.json": 256, "tokenizer_config.json": 512, "config.json": 512}
    assert files.lengths == limits
    assert files.lower_case
    assert files.padding_id == 1


def test_a_limit_that_is_none_does_not_count(tmp_path: Path) -> None:
    write_json(tmp_path / "sentence_bert_config.json", {"max_seq_length": None})
    write_json(tmp_path / "tokenizer_config.json", {"model_max_length": int(1e30)})
    write_json(tmp_path / "config.json", {"max_position_embeddings": -1, "pad_token_id": None, "dim": 24})
    files = read_encoder_files(tmp_path)
    assert files.lengths == {"tokenizer_config.json": int(1e30)}
    assert files.hidden_size == 24


def test_labels_come_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    names = {str(number): f"label {number}" for number in reversed(range(12))}
    write_json(tmp_path / "config.json", {"id2label": names, "problem_type": "multi_label_classification"})
    files = read_encoder_files(tmp_path)
    assert files.labels == tuple(f"label {number}" for number in range(12))
    assert not files.exclusive


def test_labels_may_stand_in_a_text_file(tmp_path: Path) -> None:
    (tmp_path / "labels.txt").write_text("calm\r\n\n 大声 \nbroken", encoding="utf-8")
    assert read_encoder_files(tmp_path).labels == ("calm", "大声", "broken")


def test_a_nested_representation_is_told(tmp_path: Path) -> None:
    write_json(tmp_path / "config.json", {"matryoshka_dimensions": [64, 128]})
    assert read_encoder_files(tmp_path).matryoshka


def test_a_prompt_counts_only_where_it_is_the_default(tmp_path: Path) -> None:
    prompts: dict[str, Any] = {"prompts": {"query": "query: ", "document": None}}
    for default, prompt in ((None, ""), ("query", "query: "), ("document", "")):
        write_json(tmp_path / "config_sentence_transformers.json", prompts | {"default_prompt_name": default})
        assert read_encoder_files(tmp_path).prompt == prompt


def test_a_prompt_that_is_left_out_of_the_pooling_is_refused(tmp_path: Path) -> None:
    write_json(tmp_path / "1_Pooling" / "config.json", {"include_prompt": False})
    prompts: dict[str, Any] = {"prompts": {"query": "query: "}, "default_prompt_name": "query"}
    read_encoder_files(tmp_path)
    write_json(tmp_path / "config_sentence_transformers.json", prompts)
    with pytest.raises(ModelFileError, match="leaves its prompt out"):
        read_encoder_files(tmp_path)


@pytest.mark.parametrize("activation", ["torch.nn.modules.activation.Sigmoid", "torch.nn.modules.linear.Identity"])
def test_the_score_of_a_pair_is_a_sigmoid_or_becomes_one(tmp_path: Path, activation: str) -> None:
    write_json(tmp_path / "config.json", {"sentence_transformers": {"activation_fn": activation}})
    read_encoder_files(tmp_path)


def test_the_steps_are_read_from_the_folders_that_are_named(tmp_path: Path) -> None:
    steps = (("Transformer", ""), ("Pooling", "p"), ("Dense", "d"), ("Dropout", "x"), ("Normalize", "n"))
    write_json(tmp_path / "modules.json", modules(*steps))
    write_json(tmp_path / "p" / "config.json", {"pooling_mode_cls_token": True})
    write_dense(tmp_path / "d")
    files = read_encoder_files(tmp_path)
    assert files.poolings == (Pooling.CLS,)
    assert len(files.dense) == 1


@pytest.mark.parametrize(
    ("file", "content", "reason"),
    [
        ("config.json", {"sentence_transformers": {"activation_fn": "torch.nn.Tanh"}}, r"activation 'torch\.nn\.Tanh'"),
        ("config.json", {"sbert_ce_default_activation_function": "torch.nn.ReLU"}, "ReLU"),
        ("config.json", {"id2label": {"0": "a", "2": "b"}}, "numbered from 0"),
        ("config.json", {"id2label": {"0": 5}}, "id2label"),
        ("config.json", {"max_position_embeddings": "many"}, "max_position_embeddings"),
        ("config.json", ["no", "object"], "config.json cannot be used"),
        ("modules.json", {"no": "list"}, "modules.json cannot be used"),
        ("modules.json", [{"path": ""}], "missing required field `type`"),
        ("modules.json", modules(("CLIPModel", "")), "CLIPModel"),
        ("modules.json", modules(("Pooling", "../../etc")), "outside the model's folder"),
        ("modules.json", modules(("Pooling", "/etc")), "outside the model's folder"),
        ("modules.json", modules(("Dense", "a\0b")), "outside the model's folder"),
        ("modules.json", modules(("Dense", "2_Dense")), "whose config.json is not there"),
        ("1_Pooling/config.json", {"pooling_mode_by_magic": True}, "pooling_mode_by_magic"),
        ("config_sentence_transformers.json", {"default_prompt_name": "query"}, "no prompt 'query'"),
        ("config_sentence_transformers.json", {"prompts": {"query": 5}}, "prompts"),
        ("sentence_bert_config.json", {"max_seq_length": 1.5}, "sentence_bert_config.json cannot be used"),
        ("tokenizer_config.json", {"model_max_length": "long"}, "tokenizer_config.json cannot be used"),
    ],
)
def test_files_that_make_no_sense_are_refused(tmp_path: Path, file: str, content: Any, reason: str) -> None:
    write_json(tmp_path / file, content)
    with pytest.raises(ModelFileError, match=reason):
        read_encoder_files(tmp_path)


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe\x00", b"[" * 100_000, b'{"a":' * 100_000, b'{"dim": 1e999}'])
@pytest.mark.parametrize("file", ["config.json", "modules.json"])
def test_files_that_are_damaged_are_refused(tmp_path: Path, file: str, content: bytes) -> None:
    (tmp_path / file).write_bytes(content)
    with pytest.raises(ModelFileError, match=file):
        read_encoder_files(tmp_path)


def test_labels_that_are_no_text_are_refused(tmp_path: Path) -> None:
    (tmp_path / "labels.txt").write_bytes(b"\xff\xfe")
    with pytest.raises(ModelFileError, match="UTF-8"):
        read_encoder_files(tmp_path)


def test_a_file_that_is_too_large_is_not_read(tmp_path: Path) -> None:
    with (tmp_path / "config.json").open("wb") as file:
        file.truncate(folder_room.LARGEST_FILE + 1)
    with pytest.raises(ModelFileError, match=str(folder_room.LARGEST_FILE + 1)):
        read_encoder_files(tmp_path)


def test_a_file_that_cannot_be_read_is_told(tmp_path: Path) -> None:
    (tmp_path / "config.json").mkdir()
    with pytest.raises(ModelFileError, match="Is a directory"):
        read_encoder_files(tmp_path)


# Dense layers


def test_a_dense_layer_is_evaluated_as_its_files_say(tmp_path: Path) -> None:
    vectors = np.array([[1.0, 0.0, -1.0], [0.5, 0.5, 0.5]], np.float32)
    straight = vectors @ WEIGHT.T + BIAS
    assert read_dense(write_dense(tmp_path))(vectors) == pytest.approx(straight)
    bent = write_dense(tmp_path, activation_function="torch.nn.modules.activation.Tanh")
    assert read_dense(bent)(vectors) == pytest.approx(np.tanh(straight))


def test_a_dense_layer_may_have_no_bias_and_half_precision(tmp_path: Path) -> None:
    layer = read_dense(write_dense(tmp_path, {"linear.weight": WEIGHT.astype(np.float16)}, bias=False))
    assert layer(np.eye(3, dtype=np.float32)) == pytest.approx(WEIGHT.T)


def tensor_header(**changes: Any) -> bytes:
    entry = {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]} | changes
    return with_header(json.dumps({"linear.weight": entry}).encode()) + bytes(24)


@pytest.mark.parametrize(
    ("weights", "reason"),
    [
        (b"", "announces a header of 0 bytes"),
        (b"\xff" * 8, "announces a header of 18446744073709551615 bytes"),
        (with_header(b"{}")[:-1], "announces a header of 2 bytes"),
        (with_header(b"[" * 100_000), "cannot be used"),
        (with_header(b'{"linear.weight": 5}'), "cannot be used"),
        (tensor_header(dtype="BF16"), "type BF16"),
        (tensor_header(data_offsets=[0, 25]), "is damaged"),
        (tensor_header(data_offsets=[-4, 20]), "is damaged"),
        (tensor_header(data_offsets=[24, 0]), "is damaged"),
        (tensor_header(shape=[-2, -3]), "is damaged"),
        (tensor_header(shape=[2**40, 2**40]), "is damaged"),
        (tensor_header(shape=[3, 2]), r"no weights of shape \[2, 3\]"),
        ({"other": WEIGHT}, r"no weights of shape \[2, 3\]"),
        ({"linear.weight": WEIGHT}, r"no weights of shape \[2, 3\]"),
        (WHOLE | {"linear.bias": BIAS[:1]}, r"no weights of shape \[2, 3\]"),
    ],
)
def test_weights_that_are_damaged_are_refused(tmp_path: Path, weights: bytes | Mapping[str, Any], reason: str) -> None:
    with pytest.raises(ModelFileError, match=reason):
        read_dense(write_dense(tmp_path, weights))


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"activation_function": "torch.nn.modules.activation.Softshrink"}, "Softshrink"),
        ({"in_features": "three"}, "in_features"),
        ({"out_features": -1, "bias": False}, r"no weights of shape \[-1, 3\]"),
    ],
)
def test_a_dense_layer_that_is_not_known_is_refused(tmp_path: Path, changes: dict[str, Any], reason: str) -> None:
    with pytest.raises(ModelFileError, match=reason):
        read_dense(write_dense(tmp_path, **changes))


def test_a_dense_layer_whose_weights_are_a_pickle_is_refused(tmp_path: Path) -> None:
    (write_dense(tmp_path) / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    with pytest.raises(ModelFileError, match=r"model\.safetensors is not there.*export it in the graph"):
        read_dense(tmp_path)


def test_weights_that_are_too_large_or_unreadable_are_told(tmp_path: Path) -> None:
    with (write_dense(tmp_path) / "model.safetensors").open("wb") as file:
        file.truncate(dense_room.LARGEST_FILE + 1)
    with pytest.raises(ModelFileError, match=str(dense_room.LARGEST_FILE + 1)):
        read_dense(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "model.safetensors").mkdir()
    with pytest.raises(ModelFileError, match="Is a directory"):
        read_dense(tmp_path)
