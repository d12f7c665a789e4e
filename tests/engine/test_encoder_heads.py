"""What of a graph's outputs is the answer, and graphs that do not do what they say."""

from __future__ import annotations

from array import array
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from appliance.core.errors import EngineError, ModelFileError
from appliance.core.tensors import Datatype, ModelSignature, TensorSpec
from appliance.engine.onnx.dense import Dense
from appliance.engine.onnx.folder import EncoderFiles, read_encoder_files
from appliance.engine.onnx.heads import Answer, answer_of
from appliance.engine.onnx.tokenizer import Row
from appliance.engine.onnx.tokens import TokenCollation, token_inputs

FILES = replace(read_encoder_files(Path("there is no such folder")), hidden_size=4)
LENGTHS = np.array([2, 3])
INPUT = TensorSpec("input_ids", Datatype.INT64, (-1, -1))


def output(name: str, *shape: int, datatype: Datatype = Datatype.FP32) -> TensorSpec:
    return TensorSpec(name, datatype, shape)


def answer(*outputs: TensorSpec, files: EncoderFiles = FILES) -> Answer:
    return answer_of(ModelSignature((INPUT,), outputs, batched=True), files)


STATES, VECTORS, LOGITS = (
    output("last_hidden_state", -1, -1, 4),
    output("sentence_embedding", -1, 4),
    output("logits", -1, 3),
)
POOLER = output("pooler_output", -1, 4)


@pytest.mark.parametrize(
    ("outputs", "pooling", "labels"),
    [
        ((STATES, POOLER), "mean", 0),
        ((POOLER, STATES), "mean", 0),
        ((output("token_embeddings", -1, -1, 4), VECTORS), "graph", 0),
        ((output("anything", -1, -1, 4), output("token_embeddings", -1, -1, 4)), "mean", 0),
        ((output("anything", -1, -1, -1),), "mean", 0),
        ((STATES, LOGITS), "", 3),
        ((POOLER,), "graph", 0),
        ((output("count", -1, datatype=Datatype.INT64), output("half", -1, -1, 4, datatype=Datatype.FP16)), "mean", 0),
    ],
)
def test_what_the_graph_pools_comes_before_logits_and_those_before_states(
    outputs: tuple[TensorSpec, ...], pooling: str, labels: int
) -> None:
    found = answer(*outputs)
    assert (found.pooling, len(found.labels)) == (pooling, labels)
    assert found.dimensions == (0 if labels else 4)


def test_the_only_rows_are_logits_if_there_is_a_label_for_each_number() -> None:
    files = replace(FILES, labels=("a", "b", "c"))
    assert answer(output("output", -1, 3), files=files).labels == ("a", "b", "c")
    assert answer(output("output", -1, 4), files=files).dimensions == 4


@pytest.mark.parametrize(
    ("outputs", "reason"),
    [
        ((output("boxes", -1, -1, -1, 4),), "gives boxes, none of which"),
        ((output("ids", -1, -1, datatype=Datatype.INT64),), "gives ids, none of which"),
        ((output("logits", -1, -1),), "how many numbers the model's logits has"),
    ],
)
def test_a_graph_that_gives_nothing_of_texts_is_refused(outputs: tuple[TensorSpec, ...], reason: str) -> None:
    with pytest.raises(ModelFileError, match=reason):
        answer(*outputs)


def test_a_graph_and_files_that_do_not_say_the_size_are_refused() -> None:
    with pytest.raises(ModelFileError, match=r"Neither the graph nor config\.json says"):
        answer(output("last_hidden_state", -1, -1, -1), files=replace(FILES, hidden_size=None))


def layer(inputs: int, outputs: int) -> Dense:
    return Dense(np.full((outputs, inputs), 0.5, np.float32), np.zeros(outputs, np.float32), lambda vectors: vectors)


def test_a_dense_layer_comes_behind_the_pooling() -> None:
    found = answer(STATES, files=replace(FILES, dense=(layer(4, 2),)))
    assert found.dimensions == 2
    [vector, _] = found.head({"last_hidden_state": np.ones((2, 3, 4), np.float32)}, LENGTHS)
    assert vector == pytest.approx([0.5**0.5, 0.5**0.5])
    graph_pools = answer(output("sentence_embedding", -1, -1), files=replace(FILES, dense=(layer(4, 2),)))
    assert graph_pools.dimensions == 2  # all steps are in the graph


def test_a_dense_layer_that_does_not_fit_is_refused() -> None:
    with pytest.raises(ModelFileError, match="dense layer takes 3 numbers and gets 4"):
        answer(STATES, files=replace(FILES, dense=(layer(3, 2),)))


@pytest.mark.parametrize(
    ("spec", "shape"),
    [
        (STATES, (2, 2, 4)),
        (STATES, (1, 3, 4)),
        (STATES, (2, 3, 5)),
        (STATES, (2, 4)),
        (VECTORS, (2, 5)),
        (VECTORS, (3, 4)),
        (VECTORS, (8,)),
        (LOGITS, (2, 2)),
        (LOGITS, (2, 3, 3)),
    ],
)
def test_outputs_of_another_shape_than_the_graph_said_are_an_error_of_the_model(
    spec: TensorSpec, shape: tuple[int, ...]
) -> None:
    with pytest.raises(EngineError, match="has the shape"):
        answer(spec).head({spec.name: np.zeros(shape, np.float32)}, LENGTHS)


