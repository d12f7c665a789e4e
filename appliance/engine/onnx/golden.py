"""Inputs with their expected outcome, as nested lists of numbers, against what a model makes of them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from appliance.core.errors import InvalidRequestError
from appliance.core.tensors import ModelSignature
from appliance.engine.onnx.signature import DTYPES
from appliance.engine.onnx.work import Arrays


def golden_arrays(signature: ModelSignature, inputs: Mapping[str, Any]) -> Arrays:
    """Return nested lists as the tensors that a model takes.

    Raises:
        InvalidRequestError: They are none, or the model has no such input.
    """
    datatypes = {each.name: each.datatype for each in signature.inputs}
    arrays = {}
    for name, values in inputs.items():
        if name not in datatypes:
            raise InvalidRequestError(f"The model has no input {name!r:.100}.", param="tensors")
        try:
            arrays[name] = np.array(values, dtype=DTYPES[datatypes[name]])
        except (ValueError, TypeError, OverflowError) as error:
            raise InvalidRequestError(f"The input {name!r:.100} is no tensor: {error}.", param="tensors") from error
    return arrays


def largest_difference(outputs: Arrays, expected: Mapping[str, Any]) -> float:
    """Return the largest absolute difference of any number; infinite where names or shapes differ, or there is NaN."""
    worst = 0.0
    for name, values in expected.items():
        try:
            wanted = np.array(values, dtype=np.float64)
        except (ValueError, TypeError, OverflowError):
            return math.inf
        found = outputs.get(name)
        if found is None or found.shape != wanted.shape:
            return math.inf
        difference = np.abs(found.astype(np.float64) - wanted).max(initial=0.0)
        worst = max(worst, math.inf if math.isnan(difference) else float(difference))
    return worst


def cosine_distance(vector: Sequence[float], expected: Sequence[Any]) -> float:
    """Return one minus the cosine of two vectors; infinite where they cannot be compared."""
    try:
        found, wanted = np.array(vector, dtype=np.float64), np.array(expected, dtype=np.float64)
    except (ValueError, TypeError, OverflowError):
        return math.inf
    length = float(np.linalg.norm(found) * np.linalg.norm(wanted)) if found.shape == wanted.shape else 0.0
    distance = 1.0 - float(found @ wanted) / length if length else math.inf
    return math.inf if math.isnan(distance) else distance
