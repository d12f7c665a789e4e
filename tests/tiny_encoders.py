"""Small encoders for texts, in the graph and the files that real ones have, and the same mathematics in NumPy.

The architecture is BERT: with random weights and a vocabulary of a few hundred tokens, or the weights of a real model.
The graph and `states` are written independently of each other, so that one can be the reference of the other.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper

from tests.tiny_onnx import BATCH, Dimension, tensor, write

Floats = npt.NDArray[np.float32]
Weights = Mapping[str, npt.NDArray[Any]]

SPECIALS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
WORDS = (
    *("the", "a", "of", "and", "to", "in", "is", "not", "why", "how", "when", "hello", "world", "worker", "report"),
    *(
        "pump",
        "valve",
        "motor",
        "line",
        "camera",
        "belt",
        "sensor",
        "alarm",
        "temperature",
        "pressure",
        "night",
        "shift",
    ),
    *("stops", "runs", "leaks", "checks", "opens", "closes", "reset", "hot", "cold", "loud", "new", "old", "first"),
)
CHINESE = "你好世界水泵阀门电机停止运行温度压力报警传感器相机为什么怎样工人检查打开关闭新旧夜班"
LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789.,!?-'"
INPUTS = ("input_ids", "attention_mask", "token_type_ids")


@dataclass(frozen=True)
class Shape:
    """The sizes of a BERT."""

    layers: int = 2
    heads: int = 4
    hidden: int = 32
    inner: int = 64
    positions: int = 64
    epsilon: float = 1e-12


MINILM = Shape(layers=6, heads=12, hidden=384, inner=1536, positions=512)
TINY = Shape()


def vocabulary() -> list[str]:
    """Return the tokens of the tiny encoders, by their ids."""
    pieces = [*WORDS, *dict.fromkeys(CHINESE), *LETTERS, *(f"##{each}" for each in LETTERS), "##s", "##ing"]
    return [*SPECIALS, *dict.fromkeys(pieces)]


def tokenizer_json() -> dict[str, Any]:
    """Return a WordPiece tokenizer as BERT's, which also cuts and pads by itself, as many published ones do."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

    ids = {token: number for number, token in enumerate(vocabulary())}
    tokenizer: Any = Tokenizer(models.WordPiece(ids, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True, handle_chinese_chars=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", ids["[CLS]"]), ("[SEP]", ids["[SEP]"])],
    )
    tokenizer.add_special_tokens(list(SPECIALS))
    tokenizer.enable_truncation(8)
    tokenizer.enable_padding(length=8)
    content: dict[str, Any] = json.loads(tokenizer.to_str())
    return content


def write_files(folder: Path, shape: Shape = TINY, **config: Any) -> None:
    """Write the tokenizer, and the configuration with these keys added."""
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "tokenizer.json", tokenizer_json())
    write_json(folder / "tokenizer_config.json", {"model_max_length": shape.positions, "do_lower_case": True})
    whole = {
        "model_type": "bert",
        "hidden_size": shape.hidden,
        "vocab_size": len(vocabulary()),
        "max_position_embeddings": shape.positions,
        "pad_token_id": 0,
    }
    write_json(folder / "config.json", whole | config)


def write_json(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content), encoding="utf-8")


def write_tiny_encoder(folder: Path, *, pooling: Sequence[str] = ("mean_tokens",), longest: int = 48) -> Path:
    """Write a folder of sentence-transformers with an encoder, and return it."""
    write_files(folder)
    write_json(folder / "sentence_bert_config.json", {"max_seq_length": longest, "do_lower_case": False})
    write_json(folder / "1_Pooling" / "config.json", {f"pooling_mode_{way}": True for way in pooling})
    steps = [("", "Transformer"), ("1_Pooling", "Pooling"), ("2_Normalize", "Normalize")]
    modules = [{"path": path, "type": f"sentence_transformers.models.{kind}"} for path, kind in steps]
    write_json(folder / "modules.json", modules)
    write_bert(folder / "model.onnx", random_weights(TINY), TINY)
    return folder


