from __future__ import annotations

import base64
import json

import numpy as np
import pytest

from appliance.bench.client import ConnectionLostError
from tests.benchmarks.tensor import requests


def test_tensors_are_flat_and_row_major() -> None:
    body = json.loads(requests.tensors({"x": np.array([[1, 2], [3, 4]], np.float32)}, ["y"]))
    assert body["inputs"] == [{"name": "x", "shape": [2, 2], "datatype": "FP32", "data": [1, 2, 3, 4]}]
    assert body["outputs"] == [{"name": "y"}]


def test_a_sentence_is_padded_and_its_padding_is_masked() -> None:
    body = json.loads(requests.encoder_tensors([7, 8], 4, "out"))
    assert {each["name"]: each["data"] for each in body["inputs"]} == {
        "input_ids": [7, 8, 0, 0],
        "attention_mask": [1, 1, 0, 0],
        "token_type_ids": [0, 0, 0, 0],
    }


def test_the_head_of_a_binary_tensor_says_how_long_it_is_and_wants_a_binary_answer() -> None:
    head = json.loads(requests.binary_head(np.zeros((1, 4), np.float32), "x", "y"))
    assert head["inputs"][0]["parameters"] == {"binary_data_size": 16}
    assert head["outputs"] == [{"name": "y", "parameters": {"binary_data": True}}]


def test_embeddings_are_found_in_either_kind_of_answer() -> None:
    vector = np.array([0.6, 0.8], np.float32)
    encoded = base64.b64encode(vector.tobytes()).decode()
    assert np.array_equal(
        requests.vector_of_embeddings(json.dumps({"data": [{"embedding": encoded}]}).encode()), vector
    )
    found = requests.vector_of_tensors(b'{"outputs": [{"data": [[0.6, 0.8]]}]}')
    assert np.array_equal(found, vector)
    requests.check_embedding(found)


def test_an_answer_that_is_no_embedding_is_refused() -> None:
    with pytest.raises(ConnectionLostError, match="length 5 instead of 1"):
        requests.check_embedding(np.array([3, 4], np.float32))
    with pytest.raises(ConnectionLostError, match="not JSON"):
        requests.vector_of_tensors(b"<html>")
