"""The codec of tensors: JSON and binary, there and back, and against tritonclient's own."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import ml_dtypes
import msgspec
import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from numpy.typing import NDArray
from tritonclient.utils import deserialize_bytes_tensor, serialize_byte_tensor, triton_to_np_dtype

from appliance.api.oip import json_tensors
from appliance.api.oip.binary_tensors import array_from_bytes, array_to_bytes
from appliance.api.oip.classification import classified
from appliance.api.oip.datatypes import DTYPES, element_count
from appliance.api.oip.float_text import float32_text
from appliance.api.oip.json_tensors import array_from_json, array_to_json
from appliance.core.errors import InvalidRequestError
from appliance.core.tensors import Datatype, Tensor

IN_JSON = [each for each in Datatype if each not in (Datatype.FP16, Datatype.BF16)]
PLACE = "inputs[0] ('x')"

shapes = st.lists(st.integers(0, 4), max_size=4).map(tuple)


@st.composite
def arrays(draw: st.DrawFn, datatypes: Sequence[Datatype], *, texts: bool = False) -> tuple[Datatype, NDArray[Any]]:
    """Return a datatype and an array of it, of any finite values."""
    datatype = draw(st.sampled_from(datatypes))
    shape = draw(shapes)
    count = element_count(shape, PLACE)
    array = np.empty(count, DTYPES[datatype])
    if datatype is Datatype.BYTES:
        elements: st.SearchStrategy[Any] = st.text(max_size=5).map(str.encode) if texts else st.binary(max_size=5)
    elif datatype is Datatype.BOOL:
        elements = st.booleans()
    elif array.dtype.kind in "iu":
        elements = st.integers(int(np.iinfo(array.dtype).min), int(np.iinfo(array.dtype).max))
    else:
        elements = st.floats(width=64 if datatype is Datatype.FP64 else 16, allow_nan=False, allow_infinity=False)
    array[:] = draw(st.lists(elements, min_size=count, max_size=count))
    return datatype, array.reshape(shape)


def assert_same(found: NDArray[Any], wanted: NDArray[Any]) -> None:
    assert (found.dtype, found.shape) == (wanted.dtype, wanted.shape)
    assert found.tolist() == wanted.tolist()
    assert found.flags.c_contiguous
    assert found.flags.aligned


def read(text: str, datatype: Datatype, shape: tuple[int, ...]) -> NDArray[Any]:
    return array_from_json(text.encode(), datatype, shape, PLACE)


def test_our_dtypes_are_those_of_the_client() -> None:
    assert {each: np.dtype(triton_to_np_dtype(each.value)) for each in Datatype} == DTYPES


@given(arrays(IN_JSON, texts=True))
def test_what_was_written_as_a_flat_list_reads_the_same(pair: tuple[Datatype, NDArray[Any]]) -> None:
    datatype, array = pair
    assert_same(array_from_json(array_to_json(array, datatype, PLACE), datatype, array.shape, PLACE), array)


@given(arrays(IN_JSON, texts=True), st.sampled_from([None, 1]))
def test_nested_lists_read_the_same(pair: tuple[Datatype, NDArray[Any]], indent: int | None) -> None:
    datatype, array = pair
    nested = array.tolist()
    if datatype is Datatype.BYTES:
        nested = _decoded(nested)
    text = msgspec.json.encode(nested)
    text = text if indent is None else msgspec.json.format(text, indent=indent)
    assert_same(array_from_json(text, datatype, array.shape, PLACE), array)


def _decoded(value: Any) -> Any:
    return value.decode() if isinstance(value, bytes) else [_decoded(each) for each in value]


@given(arrays(list(Datatype)), st.integers(0, 7))
def test_binary_data_reads_the_same_wherever_it_stands(pair: tuple[Datatype, NDArray[Any]], offset: int) -> None:
    datatype, array = pair
    data = memoryview(bytearray(offset) + array_to_bytes(array, datatype))[offset:]
    assert_same(array_from_bytes(data, datatype, array.shape, PLACE), array)


@given(arrays(list(Datatype)))
def test_binary_data_is_what_the_client_reads_and_writes(pair: tuple[Datatype, NDArray[Any]]) -> None:
    datatype, array = pair
    written = bytes(array_to_bytes(array, datatype))
    if datatype is Datatype.BYTES:
        theirs = serialize_byte_tensor(array)
        assert written == (theirs.item() if theirs.size else b"")
        assert deserialize_bytes_tensor(written).tolist() == array.reshape(-1).tolist()
    else:
        assert written == array.tobytes()


@given(st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1))
@example([0.0, -0.0, 1.0, 10.0, 3.4028234663852886e38, 1.401298464324817e-45, 9.999999e9, 999_999.94, 0.99999994])
def test_many_fp32_numbers_read_the_same(numbers: list[float]) -> None:
    array = np.array(numbers, np.float32)
    text = float32_text(array)
    assert np.array(msgspec.json.decode(b"[" + text + b"]"), np.float32).tobytes() == array.tobytes()


def test_large_fp32_tensors_are_written_the_quick_way() -> None:
    array = np.linspace(-2, 2, 5001, dtype=np.float32)
    text = array_to_json(array, Datatype.FP32, PLACE)
    assert text.startswith(b"[-2.00000000e+00,-1.99919999e+00,")
    assert_same(array_from_json(text, Datatype.FP32, (5001,), PLACE), array)


def test_an_array_that_is_not_row_major_is_written_row_major() -> None:
    array = np.arange(6, dtype=np.int32).reshape(2, 3).T
    assert bytes(array_to_bytes(array, Datatype.INT32)) == np.ascontiguousarray(array).tobytes()


def test_aligned_binary_data_is_not_copied() -> None:
    memory = np.arange(8, dtype=np.float32)
    found = array_from_bytes(memory.view(np.uint8).data, Datatype.FP32, (2, 4), PLACE)
    assert np.shares_memory(found, memory)
    assert np.shares_memory(np.frombuffer(array_to_bytes(found, Datatype.FP32), np.uint8), memory)


@pytest.mark.parametrize("nested", [False, True])
def test_a_large_list_is_read_in_pieces(monkeypatch: pytest.MonkeyPatch, nested: bool) -> None:
    monkeypatch.setattr(json_tensors, "PIECE_BYTES", 10)
    monkeypatch.setattr(json_tensors, "PIECE_ELEMENTS", 7)
    array = np.arange(-50, 50, dtype=np.int16).reshape(20, 5)
    text = msgspec.json.encode(array.tolist()) if nested else array_to_json(array, Datatype.INT16, PLACE)
    assert_same(array_from_json(text, Datatype.INT16, (20, 5), PLACE), array)
    with pytest.raises(InvalidRequestError, match=r"element 2 of data is no INT16"):
        read("[1000, 2000, 300000, 4]", Datatype.INT16, (4,))


@pytest.mark.parametrize(
    ("text", "datatype", "shape", "problem"),
    [
        ("[1, 2.5]", Datatype.INT32, (2,), "element 1 of data is no INT32"),
        ("[1, 2.0]", Datatype.INT32, (2,), "element 1 of data is no INT32"),
        ("[1, true]", Datatype.INT32, (2,), "element 1 of data is no INT32"),
        ("[1, true]", Datatype.FP32, (2,), "element 1 of data is no FP32"),
        ("[1, null]", Datatype.FP64, (2,), "element 1 of data is no FP64"),
        ('[1, "NaN"]', Datatype.FP32, (2,), "element 1 of data is no FP32"),
        ("[NaN]", Datatype.FP32, (1,), "list of FP32 numbers"),
        ("[1, 0]", Datatype.BOOL, (2,), "element 0 of data is no BOOL"),
        ("[256]", Datatype.UINT8, (1,), "element 0 of data is no UINT8"),
        ("[-1]", Datatype.UINT64, (1,), "element 0 of data is no UINT64"),
        ("[18446744073709551616]", Datatype.UINT64, (1,), "too large for UINT64"),
        ("[9223372036854775808]", Datatype.INT64, (1,), "element 0 of data is no INT64"),
        ("[0, 1e39]", Datatype.FP32, (2,), "element 1 of data is too large for FP32"),
        ("[1e400]", Datatype.FP64, (1,), "element 0 of data is no FP64"),
        ("[1, 2, 3]", Datatype.FP32, (2,), r"\[2\] has 2 elements, and data has more"),
        ("[1, 2]", Datatype.FP32, (3,), r"\[3\] has 3 elements, and data has 2"),
        ("[]", Datatype.FP32, (1,), "has 1 elements, and data has 0"),
        ("[]", Datatype.FP32, (2, 3), "has 6 elements, and data has fewer"),
        ("[1]", Datatype.FP32, (0,), "has 0 elements, and data has more"),
        ("[[1], [2]]", Datatype.FP32, (2,), "not nested as the shape"),
        ("[[1, 2], [3]]", Datatype.FP32, (3, 1), "not nested as the shape"),
        ("[[1, 2], [3]]", Datatype.FP32, (1, 3), "not nested as the shape"),
        ("[[1], [2]]", Datatype.FP32, (3, 3), "not nested as the shape"),
        ("[[[1]]]", Datatype.FP32, (1, 1, 1, 1), "not nested as the shape"),
        ('[["[1", "2]"]]', Datatype.FP32, (1, 2), "not nested as the shape"),
        ('["1,2"]', Datatype.FP32, (1,), "element 0 of data is no FP32"),
        ('[{"a": 1}]', Datatype.FP32, (1,), "element 0 of data is no FP32"),
        ("5", Datatype.FP32, (1,), "data must be a list"),
        ("{}", Datatype.FP32, (), "element 0 of data is no FP32"),
        ("null", Datatype.FP32, (1,), "data must be a list"),
        ("[1]", Datatype.FP16, (1,), "FP16 has no JSON"),
        ("[1]", Datatype.BF16, (1,), "BF16 has no JSON"),
        ("[1]", Datatype.BYTES, (1,), "no list of strings"),
        ('["a"]', Datatype.BYTES, (2,), "has 2 elements, and data has 1"),
        ('[["a"]]', Datatype.BYTES, (1,), "no list of strings"),
        ('[["a", "b"], ["c"]]', Datatype.BYTES, (3, 1), "not nested as the shape"),
        ('[["a", "b"], ["c"]]', Datatype.BYTES, (2, 2), "not nested as the shape"),
        ('["\\ud800"]', Datatype.BYTES, (1,), "no list of strings"),
        ("[1]", Datatype.FP32, (2**40, 2**40), "more elements than can be counted"),
        ("[1]", Datatype.FP32, (2**62,), "and data has fewer"),
        ("[1]", Datatype.FP32, (1,) * 33, "33 dimensions"),
    ],
)
def test_json_that_is_not_what_it_says_is_refused(
    text: str, datatype: Datatype, shape: tuple[int, ...], problem: str
) -> None:
    with pytest.raises(InvalidRequestError, match=problem) as refusal:
        read(text, datatype, shape)
    assert refusal.value.message.startswith(PLACE)


@pytest.mark.parametrize(
    ("text", "shape", "wanted"),
    [
        ("5", (), 5.0),
        ("[5]", (), 5.0),
        ("[[], []]", (2, 0), [[], []]),
        ("[]", (2, 0), [[], []]),
        ("[ ]", (0,), []),
        (" [ 1 , 2 ] ".strip(), (1, 2), [[1.0, 2.0]]),
    ],
)
def test_the_edges_of_shapes(text: str, shape: tuple[int, ...], wanted: Any) -> None:
    assert read(text, Datatype.FP32, shape).tolist() == wanted


@pytest.mark.parametrize(
    ("text", "datatype", "wanted"),
    [
        ("[true, false]", Datatype.BOOL, [True, False]),
        ("[-128, 127]", Datatype.INT8, [-128, 127]),
        ("[-9223372036854775808, 9223372036854775807]", Datatype.INT64, [-(2**63), 2**63 - 1]),
        ("[0, 18446744073709551615]", Datatype.UINT64, [0, 2**64 - 1]),
        ("[1, 1e-3]", Datatype.FP64, [1.0, 0.001]),
        ("[1, 1e-400]", Datatype.FP32, [1.0, 0.0]),
        ("[1, 100000000000000000000000]", Datatype.FP64, [1.0, 1e23]),
        ('["", "二"]', Datatype.BYTES, [b"", "二".encode()]),
    ],
)
def test_the_edges_of_datatypes(text: str, datatype: Datatype, wanted: list[Any]) -> None:
    assert read(text, datatype, (2,)).tolist() == wanted


@pytest.mark.parametrize(
    ("data", "datatype", "shape", "problem"),
    [
        (b"\0" * 7, Datatype.FP32, (2,), "takes 8 bytes, and binary_data_size is 7"),
        (b"\0" * 8, Datatype.FP32, (2**62,), "takes 18446744073709551616 bytes"),
        (b"\0\1\2", Datatype.BOOL, (3,), "byte 2 is neither 0 nor 1"),
        (b"", Datatype.BYTES, (1,), "binary_data_size is 0"),
        (b"\5\0\0\0abc", Datatype.BYTES, (1,), "string 0 does not end"),
        (b"\1\0\0\0ab", Datatype.BYTES, (1,), "string 1 does not end"),
        (b"\4\0\0\0abcd\0\0", Datatype.BYTES, (2,), "string 1 does not end"),
        (b"\1\0\0\0a" + b"\xff" * 4, Datatype.BYTES, (2,), "string 1 does not end"),
        (b"\xff" * 4, Datatype.BYTES, (1,), "string 0 does not end"),
        (b"\4\0\0\0abcd", Datatype.BYTES, (2,), "string 1 does not end"),
        (b"", Datatype.BYTES, (2**32, 2**32), "more elements than can be counted"),
    ],
)
def test_binary_data_that_is_not_what_it_says_is_refused(
    data: bytes, datatype: Datatype, shape: tuple[int, ...], problem: str
) -> None:
    with pytest.raises(InvalidRequestError, match=problem) as refusal:
        array_from_bytes(memoryview(data), datatype, shape, PLACE)
    assert refusal.value.message.startswith(PLACE)


@given(st.binary(max_size=40), st.sampled_from(list(Datatype)), shapes)
def test_any_bytes_are_a_tensor_or_refused(data: bytes, datatype: Datatype, shape: tuple[int, ...]) -> None:
    with suppress(InvalidRequestError):
        assert array_from_bytes(memoryview(data), datatype, shape, PLACE).shape == shape


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=2), inner, max_size=2),
)


@given(json_values, st.sampled_from(list(Datatype)), shapes)
def test_any_json_is_a_tensor_or_refused(value: Any, datatype: Datatype, shape: tuple[int, ...]) -> None:
    with suppress(InvalidRequestError):
        assert array_from_json(msgspec.json.encode(value), datatype, shape, PLACE).shape == shape


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_what_is_no_number_in_json_is_not_written_as_another(value: float) -> None:
    with pytest.raises(InvalidRequestError, match="no NaN and no infinity"):
        array_to_json(np.array([1, value], np.float32), Datatype.FP32, PLACE)


def test_strings_that_are_not_utf8_are_not_written_as_others() -> None:
    array = np.empty(1, np.object_)
    array[0] = b"\xff"
    with pytest.raises(InvalidRequestError, match="not UTF-8"):
        array_to_json(array, Datatype.BYTES, PLACE)


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_half_floats_are_not_written_as_json(dtype: Any) -> None:
    datatype = Datatype.FP16 if dtype is np.float16 else Datatype.BF16
    with pytest.raises(InvalidRequestError, match="has no JSON"):
        array_to_json(np.zeros(1, dtype), datatype, PLACE)


@pytest.mark.parametrize(
    ("values", "dtype", "wanted"),
    [
        ([1, 5, 10, 4], np.float32, [b"10.000000:2", b"5.000000:1"]),
        ([1, 1, 0], np.float64, [b"1.000000:0", b"1.000000:1"]),
        ([np.nan, -1, np.inf], np.float16, [b"inf:2", b"-1.000000:1"]),
        ([0, 255, 7], np.uint8, [b"255:1", b"7:2"]),
        ([-128, 127, 7], np.int8, [b"127:1", b"7:2"]),
        ([2**64 - 1, 0, 1], np.uint64, [b"18446744073709551615:0", b"1:2"]),
        ([False, True, False], np.bool_, [b"1:1", b"0:0"]),
    ],
)
def test_the_highest_values_come_first(values: list[Any], dtype: Any, wanted: list[bytes]) -> None:
    given_tensor = Tensor("y", Datatype.FP32, np.array(values, dtype))
    assert classified(given_tensor, 2, batched=False).array.tolist() == wanted


def test_each_row_of_a_batch_has_its_own_classes() -> None:
    found = classified(Tensor("y", Datatype.FP32, np.eye(3, dtype=np.float32)), 1, batched=True)
    assert (found.datatype, found.array.tolist()) == (
        Datatype.BYTES,
        [[b"1.000000:0"], [b"1.000000:1"], [b"1.000000:2"]],
    )
    empty = classified(Tensor("y", Datatype.FP32, np.empty((0, 3), np.float32)), 5, batched=True)
    assert empty.array.shape == (0, 3)


def test_strings_have_their_length_before_them() -> None:
    array = np.empty(2, np.object_)
    array[:] = [b"ab", b""]
    assert bytes(array_to_bytes(array, Datatype.BYTES)) == struct.pack("<I", 2) + b"ab" + struct.pack("<I", 0)
