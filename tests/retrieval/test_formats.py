"""What is taken from each kind of file."""

from __future__ import annotations

import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pypdf import PdfWriter

from appliance.retrieval.parsing import json_text
from appliance.retrieval.parsing.decoding import decode
from appliance.retrieval.parsing.markdown import PART_CHARACTERS
from appliance.retrieval.parsing.protocol import LARGEST_FRAME, PIECE_CHARACTERS, Piece, Pieces, to_frame
from appliance.retrieval.parsing.writer import BlockWriter
from tests.retrieval.documents import media_type, read, seen, write_docx, write_mail, write_pdf, write_xlsx


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "file"


def found(path: Path, content: str | bytes, **limits: int) -> list[tuple[str, str]]:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    blocks, end = read(path, **limits)
    assert end.problem is None, end.message
    return seen(blocks)


def test_plain_text_in_paragraphs(file: Path) -> None:
    text = "One\r\nline.\r\n\r\n  \r\nTwo \u05d0\u05d1 😀.\n\n\n\nThree\0\x07."
    assert found(file, text) == [("paragraph", "One\nline."), ("paragraph", "Two אב 😀."), ("paragraph", "Three.")]


def test_markdown(file: Path) -> None:
    text = """---
title: "The pump"
---
# Pump *X*

Some `code` and [a link](http://x) with
a second line.<br>Third. ![alt text](y.png)

Setext
------

- one
- two
  1. deep
  2. deeper

     more
- three

> quoted

| a | b |
|---|---|
| 1 | 2 |

```python
x = 1

y = 2
```

<div>markup <b>here</b></div>
"""
    path = file.with_suffix(".md")
    assert found(path, text) == [
        ("code", 'title: "The pump"'),
        ("h1", "Pump X"),
        ("paragraph", "Some code and a link with\na second line. Third. alt text"),
        ("h2", "Setext"),
        ("list", "- one\n- two\n  1. deep\n  2. deeper\n  more\n- three"),
        ("paragraph", "quoted"),
        ("table", "a | b\n1 | 2"),
        ("code", "x = 1\n\ny = 2"),
        ("paragraph", "markup here"),
    ]
    assert read(path)[1].title == "The pump"


