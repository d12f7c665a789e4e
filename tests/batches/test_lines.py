"""Lines of a batch: cut from pieces of any size, read, checked and tried again."""

from __future__ import annotations

import json
import math
import tracemalloc
from collections.abc import Iterable
from typing import Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from appliance.batches.lines import (
    MOST_ERRORS,
    MOST_TRIES,
    Check,
    Line,
    LineCutter,
    RequestLine,
    answered_line,
    failed_line,
    pause_before_retry,
    read_line,
)
from appliance.core.batches import BatchError

CHAT: Literal["/v1/chat/completions"] = "/v1/chat/completions"


def cut(pieces: Iterable[bytes], most_bytes: int = 100) -> list[Line]:
    cutter = LineCutter(most_bytes)
    return [*(line for piece in pieces for line in cutter.feed(piece)), *cutter.close()]


def request(custom_id: str, **changes: object) -> bytes:
    return json.dumps({"custom_id": custom_id, "method": "POST", "url": CHAT, "body": {}, **changes}).encode()


def checked(data: bytes, *, most_lines: int = 10, most_bytes: int = 10_000) -> Check:
    check = Check(CHAT, most_lines=most_lines, most_bytes=most_bytes)
    for start in range(0, len(data), 700):
        check.feed(data[start : start + 700])
    check.close()
    return check


def code_of(data: bytes | None) -> str:
    read = read_line(Line(7, data), CHAT, 100)
    assert isinstance(read, BatchError)
    assert read.line == 7
    return read.code


@given(st.lists(st.binary(max_size=30)), st.integers(1, 9))
def test_lines_are_the_same_however_the_pieces_fall(lines: list[bytes], size: int) -> None:
    whole = b"\n".join(lines)
    pieces = [whole[start : start + size] for start in range(0, len(whole), size)]
    expected = [Line(number, each.strip()) for number, each in enumerate(whole.split(b"\n"), 1) if each.strip()]
    assert cut(pieces) == expected


def test_blank_lines_count_and_are_passed_over() -> None:
    assert cut([b"a\r\n\n \nb\n"]) == [Line(1, b"a"), Line(4, b"b")]


def test_a_line_that_is_too_long_is_told_and_the_next_is_read() -> None:
    assert cut([b"x" * 80, b"y" * 21, b"z\nab\n"]) == [Line(1, None), Line(2, b"ab")]
    assert cut([b"x" * 101]) == [Line(1, None)]


def test_an_endless_line_costs_no_memory() -> None:
    cutter, piece = LineCutter(1000), b"x" * 65_536
    tracemalloc.start()
    try:
        for _ in range(1024):  # 64 MiB
            assert list(cutter.feed(piece)) == []
        assert tracemalloc.get_traced_memory()[1] < 1_000_000
    finally:
        tracemalloc.stop()
    assert list(cutter.close()) == [Line(1, None)]


def test_a_line_is_read() -> None:
    read = read_line(Line(1, request("a", body={"model": "m"})), CHAT, 100)
    assert isinstance(read, RequestLine)
    assert (read.custom_id, json.loads(bytes(read.body))) == ("a", {"model": "m"})


def test_what_is_wrong_with_a_line_is_named() -> None:
    assert code_of(None) == "line_too_long"
    assert code_of(b"{") == "invalid_json_line"
    assert code_of(b"[" * 100_000) == "invalid_json_line" or code_of(b"[" * 100_000) == "invalid_request_line"
    assert code_of(b'"\xff"') in ("invalid_json_line", "invalid_request_line")
    assert code_of(b"[]") == "invalid_request_line"
    assert code_of(request("a", url="/v1/embeddings")) == "mismatched_url"
    assert code_of(request("a", body=[])) == "invalid_request_line"
    assert code_of(request("a" * 513)) == "invalid_request_line"


@pytest.mark.parametrize(
    ("data", "param"),
    [
        (b"{}", "custom_id"),
        (request(""), "custom_id"),
        (request("a", method="GET"), "method"),
        (request("a", colour="red"), None),
    ],
)
def test_the_field_at_fault_is_named(data: bytes, param: str | None) -> None:
    read = read_line(Line(1, data), CHAT, 100)
    assert isinstance(read, BatchError)
    assert read.param == param


def test_lines_are_checked_against_each_other() -> None:
    check = checked(b"\n".join([request("a"), request("b"), b"", request("a")]))
    assert (check.total, [(each.code, each.line) for each in check.errors]) == (3, [("duplicate_custom_id", 4)])
    assert not check.hopeless
    assert checked(b" \n").errors == [BatchError("empty_batch", "The file has no lines.")]
    assert checked(request("a")).errors == []


def test_a_file_with_too_many_lines_is_read_no_further() -> None:
    check = checked(b"\n".join(request(f"{each}") for each in range(50)), most_lines=10)
    assert check.hopeless
    assert (check.total, [each.code for each in check.errors]) == (11, ["too_many_lines"])


def test_a_million_bad_lines_are_told_a_hundred_times() -> None:
    check = checked(b"x\n" * 1000, most_lines=1_000_000)
    assert check.hopeless
    assert len(check.errors) == MOST_ERRORS


def test_an_overload_is_waited_out_and_nothing_else() -> None:
    assert pause_before_retry(200, 1, None) is None
    assert pause_before_retry(400, 1, 1.0) is None
    assert pause_before_retry(500, 1, None) is None
    assert pause_before_retry(429, 1, None) == 1.0
    assert pause_before_retry(503, 3, None) == 4.0
    assert pause_before_retry(503, 1, 7.0) == 7.0
    assert pause_before_retry(503, 1, 1e9) == 60.0
    assert pause_before_retry(503, 1, math.nan) == 1.0
    assert pause_before_retry(429, MOST_TRIES, None) is None


def test_output_lines_are_as_openai_writes_them() -> None:
    assert json.loads(answered_line("batch_req_1", "a", 200, "req-1", b'{"x": 1}')) == {
        "id": "batch_req_1",
        "custom_id": "a",
        "response": {"status_code": 200, "request_id": "req-1", "body": {"x": 1}},
        "error": None,
    }
    assert json.loads(failed_line("batch_req_2", "b", "batch_expired", "Too late.")) == {
        "id": "batch_req_2",
        "custom_id": "b",
        "response": None,
        "error": {"code": "batch_expired", "message": "Too late."},
    }
    assert failed_line("a", "b", "c", "line\nbreak").count(b"\n") == 1
