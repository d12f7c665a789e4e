"""What is asked of the servers: the bodies, made before the clock runs, and what the answers must have."""

from __future__ import annotations

import base64
import json
from collections.abc import Sequence
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from appliance.bench.client import ConnectionLostError
from tests.benchmarks.tensor.models import ENCODER

EMBEDDINGS = "/v1/embeddings"
HEADER_LENGTH = "Inference-Header-Content-Length"
DATATYPES = {"float32": "FP32", "int64": "INT64"}


def infer(model: str) -> str:
    """Return the path of a model's inference."""
    return f"/v2/models/{model}/infer"


def embeddings(texts: Sequence[str]) -> bytes:
    """Return a request for embeddings as the openai package makes it."""
    return msgspec.json.encode({"model": ENCODER, "input": list(texts), "encoding_format": "base64"})


def tensors(arrays: dict[str, NDArray[Any]], outputs: Sequence[str]) -> bytes:
    """Return a request with tensors as JSON, row-major and flat, as every server of the protocol takes it."""
    inputs = [
        {"name": name, "shape": array.shape, "datatype": DATATYPES[array.dtype.name], "data": array.ravel().tolist()}
        for name, array in arrays.items()
    ]
    return msgspec.json.encode({"inputs": inputs, "outputs": [{"name": name} for name in outputs]})


def encoder_tensors(ids: Sequence[int], length: int, output: str) -> bytes:
    """Return a request for an output of one sentence, padded as a client pads that knows no other's length."""
    row = np.zeros((1, length), np.int64)
    row[0, : len(ids)] = ids
    mask = (np.arange(length) < len(ids)).astype(np.int64)[np.newaxis]
    arrays = {"input_ids": row, "attention_mask": mask, "token_type_ids": np.zeros_like(row)}
    return tensors(arrays, [output])


def binary_head(array: NDArray[Any], name: str, output: str) -> bytes:
    """Return the JSON in front of one binary tensor, of a request for one binary output."""
    parameters = {"binary_data_size": array.nbytes}
    tensor = {"name": name, "shape": array.shape, "datatype": DATATYPES[array.dtype.name], "parameters": parameters}
    return msgspec.json.encode({"inputs": [tensor], "outputs": [{"name": output, "parameters": {"binary_data": True}}]})


def ramp_body(shape: Sequence[int]) -> bytes:
    """Return a request for a binary tensor of that shape."""
    tensor = {"name": "shape", "shape": [2], "datatype": "INT64", "data": list(shape)}
    return msgspec.json.encode({"inputs": [tensor], "outputs": [{"name": "y", "parameters": {"binary_data": True}}]})


def vector_of_embeddings(body: bytes) -> NDArray[np.float32]:
    """Return the first embedding of an answer of `/v1/embeddings`."""
    encoded = _document(body)["data"][0]["embedding"]
    return np.frombuffer(base64.b64decode(encoded), np.float32)


def vector_of_tensors(body: bytes) -> NDArray[np.float32]:
    """Return the first output of an answer in JSON, flat."""
    return np.array(_document(body)["outputs"][0]["data"], np.float32).ravel()


def check_embedding(vector: NDArray[np.float32]) -> None:
    """Make sure that it is an embedding at all.

    Raises:
        ConnectionLostError: It is not of length 1.
    """
    length = float(np.linalg.norm(vector))
    if not 0.99 < length < 1.01:
        raise ConnectionLostError(f"An embedding of {vector.size} numbers has the length {length:.3g} instead of 1.")


def _document(body: bytes) -> Any:
    try:
        return json.loads(body)
    except ValueError as error:
        raise ConnectionLostError(f"The answer is not JSON: {body[:200]!r}.") from error
