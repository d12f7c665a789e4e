"""What is served: the catalog's encoder, the same with its pooling in the graph, and small models of tensors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from tokenizers import Tokenizer

from tests.tiny_onnx import BATCH, tabular, tensor, write

ENCODER = "all-minilm-l6-v2"
"""In the catalog."""
POOLED, ECHO, RAMP, TABULAR = "benchmark-pooled", "benchmark-echo", "benchmark-ramp", "benchmark-tabular"
DERIVED = (POOLED, ECHO, RAMP, TABULAR)
"""Imported into the appliance, and served by MLServer too."""

HIDDEN_STATE, MASK, EMBEDDING = "last_hidden_state", "attention_mask", "sentence_embedding"


@dataclass(frozen=True, slots=True)
class Models:
    """The files of everything that is served.

    Attributes:
        encoder: The graph of the catalog's encoder.
        tokenizer: Its `tokenizer.json`.
        folder: Has those of `DERIVED`, each named after its model.
    """

    encoder: Path
    tokenizer: Path
    folder: Path

    def path(self, name: str) -> Path:
        """Return the graph of a model."""
        return self.encoder if name == ENCODER else self.folder / f"{name}.onnx"

    def write(self) -> None:
        """Write the graphs that are derived; the same ones each time."""
        self.folder.mkdir(parents=True, exist_ok=True)
        pooled(self.encoder, self.path(POOLED))
        echo(self.path(ECHO))
        ramp(self.path(RAMP))
        tabular(self.path(TABULAR))


class Tokens:
    """Makes tokens of texts as the encoder's own file says, but neither truncates nor pads."""

    def __init__(self, path: Path) -> None:
        self._tokenizer = Tokenizer.from_file(str(path))
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()

    def count(self, text: str) -> int:
        """Return the tokens of a text, those at its begin and end among them."""
        return len(self._tokenizer.encode(text).ids)

    def ids(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the token ids of each text."""
        return [each.ids for each in self._tokenizer.encode_batch(list(texts))]


def pooled(source: Path, target: Path) -> Path:
    """Copy an encoder whose graph ends in a mean over the real tokens, of length 1: `sentence_embedding` FP32.

    So an answer over the protocol is one embedding and not the hidden states of every token.
    """
    model = onnx.load(source)
    (hidden,) = (each for each in model.graph.output if each.name == HIDDEN_STATE)
    width = hidden.type.tensor_type.shape.dim[-1].dim_value
    model.graph.initializer.extend(
        [
            numpy_helper.from_array(np.array([-1]), "pooling/last_axis"),
            numpy_helper.from_array(np.array([1]), "pooling/token_axis"),
        ]
    )
    model.graph.node.extend(
        [
            helper.make_node("Unsqueeze", [MASK, "pooling/last_axis"], ["pooling/mask_column"]),
            helper.make_node("Cast", ["pooling/mask_column"], ["pooling/weights"], to=TensorProto.FLOAT),
            helper.make_node("Mul", [HIDDEN_STATE, "pooling/weights"], ["pooling/weighted"]),
            helper.make_node("ReduceSum", ["pooling/weighted", "pooling/token_axis"], ["pooling/sum"], keepdims=0),
            helper.make_node("ReduceSum", ["pooling/weights", "pooling/token_axis"], ["pooling/tokens"], keepdims=0),
            helper.make_node("Div", ["pooling/sum", "pooling/tokens"], ["pooling/mean"]),
            helper.make_node("LpNormalization", ["pooling/mean"], [EMBEDDING], axis=-1, p=2),
        ]
    )
    del model.graph.output[:]
    model.graph.output.append(tensor(EMBEDDING, "FP32", (hidden.type.tensor_type.shape.dim[0].dim_param, width)))
    target.write_bytes(model.SerializeToString())
    return target


def echo(path: Path) -> Path:
    """`x` FP32 [batch, n] → `y`, the same; `first` [batch, 1] is its first column, for who only wants to send."""
    nodes = [
        helper.make_node("Identity", ["x"], ["y"]),
        helper.make_node("Slice", ["x", "begin", "end", "axis"], ["first"]),
    ]
    shape = (BATCH, "n")
    outputs = [tensor("y", "FP32", shape), tensor("first", "FP32", (BATCH, 1))]
    constants = {"begin": np.array([0]), "end": np.array([1]), "axis": np.array([1])}
    return write(path, nodes, [tensor("x", "FP32", shape)], outputs, constants)


def ramp(path: Path) -> Path:
    """`shape` INT64 [2] → `y` FP32 of that shape, for who only wants to receive."""
    node = helper.make_node(
        "ConstantOfShape", ["shape"], ["y"], value=helper.make_tensor("", TensorProto.FLOAT, [1], [0.5])
    )
    return write(path, [node], [tensor("shape", "INT64", (2,))], [tensor("y", "FP32", ("rows", "columns"))])