def write_tiny_cross_encoder(folder: Path) -> Path:
    """Write a folder with a model that gives one logit for two texts, and return it."""
    write_files(folder, id2label={"0": "LABEL_0"})
    write_bert(folder / "model.onnx", random_weights(TINY, logits=1), TINY)
    return folder


def write_tiny_classifier(folder: Path, labels: Sequence[str] = ("calm", "loud", "broken"), **config: Any) -> Path:
    """Write a folder with a model that gives a logit for each label, and return it."""
    write_files(folder, id2label={str(number): label for number, label in enumerate(labels)}, **config)
    write_bert(folder / "model.onnx", random_weights(TINY, logits=len(labels)), TINY)
    return folder


def random_weights(shape: Shape, *, logits: int = 0, seed: int = 0) -> dict[str, Floats]:
    """Return random weights under the names that Hugging Face gives them."""
    random = np.random.default_rng(seed)

    def normal(*sizes: int) -> Floats:
        return (random.standard_normal(sizes) * (0.5 if len(sizes) == 1 else sizes[-1] ** -0.5)).astype(np.float32)

    weights = {
        "embeddings.word_embeddings.weight": normal(len(vocabulary()), shape.hidden),
        "embeddings.position_embeddings.weight": normal(shape.positions, shape.hidden),
        "embeddings.token_type_embeddings.weight": normal(2, shape.hidden),
    }
    sizes = {
        "attention.self.query": (shape.hidden, shape.hidden),
        "attention.self.key": (shape.hidden, shape.hidden),
        "attention.self.value": (shape.hidden, shape.hidden),
        "attention.output.dense": (shape.hidden, shape.hidden),
        "intermediate.dense": (shape.inner, shape.hidden),
        "output.dense": (shape.hidden, shape.inner),
    }
    layers = [f"encoder.layer.{number}." for number in range(shape.layers)]
    dense = {layer + name: size for layer in layers for name, size in sizes.items()}
    if logits:
        dense |= {"pooler.dense": (shape.hidden, shape.hidden), "classifier": (logits, shape.hidden)}
    for name, (outputs, inputs) in dense.items():
        weights |= {f"{name}.weight": normal(outputs, inputs), f"{name}.bias": normal(outputs)}
    norms = [f"{layer}{name}" for layer in layers for name in ("attention.output.LayerNorm", "output.LayerNorm")]
    for name in ("embeddings.LayerNorm", *norms):
        weights |= {f"{name}.weight": 1 + 0.1 * normal(shape.hidden), f"{name}.bias": 0.1 * normal(shape.hidden)}
    return weights


def read_safetensors(path: Path) -> dict[str, npt.NDArray[Any]]:
    """Return the tensors of a file: the length of a JSON header in 8 bytes, the header, the numbers."""
    content = path.read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:start])
    header.pop("__metadata__", None)
    dtypes = {"F32": np.float32, "I64": np.int64}
    tensors = {}
    for name, entry in header.items():
        count, offset = math.prod(entry["shape"]), start + entry["data_offsets"][0]
        tensors[name] = np.frombuffer(content, dtypes[entry["dtype"]], count, offset).reshape(entry["shape"])
    return tensors


def write_safetensors(path: Path, tensors: Mapping[str, npt.NDArray[Any]]) -> None:
    """Write a file of tensors, with the header that PyTorch's have."""
    names = {np.dtype(np.float32): "F32", np.dtype(np.float16): "F16", np.dtype(np.int64): "I64"}
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    body = b""
    for name, values in tensors.items():
        offsets = [len(body), len(body) + values.nbytes]
        header[name] = {"dtype": names[values.dtype], "shape": list(values.shape), "data_offsets": offsets}
        body += values.tobytes()
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + body)


# The graph


