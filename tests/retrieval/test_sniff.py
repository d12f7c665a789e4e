"""What a file is, whatever it is called."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from appliance.retrieval.parsing import sniff as types
from appliance.retrieval.parsing.sniff import SNIFFED_BYTES, sniff
from tests.retrieval.documents import pdf_bomb, write_docx, write_mail, write_pdf, write_xlsx

MARKDOWN = b"# Title\n\n- one\n- **two**\n\nSee [this](x.html).\n"


@pytest.mark.parametrize(
    ("start", "filename", "expected"),
    [
        (b"", "a.txt", types.PLAIN),
        (b"Hello.", "a.pdf", types.PLAIN),
        (b"Hello.", "a.md", types.MARKDOWN),
        (MARKDOWN, "a.txt", types.MARKDOWN),
        (b"# only a comment\nx = 1\n", "a.conf", types.PLAIN),
        (b"<!DOCTYPE html><html>", "a.txt", types.HTML),
        (b" <!-- x -->\n<html>", "a.docx", types.HTML),
        ("<html>".encode("utf-16"), "a", types.HTML),
        ("<html>".encode("utf-16-le"), "a", types.HTML),
        ("<html>".encode("utf-32"), "a", types.HTML),
        ("<html>".encode("utf-16-be"), "a", types.HTML),
        (b"a,b\n1,2\n", "a.csv", types.CSV),
        (b"a,b,c\n1,2,3\n4,5,6\n", "a.txt", types.CSV),
        (b"a\tb\n1\t2\n3\t4\n", "a", types.TSV),
        (b"a;b;c\n1;2;3\n4;5;6\n", "a", types.CSV),
        (
            b"First, we do it well, and so on\nThen, we see it again, you know\nLast, it is done, we are glad\n",
            "a",
            types.PLAIN,
        ),
        (b'{"a": 1}', "a.txt", types.JSON),
        (b'[{"a": 1}, 2]', "a.csv", types.JSON),
        (b'{"a": 1}\n{"a": 2}\n', "a.json", types.JSON_LINES),
        (b'{"a": "' + b"x" * SNIFFED_BYTES, "a", types.JSON),
        (b"[" * SNIFFED_BYTES, "a", types.JSON),
        (b"[1] is a footnote", "a", types.PLAIN),
        (b"[link](x) and more", "a", types.PLAIN),
        (b"{not json", "a", types.PLAIN),
        (b"Hello.\n", "a.jsonl", types.JSON_LINES),
        (b"From: a@b\nTo: c@d\nSubject: x\n\nHi", "a.txt", types.MAIL),
        (b"From a@b Mon\nFrom: a@b\nDate: y\nSubject: x\n\nHi", "a", types.MAIL),
        (b"Note: one\nSubject: two\nTo: three\n\nHi", "a", types.PLAIN),
        (b"%PDF-1.7\n", "a.docx", types.PDF),
        (b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR", "a.txt", "image/png"),
        (b"\xff\xd8\xff\xe0" + b"abcdefghij" * 9, "a.txt", "image/jpeg"),
        (b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1" + bytes(600), "a.docx", "application/msword"),
        (b"\0\1\2\3" * 100, "a.txt", types.BINARY),
        (b"PK\x03\x04nothing", "a.docx", types.ZIP),
        ("水泵已停止。".encode("gb18030"), "a.txt", types.PLAIN),
        (b"one\0two three four five six seven eight nine ten eleven", "a.txt", types.PLAIN),
    ],
)
def test_bytes_decide(start: bytes, filename: str, expected: str) -> None:
    found = sniff(start, filename)
    assert found == expected or (expected == "application/msword" and found not in types.PARSED)


def test_real_files_are_known_under_any_name(tmp_path: Path) -> None:
    made = {
        types.PDF: write_pdf(tmp_path / "a", ["Hello"]),
        types.DOCX: write_docx(tmp_path / "b"),
        types.XLSX: write_xlsx(tmp_path / "c"),
        types.MAIL: write_mail(tmp_path / "d"),
    }
    for expected, path in made.items():
        for name in ("a.txt", "a.pdf", "a.csv", "noname"):
            assert sniff(path.read_bytes()[:SNIFFED_BYTES], name) == expected
    assert sniff(pdf_bomb(tmp_path / "e", 2**21).read_bytes()[:SNIFFED_BYTES], "a.txt") == types.PDF


@given(st.binary(max_size=300), st.sampled_from(["a.txt", "a.pdf", "a.md", "a.csv", "a", "..", "a.jsonl"]))
def test_any_bytes_have_a_type(start: bytes, filename: str) -> None:
    assert "/" in sniff(start, filename)


@given(st.text(max_size=200))
def test_any_text_is_text(text: str) -> None:
    if "\0" not in text:
        assert sniff(text.encode("utf-8", "ignore"), "a.txt") in types.PARSED or not text.isprintable()