def test_long_markdown_is_read_in_parts_but_never_cut_in_code(file: Path) -> None:
    filler = "Some words.\n\n" * (PART_CHARACTERS // 12)
    text = f"{filler}```\n# no heading\n```\n\n# A\n\nLast.\n"
    blocks = found(file.with_suffix(".md"), text)
    assert blocks[-3:] == [("code", "# no heading"), ("h1", "A"), ("paragraph", "Last.")]


def test_html(file: Path) -> None:
    text = """<!doctype html><html><head><title> The
      Page </title><style>p {}</style></head><body><script>var x = "<p>no</p>";</script>
      <h1>Head <i>line</i></h1>Loose text<p>One <b>bold</b>   word<br>line two<p>Two &amp; &lt;three&gt;
      <ul><li>a<li>b<ol><li>c<li>d</ol><p>more</ul>
      <table><caption>Sizes</caption><tr><th>Part<th>Size<tr><td><p>Nut</p><p>hex</p><td>5</table>
      <table><tr><td><table><tr><td>x<td>y</table></td></tr></table>
      <pre>a
  b</pre><h7>odd</h7><noscript>never</noscript></body></html>"""
    assert found(file, text) == [
        ("h1", "Head line"),
        ("paragraph", "Loose text"),
        ("paragraph", "One bold word\nline two"),
        ("paragraph", "Two & <three>"),
        ("list", "- a\n- b\n  1. c\n  2. d\nmore"),
        ("paragraph", "Sizes"),
        ("table", "Part | Size\nNut hex | 5"),
        ("table", "x | y"),
        ("code", "a\n  b"),
        ("paragraph", "odd"),
    ]
    assert read(file)[1].title == "The Page"


def test_html_says_its_encoding(file: Path) -> None:
    text = '<html><head><meta charset="windows-1252"></head><body><p>Größe</p></body></html>'
    assert found(file, text.encode("cp1252")) == [("paragraph", "Größe")]


def test_pdf_with_pages_outline_and_scans(file: Path) -> None:
    write_pdf(
        file, ["Pump\nIt is exam-\nple text.", "", "Valve\nMore."], title="Manual", outline=[("Pump", 1), ("Valve", 3)]
    )
    blocks, end = read(file)
    assert seen(blocks) == [
        ("h1", "Pump"),
        ("paragraph", "It is example text."),
        ("h1", "Valve"),
        ("paragraph", "More."),
    ]
    assert [each.page for each in blocks] == [1, 1, 3, 3]
    assert (end.title, end.pages_without_text) == ("Manual", [2])


def test_a_pdf_of_scans_says_so(file: Path) -> None:
    blocks, end = read(write_pdf(file, ["", ""]))
    assert (blocks, end.problem, end.pages_without_text) == ([], None, [1, 2])


def test_docx(file: Path) -> None:
    blocks, end = read(write_docx(file))
    assert seen(blocks) == [
        ("h1", "Pump"),
        ("h1", "Setup"),
        ("paragraph", "Turn it on."),
        ("list", "- first\n- second"),
        ("table", "Part | Size\nNut | 5"),
        ("h2", "水泵"),
        ("paragraph", "Before inserted"),
        ("paragraph", "Controlled"),
    ]
    assert end.title == "Manual"


def test_xlsx(file: Path) -> None:
    blocks, _ = read(write_xlsx(file))
    assert seen(blocks) == [
        ("h1", "Parts"),
        ("table", "Part | Size\nNut | 5\nBolt | 2.5\nMade | TRUE"),
        ("h1", "更多"),
        ("table", "水泵 |  | 红"),
    ]


@pytest.mark.parametrize("delimiter", [",", ";", "\t", "|"])
def test_csv(file: Path, delimiter: str) -> None:
    text = 'Part,Size\n"Nut, hex\nM5",5\n\n,\nBolt,2.5\n'.replace(",", delimiter)
    expected = f"Part | Size\nNut{delimiter.strip() or ''} hex M5 | 5\nBolt | 2.5"
    assert found(file.with_suffix(".csv"), text) == [("table", expected)]


def test_json(file: Path) -> None:
    text = """{"name": "Pump", "on": true, "none": null, "size": {"w": 1.50, "h": [1, 2]},
        "parts": [{"a": 1}, {"a": {"b": 2}}]}"""
    assert found(file, text) == [
        ("paragraph", "name: Pump\non: true"),
        ("paragraph", "size.w: 1.50\nsize.h: 1, 2"),
        ("paragraph", "parts.a: 1"),
        ("paragraph", "parts.a.b: 2"),
    ]
    assert found(file, '[{"a": 1}, "x", [1, [2]]]') == [
        ("paragraph", "a: 1"),
        ("paragraph", "x"),
        ("paragraph", "1\n2"),
    ]
    assert found(file.with_suffix(".jsonl"), '{"a": 1}\n\nbroken {\n"x"\n') == [
        ("paragraph", "a: 1"),
        ("paragraph", "broken {"),
        ("paragraph", "x"),
    ]


def test_mail(file: Path) -> None:
    blocks, end = read(write_mail(file))
    assert seen(blocks) == [
        ("h1", "Die Pumpe läuft 水泵"),
        ("paragraph", "From: Jörg <a@example.org>\nTo: b@example.org\nDate: Mon, 02 Mar 2026 10:00:00 +0000"),
        ("paragraph", "Plain text."),
        ("paragraph", "Second paragraph äöü."),
        ("h1", "Older"),
        ("paragraph", "From: c@example.org"),
        ("paragraph", "Inner text."),
        ("list", "Attachments:\n- Übersicht.pdf"),
    ]
    assert end.title == "Die Pumpe läuft 水泵"


def test_mail_with_html_only_and_a_raw_head(file: Path) -> None:
    head = "From: Jörg\nDate: x\nSubject: =?nope?q?a?=\nContent-Type: text/html; charset=utf-8\n\n"
    assert found(file, f"{head}<p>Rich</p>") == [
        ("h1", "=?nope?q?a?="),
        ("paragraph", "From: Jörg\nDate: x"),
        ("paragraph", "Rich"),
    ]


# Encodings

GERMAN = "Die Prüfung der Größe überließ man später den Männern; für „Öl“ galt das natürlich außerdem."
CHINESE = "水泵已经停止运行，请检查阀门和电机的温度，然后重新启动设备。如果仍然有问题，请联系技术人员。"
RUSSIAN = "Насос остановлен, проверьте клапан и температуру двигателя, затем снова включите устройство."
JAPANESE = "ポンプが停止しました。バルブとモーターの温度を確認してから、装置を再起動してください。"


@pytest.mark.parametrize(
    ("text", "encoding"),
    [
        (GERMAN, "utf-8-sig"),
        (CHINESE, "utf-16"),
        (CHINESE, "utf-32"),
        (GERMAN, "utf-16-le"),
        (GERMAN, "utf-16-be"),
        (CHINESE, "gb18030"),
        (GERMAN, "cp1252"),
        (RUSSIAN, "cp1251"),
        (JAPANESE, "shift_jis"),
    ],
)
def test_encodings_are_detected(text: str, encoding: str) -> None:
    assert decode(text.encode(encoding)) == text


def test_each_line_of_mixed_encodings_is_read_as_what_it_is() -> None:
    lines = [GERMAN, "Plain line.", GERMAN]
    assert decode("\n".join(lines[:2]).encode() + b"\n" + lines[2].encode("cp1252")) == "\n".join(lines)


@given(st.binary(max_size=400), st.sampled_from(["", "utf-8", "cp1252", "gb18030", "base64", "no-such", "\0"]))
def test_any_bytes_become_some_text(data: bytes, declared: str) -> None:
    text = decode(data, declared)
    assert text == decode(data, declared)


# Limits


@pytest.mark.parametrize("suffix", ["txt", "md", "csv", "html"])
def test_text_over_the_limit_is_refused_with_the_figure(file: Path, suffix: str) -> None:
    path = file.with_suffix(f".{suffix}")
    path.write_text(("<p>" if suffix == "html" else "") + "word " * 1000)
    _, end = read(path, max_characters=2000)
    assert (end.problem, end.message) == ("invalid_file", "has more than 2000 characters of text")
    assert "max_document_characters" in end.advice
    assert read(path, max_characters=5000)[1].problem is None


def test_a_long_block_comes_in_pieces_of_bounded_frames(file: Path) -> None:
    text = "😀\\" * (2 * PIECE_CHARACTERS)
    frames: list[bytes] = []
    writer = BlockWriter(lambda pieces: frames.append(to_frame(Pieces(pieces))), 10**7)
    writer.add("paragraph", text)
    for _ in range(100):
        writer.add("paragraph", "x" * 1000)
    writer.flush()
    assert len(frames) > 4
    assert max(map(len, frames)) <= LARGEST_FRAME


@given(st.lists(st.text(max_size=50), max_size=20))
def test_whatever_is_added_can_be_sent_and_is_never_blank(texts: list[str]) -> None:
    sent: list[Piece] = []
    writer = BlockWriter(sent.extend, 10**6)
    for each in [*texts, "\ud800x", "\0"]:
        writer.add("paragraph", each)
        writer.heading(each, 9)
        writer.table([[each, each], [], [""]])
    writer.flush()
    to_frame(Pieces(sent))
    assert all(piece.text.strip() == piece.text != "" for piece in sent)
    assert not any("\n" in piece.text or piece.level != 6 for piece in sent if piece.kind == "heading")


@pytest.mark.parametrize(("password", "problem"), [("", None), ("secret", "unsupported_file")])
def test_a_pdf_is_read_unless_it_needs_a_password(file: Path, password: str, problem: str | None) -> None:
    writer = PdfWriter(clone_from=str(write_pdf(file, ["Hello"])))
    writer.encrypt(password, "owner", algorithm="RC4-128")
    writer.write(str(file))
    blocks, end = read(file)
    assert end.problem == problem
    assert bool(blocks) == (problem is None)
    assert ("password" in end.message) == (problem is not None)


@pytest.mark.parametrize("write", [write_docx, write_xlsx])
def test_an_office_file_that_begins_with_a_large_picture_is_known(file: Path, write: Callable[[Path], Path]) -> None:
    with zipfile.ZipFile(write(file)) as archive:
        parts = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("media/picture.png", bytes(100_000))
        for name, data in parts.items():
            archive.writestr(name, data)
    assert media_type(file) == "application/zip"
    assert read(file)[0]


def test_json_of_one_value_or_damaged_is_taken_as_it_is(file: Path) -> None:
    assert read_json(file, '"word"') == ["word"]
    assert read_json(file, "true") == ["true"]
    assert read_json(file, '{"a": 1') == ['{"a": 1']


def read_json(file: Path, text: str) -> list[str]:
    file.write_text(text)
    sent: list[Piece] = []
    writer = BlockWriter(sent.extend, 1000)
    json_text.read(file, writer)
    writer.flush()
    return [each.text for each in sent]
