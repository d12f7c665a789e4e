"""What of a graph's outputs is the answer for a text, and how it becomes that: a vector, or probabilities."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from appliance.core.errors import EngineError, ModelFileError
from appliance.core.tensors import Datatype, ModelSignature, TensorSpec
from appliance.engine.onnx.dense import Dense
from appliance.engine.onnx.folder import EncoderFiles
from appliance.engine.onnx.pooling import Floats, Pooling, normalised, pooled
from appliance.engine.onnx.work import Arrays

Head = Callable[[Arrays, NDArray[Any]], Floats]
"""The outputs of a batch, and the lengths of its texts, become numbers of shape (texts, numbers)."""

_FLOATS = (Datatype.FP32, Datatype.FP16)
_VECTORS, _LOGITS = "sentence_embedding", "logits"
_STATES = ("last_hidden_state", "token_embeddings")


@dataclass(frozen=True, slots=True)
class Answer:
    """What a model gives for a text.

    Attributes:
        dimensions: Numbers of its vector, or 0 if it gives logits.
        pooling: How states become the vector; `graph` is in the graph, "" not at all.
        labels: What its logits stand for; none of a vector.
        exclusive: The probabilities of the labels add up to 1.
    """

    head: Head
    dimensions: int = 0
    pooling: str = ""
    labels: tuple[str, ...] = ()
    exclusive: bool = False


def answer_of(signature: ModelSignature, files: EncoderFiles) -> Answer:
    """Return what a model gives: what its graph pools itself, else logits, else states, else any rows of numbers.

    Raises:
        ModelFileError: It gives nothing of these, or what does not fit its files.
    """
    specs = [each for each in signature.outputs if each.datatype in _FLOATS]
    tables = {each.name: each for each in specs if len(each.shape) == 2}
    states = {each.name: each for each in specs if len(each.shape) == 3}
    if _VECTORS in tables:
        return _vectors(tables[_VECTORS], files)
    if _LOGITS in tables:
        return _logits(tables[_LOGITS], files)
    if states:
        return _states(next((states[name] for name in _STATES if name in states), next(iter(states.values()))), files)
    if not tables:
        raise ModelFileError(
            f"The model gives {', '.join(each.name for each in signature.outputs)}, none of which is made of texts.",
            advice="Use it through /v2, or export it with `last_hidden_state`, `sentence_embedding` or `logits`.",
        )
    only = next(iter(tables.values()))
    return _logits(only, files) if files.labels and len(files.labels) == only.shape[1] else _vectors(only, files)


def _vectors(spec: TensorSpec, files: EncoderFiles) -> Answer:
    after = len(files.dense[-1].bias) if files.dense else files.hidden_size
    dimensions = _known(spec, after)
    return Answer(vectors_head(spec.name, dimensions), dimensions, "graph")


def _states(spec: TensorSpec, files: EncoderFiles) -> Answer:
    hidden = _known(spec, files.hidden_size)
    dimensions = hidden * len(files.poolings)
    for layer in files.dense:
        outputs, inputs = layer.weight.shape
        if inputs != dimensions:
            raise ModelFileError(f"The model's dense layer takes {inputs} numbers and gets {dimensions}.")
        dimensions = outputs
    return Answer(states_head(spec.name, hidden, files.poolings, files.dense), dimensions, "+".join(files.poolings))


def _logits(spec: TensorSpec, files: EncoderFiles) -> Answer:
    count = _known(spec, len(files.labels))
    labels = files.labels or tuple(f"LABEL_{number}" for number in range(count))
    if len(labels) != count:
        raise ModelFileError(f"The model gives {count} logits, and its files name {len(labels)} labels.")
    exclusive = files.exclusive and count > 1
    return Answer(probabilities_head(spec.name, count, exclusive=exclusive), labels=labels, exclusive=exclusive)


def _known(spec: TensorSpec, said: int | None) -> int:
    """Return the last dimension, as the graph or else the files say."""
    known = spec.shape[-1] if spec.shape[-1] > 0 else said
    if not known:
        raise ModelFileError(
            f"Neither the graph nor config.json says how many numbers the model's {spec.name} has.",
            advice="Add the config.json that belongs to the model.",
        )
    return known


def states_head(output: str, hidden: int, poolings: Sequence[Pooling], dense: Sequence[Dense]) -> Head:
    """Return how the states of each token, so many numbers, become a vector of length 1."""

    def head(outputs: Arrays, lengths: NDArray[Any]) -> Floats:
        states = outputs[output]
        texts, longest = len(lengths), int(lengths.max())
        if states.ndim != 3 or states.shape[::2] != (texts, hidden) or states.shape[1] < longest:
            raise _strange(output, states, f"[{texts}, {longest} or more, {hidden}]")
        vectors = pooled(states, lengths, poolings)
        for layer in dense:
            vectors = layer(vectors)
        return normalised(vectors)

    return head


def vectors_head(output: str, dimensions: int) -> Head:
    """Return how vectors that the graph pools itself become such of length 1."""

    def head(outputs: Arrays, lengths: NDArray[Any]) -> Floats:
        return normalised(_table(outputs, output, len(lengths), dimensions))

    return head


def probabilities_head(output: str, count: int, *, exclusive: bool) -> Head:
    """Return how so many logits become probabilities: by softmax where labels exclude each other, else by sigmoid."""

    def head(outputs: Arrays, lengths: NDArray[Any]) -> Floats:
        logits = _table(outputs, output, len(lengths), count)
        with np.errstate(all="ignore"):  # what is not a number is seen afterwards
            if not exclusive:
                alone: Floats = np.reciprocal(1 + np.exp(-logits))
                return alone
            powers: Floats = np.exp(logits - logits.max(axis=1, keepdims=True))
            powers /= powers.sum(axis=1, keepdims=True)
        return powers

    return head


def _table(outputs: Arrays, name: str, texts: int, numbers: int) -> Floats:
    values = outputs[name]
    if values.shape != (texts, numbers):
        raise _strange(name, values, f"[{texts}, {numbers}]")
    return values.astype(np.float32, copy=False)


def _strange(name: str, values: NDArray[Any], wanted: str) -> EngineError:
    return EngineError(
        f"The model's {name} has the shape {list(values.shape)}; for these texts it must be {wanted}.",
        advice="Export the model again: its graph does not do what it says.",
    )
