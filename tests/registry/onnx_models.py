"""ONNX files changed by hand, and folders as exporters write them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper

from tests.tiny_onnx import BATCH, tensor, write

TOKENS = ("input_ids", "attention_mask", "token_type_ids")
WIDTH = 8


def changed(path: Path, change: Callable[[onnx.ModelProto], object]) -> Path:
    """Change a model's message and write it again, right or wrong."""
    model = onnx.ModelProto.FromString(path.read_bytes())
    change(model)
    path.write_bytes(model.SerializeToString())
    return path


def write_encoder(path: Path, *, outputs: tuple[str, tuple[int | str, ...]] | None = None) -> Path:
    """`input_ids`, `attention_mask`, `token_type_ids` → one output, by default `last_hidden_state` of width 8."""
    name, shape = outputs or ("last_hidden_state", (BATCH, "sequence", WIDTH))
    nodes = [
        helper.make_node("Add", ["input_ids", "token_type_ids"], ["places"]),
        helper.make_node("Mul", ["places", "attention_mask"], ["kept"]),
        helper.make_node("Gather", ["table", "kept"], [name]),
    ]
    if len(shape) == 2:
        nodes[-1].output[0] = "states"
        nodes.append(helper.make_node("ReduceMean", ["states", "axes"], ["means"], keepdims=0))
        nodes.append(helper.make_node("Slice", ["means", "from", "to", "last"], [name]))
    inputs = [tensor(each, "INT64", (BATCH, "sequence")) for each in TOKENS]
    width = shape[-1] if isinstance(shape[-1], int) else WIDTH
    constants = {
        "table": np.ones((100, WIDTH), np.float32),
        "axes": np.array([1]),
        "from": np.array([0]),
        "to": np.array([width]),
        "last": np.array([1]),
    }
    return write(path, nodes, inputs, [tensor(name, "FP32", shape)], constants)


def write_folder(folder: Path, files: dict[str, Any]) -> Path:
    """Write texts, and documents as JSON."""
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return folder


ENCODER_FILES: dict[str, Any] = {
    "tokenizer.json": {"version": "1.0"},
    "config.json": {"architectures": ["BertModel"], "model_type": "bert", "max_position_embeddings": 512},
    "1_Pooling/config.json": {"pooling_mode_mean_tokens": True},
    "modules.json": [],
    "sentence_bert_config.json": {"max_seq_length": 256},
    "README.md": "not taken",
}


def write_encoder_folder(folder: Path, *, graph: str = "model.onnx", **changes: Any) -> Path:
    """Write a sentence-transformers folder."""
    write_folder(folder, {**ENCODER_FILES, **changes})
    (folder / graph).parent.mkdir(exist_ok=True)
    write_encoder(folder / graph)
    return folder


def stored(name: str, kind: int, dims: list[int], **fields: Any) -> TensorProto:
    """Return a tensor with just these fields, right or wrong."""
    return TensorProto(name=name, data_type=kind, dims=dims, **fields)
