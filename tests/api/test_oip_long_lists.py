"""Long lists come out of a request's JSON, and nothing else does."""

from __future__ import annotations

import json
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from appliance.api.oip.json_tensors import PIECE_BYTES, array_from_json
from appliance.api.oip.long_lists import LEAST_BYTES, cut_lists
from appliance.api.oip.request import input_tensors, read_body
from appliance.core.errors import InvalidRequestError
from appliance.core.tensors import Datatype

LONG = list(range(LEAST_BYTES))


def restored(value: Any, lists: dict[bytes, bytes]) -> Any:
    """Return a decoded document with its lists back in place."""
    if isinstance(value, dict):
        return {key: restored(each, lists) for key, each in value.items()}
    if isinstance(value, list):
        return [restored(each, lists) for each in value]
    mark = json.dumps(value, ensure_ascii=False).encode("utf-8", "surrogatepass")
    return json.loads(lists[mark]) if mark in lists else value


leaves = st.none() | st.booleans() | st.integers() | st.sampled_from(["data", '"data":[', "list 0", "list_", "]", "x"])
documents = st.recursive(
    leaves | st.just(LONG),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.sampled_from(["data", 'x"data', "name", "list 0"]), inner, max_size=4)
    ),
    max_leaves=8,
)


@pytest.mark.filterwarnings("ignore:Generating overly large repr")  # the documents are large on purpose
@given(document=documents, indent=st.none() | st.just(1))
def test_every_document_is_the_same_with_its_lists_back_in_place(document: Any, indent: int | None) -> None:
    short, lists = cut_lists(json.dumps({"data": document, "rest": document}, indent=indent).encode())
    assert restored(json.loads(short), lists) == {"data": document, "rest": document}


def test_a_long_list_is_taken_out_and_a_short_one_stays() -> None:
    text = json.dumps({"a": {"data": LONG}, "b": {"data": [1, 2]}, "c": {"data": LONG}, "d": LONG}).encode()
    short, lists = cut_lists(text)
    assert len(lists) == 2
    assert {len(json.loads(each)) for each in lists.values()} == {len(LONG)}
    assert json.loads(short)["b"] == {"data": [1, 2]}
    assert json.loads(short)["d"] == LONG


@pytest.mark.parametrize(
    "value",
    [["]"] * LEAST_BYTES, [LONG, LONG], "x" * LEAST_BYTES, {"data": 1}],
    ids=["texts", "nested", "text", "object"],
)
def test_what_is_no_flat_list_of_numbers_stays(value: Any) -> None:
    text = json.dumps({"data": value, "more": "data"}).encode()
    assert cut_lists(text) == (text, {})


def test_a_list_without_an_end_stays() -> None:
    text = b'{"data":[' + b"1," * LEAST_BYTES
    assert cut_lists(text) == (text, {})


def test_a_document_that_has_the_placeholder_itself_gets_another() -> None:
    text = json.dumps({"list": "list 0", "data": LONG}).encode()
    short, lists = cut_lists(text)
    assert json.loads(short)["list"] == "list 0"
    assert b'"list 0"' not in lists
    assert len(lists) == 1


def request(data: str, **more: object) -> memoryview:
    rest = json.dumps({"name": "x", "shape": [LEAST_BYTES], "datatype": "FP32", **more})
    return memoryview(f'{{"inputs":[{rest[:-1]},"data":{data}}}]}}'.encode())


def test_a_long_list_becomes_the_same_tensor() -> None:
    body = request(json.dumps(LONG))
    (tensor,) = input_tensors(read_body(body, len(body)))
    assert tensor.array.tolist() == LONG


@pytest.mark.parametrize(
    ("data", "problem"),
    [
        (json.dumps(LONG)[:-1] + ",]", "list of FP32 numbers"),
        (json.dumps(LONG)[:-1] + ",true]", "is no FP32"),
        (json.dumps(LONG)[:-1] + ",1]", "data has more"),
        (json.dumps(LONG)[:-1] + " 1]", "list of FP32 numbers"),
        (json.dumps(LONG) + ",]", "not valid JSON"),
    ],
)
def test_a_long_list_that_will_not_do_is_refused(data: str, problem: str) -> None:
    body = request(data)
    with pytest.raises(InvalidRequestError, match=problem):
        input_tensors(read_body(body, len(body)))


def test_the_place_of_an_error_is_true_beside_a_long_list() -> None:
    body = request(json.dumps(LONG), name=5)
    with pytest.raises(InvalidRequestError, match=r"inputs\[0\]\.name"):
        read_body(body, len(body))


@pytest.mark.parametrize("end", [",", ", "])
def test_a_comma_behind_the_last_piece_is_refused(end: str) -> None:
    element = "1." + "0" * PIECE_BYTES
    text = f"[{element},{element}{end}]".encode()
    with pytest.raises(InvalidRequestError, match="ends in a comma"):
        array_from_json(text, Datatype.FP32, [2], "x")
    assert (
        array_from_json(msgspec.json.encode([1.0, 2.0]), Datatype.FP32, [2], "x").tolist() == np.array([1, 2]).tolist()
    )
