"""Hostile, damaged and odd files: each ends within its limits, in a clear answer, and the next file is read."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import signal
import sys
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import psutil
import pytest

from appliance.core.errors import InvalidRequestError, UnavailableError
from appliance.core.settings import Settings
from appliance.retrieval.parsing import child, parser, process
from appliance.retrieval.parsing.document import ParsedDocument
from appliance.retrieval.parsing.parser import DocumentParser
from appliance.retrieval.parsing.process import Guard
from appliance.retrieval.parts import ParserDownError
from tests.retrieval import documents
from tests.retrieval.documents import media_type, pdf_bomb, write_docx, write_mail, write_pdf, write_xlsx

pytestmark = pytest.mark.anyio

DEADLINE_S = 60.0
SETTINGS = Settings(document_timeout_s=40.0)


@pytest.fixture
async def documents_parser() -> AsyncIterator[DocumentParser]:
    subject = DocumentParser(SETTINGS)
    yield subject
    await subject.close()


async def parse(subject: DocumentParser, path: Path) -> ParsedDocument:
    async with asyncio.timeout(DEADLINE_S):
        return await subject.parse(path, path.name, media_type(path))


async def refusal(subject: DocumentParser, path: Path) -> InvalidRequestError:
    with pytest.raises(InvalidRequestError) as refused:
        await parse(subject, path)
    error = refused.value
    assert error.code in ("invalid_file", "unsupported_file")
    assert error.message.startswith(path.name)
    assert error.advice
    return error


async def assert_next_file_is_read(subject: DocumentParser, folder: Path) -> None:
    path = folder / "next.txt"
    path.write_text("The next file.")
    assert (await parse(subject, path)).text == "The next file."


def process_of(subject: DocumentParser) -> psutil.Process:
    assert subject._child is not None
    return psutil.Process(subject._child._process.pid)


async def test_one_child_reads_files_of_every_kind(documents_parser: DocumentParser, tmp_path: Path) -> None:
    plain = tmp_path / "a.txt"
    plain.write_text("Text.")
    await parse(documents_parser, plain)
    first = process_of(documents_parser).pid
    for path in (
        write_pdf(tmp_path / "a.pdf", ["Hello"], title="T"),
        write_docx(tmp_path / "a.docx"),
        write_xlsx(tmp_path / "a.xlsx"),
        write_mail(tmp_path / "a.eml"),
    ):
        assert (await parse(documents_parser, path)).blocks
    for name, text in (("a.html", "<html><p>x"), ("a.md", "# x\n"), ("a.csv", "a,b\n1,2"), ("a.json", '{"a": 1}')):
        (tmp_path / name).write_text(text)
        assert (await parse(documents_parser, tmp_path / name)).blocks
    (tmp_path / "a.gb.txt").write_bytes("水泵已经停止运行，请检查阀门。".encode("gb18030"))
    assert "水泵" in (await parse(documents_parser, tmp_path / "a.gb.txt")).text
    running = process_of(documents_parser)
    assert running.pid == first
    assert running.nice() > psutil.Process().nice()
    assert running.rlimit(psutil.RLIMIT_NOFILE)[0] <= 16
    assert running.rlimit(psutil.RLIMIT_FSIZE) == (0, 0)
    assert running.rlimit(psutil.RLIMIT_AS)[0] < 4 * 2**30


async def test_the_same_file_gives_the_same_document(documents_parser: DocumentParser, tmp_path: Path) -> None:
    path = write_docx(tmp_path / "a.docx")
    first = await parse(documents_parser, path)
    await documents_parser._discard_child()
    assert await parse(documents_parser, path) == first


# Files that are refused


def empty(path: Path) -> None:
    path.write_bytes(b"")


def picture(path: Path) -> None:
    path.write_bytes(b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR" + bytes(100))


def picture_of_another_kind(path: Path) -> None:
    path.write_bytes(b"GIF89a" + bytes(range(256)))


def picture_bomb(path: Path) -> None:
    path.write_bytes(documents.png_bomb())


def archive(path: Path) -> None:
    documents.docx_with(path, "x")
    path.write_bytes(path.read_bytes().replace(b"word/document.xml", b"some/document.xml"))


def zip_bomb(path: Path) -> None:
    documents.docx_with(path, "<d/>", size=600 * 2**20)


def bomb_of_one_text(path: Path) -> None:
    start = f'<w:document xmlns:w="{documents.WORDS}"><w:body><w:p><w:r><w:t xml:space="preserve">x'
    documents.docx_with(path, start, size=400 * 2**20)


def deep_docx(path: Path) -> None:
    documents.docx_with(path, "<a>" * 200_000 + "</a>" * 200_000)


def entities(path: Path) -> None:
    levels = "".join(f'<!ENTITY e{at} "{f"&e{at - 1};" * 10}">' for at in range(1, 12))
    start = f'<?xml version="1.0"?><!DOCTYPE d [<!ENTITY e0 "lol">{levels}]>'
    body = (
        f'<w:document xmlns:w="{documents.WORDS}"><w:body><w:p><w:r><w:t>&e11;</w:t></w:r></w:p></w:body></w:document>'
    )
    documents.docx_with(path, start + body)


def page_that_unpacks_to_gigabytes(path: Path) -> None:
    pdf_bomb(path)


def cut_pdf(path: Path) -> None:
    path.write_bytes(b"%PDF-1.7\n1 0 obj\n<< /Type /Catalog")


def cut_docx(path: Path) -> None:
    write_docx(path)
    path.write_bytes(path.read_bytes()[:-500])


def too_much_text(path: Path) -> None:
    line = b"A line of text among many others that are just like it.\n\n"
    with path.open("wb") as file:
        for _ in range(200):
            file.write(line * (2**20 // len(line)))


def blanks_only(path: Path) -> None:
    path.write_text(" \n\t\n" * 1000)


@pytest.mark.parametrize(
    ("make", "code"),
    [
        (empty, "invalid_file"),
        (blanks_only, "invalid_file"),
        (picture, "invalid_file"),
        (picture_of_another_kind, "unsupported_file"),
        (picture_bomb, "invalid_file"),
        (archive, "unsupported_file"),
        (zip_bomb, "invalid_file"),
        (bomb_of_one_text, "invalid_file"),
        (deep_docx, "invalid_file"),
        (entities, "invalid_file"),
        (page_that_unpacks_to_gigabytes, "invalid_file"),
        (cut_pdf, "invalid_file"),
        (cut_docx, ("invalid_file", "unsupported_file")),
        (too_much_text, "invalid_file"),
    ],
)
async def test_a_bad_file_is_refused_and_the_next_is_read(
    documents_parser: DocumentParser, tmp_path: Path, make: Callable[[Path], None], code: str | tuple[str, ...]
) -> None:
    path = tmp_path / "bad.docx"
    make(path)
    error = await refusal(documents_parser, path)
    assert error.code in code
    await assert_next_file_is_read(documents_parser, tmp_path)


# Files that are odd, and read


def deep_html(path: Path) -> None:
    path.write_text("<html>" + "<div><table><tr><td><ul><li>" * 50_000 + "the text" + "</div>" * 50_000)


def million_columns(path: Path) -> None:
    row = ",".join(f"c{at}" for at in range(1_000_000))
    path.write_text(f"{row}\n{row},the text\n")


def million_columns_of_excel(path: Path) -> None:
    path.write_text("a,b\n" + "," * 1_000_000 + "the text\n")


def deep_json(path: Path) -> None:
    path.write_text("[" * 100_000 + '"the text"' + "]" * 100_000)


def deep_lists(path: Path) -> None:
    path.write_text("# the text\n\n" + "> " * 5000 + "x\n\n" + "".join("  " * at + "- x\n" for at in range(300)))


def mixed_encodings(path: Path) -> None:
    path.write_bytes("Größe, and the text\n".encode() * 3 + "Größe\n".encode("cp1252"))


def right_to_left_and_emoji(path: Path) -> None:
    path.write_text("שלום עולם\n\nمرحبا\n\nthe text 👩‍👩‍👧‍👦 \U0001f1e9\U0001f1ea")


def zeros(path: Path) -> None:
    path.write_bytes(b"a\0b and the text " + b"word " * 100 + b"\0")


def one_endless_line(path: Path) -> None:
    path.write_text("the text" + "x" * 10_000_000)


def nested_mail(path: Path) -> None:
    head = b"From: a\nTo: b\nSubject: the text\nDate: c\nContent-Type: message/rfc822\n\n"
    path.write_bytes(head * 50 + b"x")


def lone_quote_csv(path: Path) -> None:
    path.write_text('a,b\n1,"the text' + ",2\n" * 100_000)


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (deep_html, "a.html"),
        (million_columns, "a.csv"),
        (million_columns_of_excel, "a.csv"),
        (deep_json, "a.json"),
        (deep_lists, "a.md"),
        (mixed_encodings, "a.txt"),
        (right_to_left_and_emoji, "a.txt"),
        (zeros, "a.txt"),
        (one_endless_line, "a.txt"),
        (nested_mail, "a.eml"),
        (lone_quote_csv, "a.csv"),
        (write_docx, "a.pdf"),
    ],
)
async def test_an_odd_file_is_read_and_so_is_the_next(
    documents_parser: DocumentParser, tmp_path: Path, make: Callable[[Path], None], name: str
) -> None:
    path = tmp_path / name
    make(path)
    document = await parse(documents_parser, path)
    assert "the text" in document.text or "Turn it on." in document.text
    assert len(document.text) <= SETTINGS.max_document_characters
    assert all(block.text.strip() for block in document.blocks)
    await assert_next_file_is_read(documents_parser, tmp_path)


@pytest.mark.parametrize("write", [write_pdf, write_docx, write_xlsx, write_mail])
async def test_flipped_bytes_never_hurt_more_than_their_file(
    documents_parser: DocumentParser, tmp_path: Path, write: Callable[..., Path]
) -> None:
    whole = (write(tmp_path / "a", ["Hello"]) if write is write_pdf else write(tmp_path / "a")).read_bytes()
    chance = random.Random(7)
    for _ in range(15):
        damaged = bytearray(whole)
        for _ in range(20):
            damaged[chance.randrange(len(damaged))] = chance.randrange(256)
        (tmp_path / "b").write_bytes(damaged)
        with contextlib.suppress(InvalidRequestError):
            await parse(documents_parser, tmp_path / "b")
    await assert_next_file_is_read(documents_parser, tmp_path)


# The child


async def test_a_file_that_takes_too_long_is_given_up(tmp_path: Path) -> None:
    subject = DocumentParser(Settings(document_timeout_s=0.05))
    path = tmp_path / "slow.html"
    path.write_text("<html>" + "<p>word</p>" * 500_000)
    try:
        error = await refusal(subject, path)
        assert "0.05 s" in error.message
        assert "document_timeout_s" in error.advice
        assert subject._child is None
    finally:
        await subject.close()


async def test_a_child_that_was_killed_is_replaced(documents_parser: DocumentParser, tmp_path: Path) -> None:
    await assert_next_file_is_read(documents_parser, tmp_path)
    process_of(documents_parser).send_signal(signal.SIGKILL)
    await assert_next_file_is_read(documents_parser, tmp_path)


async def test_a_child_that_dies_of_its_first_file_is_not_asked_twice(
    documents_parser: DocumentParser, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.txt"
    path.write_text("Text.")
    monkeypatch.setattr(child.ParserChild, "start", start_anyhow)
    error = await refusal(documents_parser, path)
    assert "brought its reader down" in error.message
    monkeypatch.undo()
    await assert_next_file_is_read(documents_parser, tmp_path)


async def start_anyhow() -> child.ParserChild:
    process = await asyncio.create_subprocess_exec(
        "/bin/sh", "-c", "exit 0", stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE
    )
    return child.ParserChild(process)


async def test_a_child_is_replaced_after_many_files_and_ends_when_idle(
    documents_parser: DocumentParser, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parser, "FILES_PER_CHILD", 2)
    monkeypatch.setattr(parser, "IDLE_S", 3600.0)
    pids = []
    for _ in range(4):
        await assert_next_file_is_read(documents_parser, tmp_path)
        pids.append(process_of(documents_parser).pid)
    assert pids[0] == pids[1] != pids[2] == pids[3]
    monkeypatch.setattr(parser, "IDLE_S", 0.0)
    await assert_next_file_is_read(documents_parser, tmp_path)
    assert documents_parser._child is not None
    async with asyncio.timeout(DEADLINE_S):
        await documents_parser._child._process.wait()
    await assert_next_file_is_read(documents_parser, tmp_path)


async def test_who_leaves_ends_the_work(documents_parser: DocumentParser, tmp_path: Path) -> None:
    path = tmp_path / "slow.html"
    path.write_text("<html>" + "<p>word</p>" * 500_000)
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.5):
            await documents_parser.parse(path, path.name, "text/html")
    assert documents_parser._child is None
    await assert_next_file_is_read(documents_parser, tmp_path)


@pytest.mark.parametrize("program", ["/no/such/python", "/bin/false"])
async def test_a_parser_that_does_not_start_says_so(
    documents_parser: DocumentParser, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, program: str
) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(sys, "executable", program)
        with pytest.raises(ParserDownError, match="start"):
            await documents_parser.parse(tmp_path / "a.txt", "a.txt", "text/plain")
    await assert_next_file_is_read(documents_parser, tmp_path)


async def test_a_closed_parser_says_so(tmp_path: Path) -> None:
    subject = DocumentParser(SETTINGS)
    await assert_next_file_is_read(subject, tmp_path)
    running = process_of(subject)
    await subject.close()
    await subject.close()
    assert not running.is_running()
    with pytest.raises(UnavailableError):
        await subject.parse(tmp_path / "next.txt", "next.txt", "text/plain")


def test_the_guard_lets_nothing_be_opened_but_the_file(tmp_path: Path) -> None:
    guard = Guard()
    guard.path = str(tmp_path / "a.txt")
    guard("open", (guard.path, "rb", 0))
    guard("open", (os.__file__, None, os.O_RDONLY))
    guard("open", (process.__file__, "rb", 0))  # readers are imported when they are needed
    guard("open", (3, "rb", 0))
    guard("import", ("os",))
    for event, arguments in (
        ("open", ("/etc/passwd", "r", 0)),
        ("open", (guard.path, "wb", 0)),
        ("open", (b"/etc/passwd", None, 0)),
        ("socket.connect", ()),
        ("subprocess.Popen", ()),
        ("os.system", ()),
    ):
        with pytest.raises(PermissionError):
            guard(event, arguments)