@dataclass
class _Graph:
    """Nodes one after another; each method adds some and returns the name of the last one's output."""

    weights: Weights
    nodes: list[onnx.NodeProto] = field(default_factory=list)
    constants: dict[str, npt.NDArray[Any]] = field(default_factory=dict)

    def add(self, operator: str, *inputs: str, **attributes: Any) -> str:
        name = f"{operator}_{len(self.nodes)}"
        self.nodes.append(helper.make_node(operator, list(inputs), [name], **attributes))
        return name

    def constant(self, value: Any, dtype: Any = np.float32) -> str:
        name = f"constant_{len(self.constants)}"
        self.constants[name] = np.array(value, dtype)
        return name

    def weight(self, name: str, *, transposed: bool = False) -> str:
        key = f"{name}.T" if transposed else name
        self.constants[key] = np.ascontiguousarray(self.weights[name].T if transposed else self.weights[name])
        return key

    def dense(self, x: str, name: str) -> str:
        product = self.add("MatMul", x, self.weight(f"{name}.weight", transposed=True))
        return self.add("Add", product, self.weight(f"{name}.bias"))

    def norm(self, x: str, name: str, epsilon: float) -> str:
        scale, bias = self.weight(f"{name}.weight"), self.weight(f"{name}.bias")
        return self.add("LayerNormalization", x, scale, bias, axis=-1, epsilon=epsilon)

    def gelu(self, x: str) -> str:
        erf = self.add("Erf", self.add("Div", x, self.constant(math.sqrt(2))))
        return self.add("Mul", self.add("Mul", x, self.add("Add", erf, self.constant(1))), self.constant(0.5))

    def attention(self, x: str, mask: str, name: str, shape: Shape) -> str:
        size = shape.hidden // shape.heads
        split = self.constant([0, 0, shape.heads, size], np.int64)

        def heads(part: str, order: Sequence[int]) -> str:
            projected = self.add("Reshape", self.dense(x, f"{name}.self.{part}"), split)
            return self.add("Transpose", projected, perm=list(order))

        query, key, value = heads("query", (0, 2, 1, 3)), heads("key", (0, 2, 3, 1)), heads("value", (0, 2, 1, 3))
        scaled = self.add("Div", self.add("MatMul", query, key), self.constant(math.sqrt(size)))
        shares = self.add("Softmax", self.add("Add", scaled, mask), axis=-1)
        joined = self.add("Transpose", self.add("MatMul", shares, value), perm=[0, 2, 1, 3])
        flat = self.add("Reshape", joined, self.constant([0, 0, shape.hidden], np.int64))
        return self.dense(flat, f"{name}.output.dense")


def write_bert(
    path: Path,
    weights: Weights,
    shape: Shape,
    *,
    sizes: tuple[Dimension, Dimension] = (BATCH, "sequence"),
    datatype: str = "INT64",
    inputs: Sequence[str] = INPUTS,
) -> Path:
    """Write a BERT: `last_hidden_state`, or `logits` where the weights have a classifier."""
    graph = _Graph(weights)
    whole = {name: graph.add("Cast", name, to=TensorProto.INT64) for name in inputs}
    ids = whole["input_ids"]
    longest = graph.add("Shape", ids, start=1, end=2)
    zero, axis = graph.constant([0], np.int64), graph.constant([0], np.int64)
    positions = graph.add("Slice", graph.weight("embeddings.position_embeddings.weight"), zero, longest, axis)
    if "position_ids" in whole:
        positions = graph.add("Gather", positions, whole["position_ids"])
    types = whole.get("token_type_ids") or graph.add("Sub", ids, ids)
    mask = whole.get("attention_mask") or graph.add("Add", graph.add("Sub", ids, ids), graph.constant(1, np.int64))
    absent = graph.add("Sub", graph.constant(1), graph.add("Cast", mask, to=TensorProto.FLOAT))
    wide = graph.add("Unsqueeze", graph.add("Mul", absent, graph.constant(-1e9)), graph.constant([1, 2], np.int64))
    x = graph.add("Gather", graph.weight("embeddings.word_embeddings.weight"), ids)
    x = graph.add("Add", x, graph.add("Gather", graph.weight("embeddings.token_type_embeddings.weight"), types))
    x = graph.norm(graph.add("Add", x, positions), "embeddings.LayerNorm", shape.epsilon)
    for number in range(shape.layers):
        layer = f"encoder.layer.{number}"
        attended = graph.attention(x, wide, f"{layer}.attention", shape)
        x = graph.norm(graph.add("Add", x, attended), f"{layer}.attention.output.LayerNorm", shape.epsilon)
        inner = graph.gelu(graph.dense(x, f"{layer}.intermediate.dense"))
        x = graph.norm(
            graph.add("Add", x, graph.dense(inner, f"{layer}.output.dense")), f"{layer}.output.LayerNorm", shape.epsilon
        )
    output = tensor("last_hidden_state", "FP32", (*sizes, shape.hidden))
    if "classifier.weight" in weights:
        first = graph.add("Gather", x, graph.constant(0, np.int64), axis=1)
        x = graph.dense(graph.add("Tanh", graph.dense(first, "pooler.dense")), "classifier")
        output = tensor("logits", "FP32", (sizes[0], len(weights["classifier.bias"])))
    graph.nodes.append(helper.make_node("Identity", [x], [output.name]))
    return write(path, graph.nodes, [tensor(name, datatype, sizes) for name in inputs], [output], graph.constants)


