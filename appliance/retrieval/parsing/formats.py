"""Which reader takes the text from which type of file. Each is imported when it is first needed."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import TypeAlias

from appliance.retrieval.parsing import sniff
from appliance.retrieval.parsing.source import open_archive
from appliance.retrieval.parsing.writer import BlockWriter, InvalidError, UnsupportedError

Reader: TypeAlias = Callable[[Path, BlockWriter], None]

_READERS = {
    sniff.PLAIN: ("plain", "read"),
    sniff.MARKDOWN: ("markdown", "read"),
    sniff.HTML: ("html", "read"),
    sniff.CSV: ("tables", "read"),
    sniff.TSV: ("tables", "read"),
    sniff.JSON: ("json_text", "read"),
    sniff.JSON_LINES: ("json_text", "read_lines"),
    sniff.MAIL: ("mail", "read"),
    sniff.PDF: ("pdf", "read"),
    sniff.DOCX: ("docx", "read"),
    sniff.XLSX: ("xlsx", "read"),
    sniff.PNG: ("pictures", "read"),
    sniff.JPEG: ("pictures", "read"),
}
ADVICE = (
    "Text is taken from plain text, Markdown, HTML, PDF, DOCX, XLSX, CSV, JSON and e-mail, and with the models that "
    "read pictures, from scans, PNG and JPEG."
)


def read(path: Path, media_type: str, writer: BlockWriter) -> None:
    """Take the text from a file.

    Raises:
        UnsupportedError: There is no reader for its type.
        InvalidError: It is damaged, hostile, or over a limit.
        Exception: Whatever a library raises on what its author did not think of.
    """
    if path.stat().st_size == 0:
        raise InvalidError("is empty", "Send a file with text.")
    if media_type == sniff.ZIP:
        media_type = _office_type(path)
    if media_type not in _READERS:
        raise UnsupportedError(f"is of the type {media_type}, from which no text is taken")
    module, name = _READERS[media_type]
    reader: Reader = getattr(import_module(f"appliance.retrieval.parsing.{module}"), name)
    reader(path, writer)
    if writer.is_empty and not writer.pages_without_text:
        raise InvalidError("holds no text")


def _office_type(path: Path) -> str:
    """Tell an office file by the list of its parts, where its first bytes did not."""
    with open_archive(path) as archive:
        names = set(archive.namelist())
    if "word/document.xml" in names:
        return sniff.DOCX
    return sniff.XLSX if "xl/workbook.xml" in names else sniff.ZIP
