from __future__ import annotations

from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from appliance.core.errors import ModelFileError
from appliance.registry import onnx_wire
from appliance.registry.onnx_header import read_onnx
from appliance.registry.onnx_wire import check_messages
from tests.registry.onnx_models import write_encoder
from tests.tiny_onnx import slow, stateful, tabular


def varint(value: int) -> bytes:
    out = b""
    while value > 0x7F:
        out += bytes([value & 0x7F | 0x80])
        value >>= 7
    return out + bytes([value])


def graph_of(content: bytes) -> bytes:
    """Return a model whose graph is these bytes."""
    return b"\x08\x09\x3a" + varint(len(content)) + content


def test_sound_models_are_taken(tmp_path: Path) -> None:
    for number, write_model in enumerate((tabular, slow, stateful, write_encoder)):
        check_messages(write_model(tmp_path / f"{number}.onnx").read_bytes())
    check_messages(b"")


@pytest.mark.parametrize("content", [b"\x0a\x00", b"\x2a\x00", b"\x62\x00"], ids=["nodes", "tensors", "outputs"])
def test_a_small_file_cannot_fill_the_memory(tmp_path: Path, content: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnx_wire, "MAX_MESSAGES", 1000)
    check_messages(graph_of(content * 999))
    path = tmp_path / "bomb.onnx"
    path.write_bytes(graph_of(content * 1000))
    with pytest.raises(ModelFileError, match="more than 1,000 messages"):
        read_onnx(path)


def test_fields_are_counted_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnx_wire, "MAX_FIELDS", 100)
    with pytest.raises(ModelFileError, match="or 100 fields"):
        check_messages(b"\x08\x09" * 101)


def test_messages_may_not_be_nested_without_end() -> None:
    content = b""
    for _ in range(60):  # a graph in an attribute of a node of a graph
        content = b"\x32" + varint(len(content)) + content
        content = b"\x2a" + varint(len(content)) + content
        content = b"\x0a" + varint(len(content)) + content
    with pytest.raises(ModelFileError, match="nested more than 100 deep"):
        check_messages(graph_of(content))


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"\x08", "no end"),
        (b"\x08\x80", "no end"),
        (b"\x80" * 20, "no end"),
        (b"\x3a\x05\x0a\x00", "beyond its message"),
        (b"\x3a\x02\x0a\x01\x00", "beyond its message"),
        (b"\x0d\x00\x00", "beyond its message"),
        (b"\x09" + bytes(7), "beyond its message"),
        (b"\x0b", "the wire type 3"),
        (b"\x0f", "the wire type 7"),
    ],
)
def test_bytes_that_are_no_messages_are_refused(content: bytes, reason: str) -> None:
    with pytest.raises(ModelFileError, match=reason):
        check_messages(content)


def test_fields_of_a_fixed_length_are_skipped() -> None:
    check_messages(b"\xfd\x07" + bytes(4) + b"\xf9\x07" + bytes(8))


@given(st.binary(max_size=60))
def test_random_bytes_are_taken_or_refused(content: bytes) -> None:
    with suppress(ModelFileError):
        check_messages(content)