# The same in NumPy, for one text


def states(weights: Weights, shape: Shape, tokens: Sequence[int], types: Sequence[int] | None = None) -> Floats:
    """Return the state of each token of one text, shape (tokens, hidden)."""
    ids, segments = np.array(tokens), np.zeros(len(tokens), np.int64) if types is None else np.array(types)
    x = weights["embeddings.word_embeddings.weight"][ids] + weights["embeddings.token_type_embeddings.weight"][segments]
    x = _norm(weights, "embeddings", x + weights["embeddings.position_embeddings.weight"][: len(ids)], shape)
    for number in range(shape.layers):
        layer = f"encoder.layer.{number}"
        query, key, value = (
            _dense(weights, f"{layer}.attention.self.{part}", x).reshape(len(ids), shape.heads, -1).swapaxes(0, 1)
            for part in ("query", "key", "value")
        )
        scores = query @ key.swapaxes(1, 2) / np.sqrt(np.float32(query.shape[2]))
        powers = np.exp(scores - scores.max(axis=-1, keepdims=True))
        attended = (powers / powers.sum(axis=-1, keepdims=True)) @ value
        joined = attended.swapaxes(0, 1).reshape(len(ids), shape.hidden)
        output = _dense(weights, f"{layer}.attention.output.dense", joined)
        x = _norm(weights, f"{layer}.attention.output", x + output, shape)
        inner = _dense(weights, f"{layer}.intermediate.dense", x)
        inner = 0.5 * inner * (1 + _erf(inner / np.sqrt(np.float32(2))))
        x = _norm(weights, f"{layer}.output", x + _dense(weights, f"{layer}.output.dense", inner), shape)
    result: Floats = x.astype(np.float32)
    return result


def mean_vector(weights: Weights, shape: Shape, tokens: Sequence[int]) -> Floats:
    """Return the mean of the states with length 1, as sentence-transformers pools."""
    mean = states(weights, shape, tokens).mean(axis=0)
    result: Floats = mean / np.linalg.norm(mean)
    return result


def logits(weights: Weights, shape: Shape, tokens: Sequence[int], types: Sequence[int] | None = None) -> Floats:
    """Return the logits of a text or pair."""
    first = states(weights, shape, tokens, types)[0]
    result: Floats = _dense(weights, "classifier", np.tanh(_dense(weights, "pooler.dense", first)))
    return result


def _dense(weights: Weights, name: str, x: Any) -> Any:
    return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]


def _norm(weights: Weights, name: str, x: Any, shape: Shape) -> Any:
    centred = x - x.mean(axis=-1, keepdims=True)
    scaled = centred / np.sqrt((centred**2).mean(axis=-1, keepdims=True) + shape.epsilon)
    return scaled * weights[f"{name}.LayerNorm.weight"] + weights[f"{name}.LayerNorm.bias"]


def _erf(x: Any) -> Any:
    """Return the error function to 1.5e-7 (Abramowitz and Stegun, Handbook of Mathematical Functions, 7.1.26)."""
    t = 1 / (1 + 0.3275911 * np.abs(x))
    series = t * (0.254829592 + t * (-0.284496736 + t * (1.421413741 + t * (-1.453152027 + t * 1.061405429))))
    return np.sign(x) * (1 - series * np.exp(-(x**2)))