@pytest.mark.parametrize("exclusive", [True, False])
def test_logits_of_any_size_become_probabilities(exclusive: bool) -> None:
    head = answer(LOGITS, files=replace(FILES, exclusive=exclusive)).head
    logits = np.array([[1e4, -1e4, 0.0], [0.0, 0.0, 0.0]], np.float16)
    [[first, second, third], even] = head({"logits": logits}, LENGTHS)
    assert (first, second) == (1, 0)
    assert third == (0 if exclusive else 0.5)
    assert even == pytest.approx([1 / 3] * 3 if exclusive else [0.5] * 3)


# Batches


def collation(*names: str, shape: tuple[int, int] = (-1, -1), spec: TensorSpec = STATES) -> TokenCollation:
    inputs = tuple(TensorSpec(name, Datatype.INT64, shape) for name in names)
    signature = ModelSignature(inputs, (spec,), batched=shape[0] < 0)
    return TokenCollation(token_inputs(signature), answer(spec).head, padding_id=9)


def row(*tokens: int, types: tuple[int, ...] | None = None) -> Row:
    return Row(array("i", tokens), None if types is None else array("i", types), len(tokens))


def test_rows_are_padded_at_the_end_and_masked() -> None:
    made = collation("input_ids", "attention_mask", "token_type_ids", "position_ids")
    arrays = made.collate([made.item(row(1, 2)), made.item(row(3, 4, 5, types=(0, 1, 1)))])
    assert arrays["input_ids"].tolist() == [[1, 2, 9], [3, 4, 5]]
    assert arrays["attention_mask"].tolist() == [[1, 1, 0], [1, 1, 1]]
    assert arrays["token_type_ids"].tolist() == [[0, 0, 0], [0, 1, 1]]
    assert arrays["position_ids"].tolist() == [[0, 1, 2], [0, 1, 2]]
    assert {each.dtype for each in arrays.values()} == {np.dtype(np.int64)}


def test_rows_share_a_batch_only_where_that_changes_nothing() -> None:
    masked, unmasked = collation("input_ids", "attention_mask"), collation("input_ids")
    alone = collation("input_ids", "attention_mask", shape=(1, -1))
    short, long = row(1), row(1, 2)
    assert masked.item(short).key == masked.item(long).key is not None
    assert unmasked.item(short).key != unmasked.item(long).key
    assert alone.item(short).key is None


def test_a_row_of_a_fixed_length_counts_in_full() -> None:
    made = collation("input_ids", "attention_mask", shape=(-1, 5))
    assert made.item(row(1, 2)).length == 5
    assert made.collate([made.item(row(1, 2))])["input_ids"].tolist() == [[1, 2, 9, 9, 9]]


def test_what_is_kept_of_a_batch_is_one_rows_numbers() -> None:
    made = collation("input_ids", spec=LOGITS)
    items = [made.item(row(1)), made.item(row(2))]
    results = made.split({"logits": np.zeros((2, 3), np.float32)}, items)
    assert [type(each) for each in results] == [array, array]
    assert [len(each) for each in results] == [3, 3]


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_what_is_not_a_number_is_an_error(value: float) -> None:
    made = collation("input_ids", spec=LOGITS)
    with pytest.raises(EngineError, match="not a number") as caught:
        made.split({"logits": np.full((1, 3), value, np.float32)}, [made.item(row(1))])
    assert caught.value.code == "not_a_number"


def inputs(*shapes: tuple[str, tuple[int, ...]]) -> ModelSignature:
    return ModelSignature(tuple(TensorSpec(name, Datatype.INT32, shape) for name, shape in shapes), (STATES,), True)


@pytest.mark.parametrize(
    ("signature", "reason"),
    [
        (inputs(("pixel_values", (-1, 3))), "takes pixel_values; a model for texts takes input_ids"),
        (inputs(), "takes nothing"),
        (inputs(("input_ids", (-1, -1)), ("past_key", (-1, -1))), "takes input_ids, past_key"),
        (inputs(("input_ids", (-1,))), "not whole numbers of one shape"),
        (inputs(("input_ids", (-1, 8)), ("attention_mask", (-1, 16))), "not whole numbers of one shape"),
        (inputs(("input_ids", (1, 8)), ("attention_mask", (-1, 8))), "not whole numbers of one shape"),
    ],
)
def test_inputs_that_are_no_tokens_are_refused(signature: ModelSignature, reason: str) -> None:
    with pytest.raises(ModelFileError, match=reason):
        token_inputs(signature)


def test_nothing_that_is_kept_holds_the_batch() -> None:
    made = collation("input_ids", spec=LOGITS)
    batch: Any = np.zeros((1, 3), np.float32)
    [result] = made.split({"logits": batch}, [made.item(row(1))])
    batch[:] = 5
    assert result.tolist() == pytest.approx([1 / 3] * 3)
