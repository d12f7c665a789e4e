"""PDF: the text layer, page by page; pages without one are told, for they may be scans."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from pypdf import PageObject, PdfReader
from pypdf.errors import FileNotDecryptedError, LimitReachedError, PdfReadError

from appliance.retrieval.parsing.writer import BlockWriter, InvalidError, UnsupportedError, clean, one_line

MOST_PAGES = 50_000
MOST_OUTLINE = 10_000
_BLANK_LINES = re.compile(r"\n[^\S\n]*\n\s*")
_HYPHEN_AT_LINE_END = re.compile(r"(?<=[^\W\d_])[-\u00ad]\n(?=[a-zà-öø-ÿ])")

Outline = dict[int, dict[str, int]]
"""Headings by page, from 1: the level of each."""


def read(path: Path, writer: BlockWriter) -> None:
    """Take the text from a file."""
    with path.open("rb") as file:
        try:
            reader = PdfReader(file, strict=False)
            _decrypt(reader)
            pages = len(reader.pages)
        except (PdfReadError, RecursionError) as error:
            raise InvalidError(f"is damaged: {one_line(str(error))}") from error
        if pages > MOST_PAGES:
            raise InvalidError(f"has {pages} pages; {MOST_PAGES} are allowed", "Split it into several files.")
        writer.name(_title(reader))
        outline = _outline(reader)
        for number, page in enumerate(reader.pages, 1):
            if text := _text(page):
                _write_page(text, number, outline.get(number, {}), writer)
            else:
                writer.without_text(number)


def _decrypt(reader: PdfReader) -> None:
    if not reader.is_encrypted:
        return
    try:
        opened = reader.decrypt("")
    except Exception as error:
        raise UnsupportedError(f"is encrypted in a way that cannot be read: {one_line(str(error))}") from error
    if not opened:
        raise UnsupportedError("is protected by a password")


def _title(reader: PdfReader) -> str:
    try:
        return str((reader.metadata and reader.metadata.title) or "")
    except Exception:  # noqa: BLE001  (damage here costs the title and nothing else)
        return ""


def _text(page: PageObject) -> str:
    """Return a page's text, or "" if there is none or it is damaged: then a picture of it may still be read."""
    try:
        text = clean(page.extract_text())
    except (LimitReachedError, MemoryError) as error:
        raise InvalidError(f"unpacks to too much: {one_line(str(error)) or 'out of memory'}") from error
    except FileNotDecryptedError as error:
        raise UnsupportedError("is protected by a password") from error
    except Exception:  # noqa: BLE001  (one damaged page does not cost the others)
        return ""
    return _HYPHEN_AT_LINE_END.sub("", text)


def _outline(reader: PdfReader) -> Outline:
    found: Outline = {}
    try:
        waiting: list[tuple[Any, int]] = [(each, 1) for each in reversed(reader.outline)]
        for _ in range(MOST_OUTLINE):
            if not waiting:
                break
            entry, level = waiting.pop()
            if isinstance(entry, list):
                waiting += [(each, level + 1) for each in reversed(entry)]
            elif (page := reader.get_destination_page_number(entry)) is not None and page >= 0:
                found.setdefault(page + 1, {})[_bare(str(entry.title))] = level
    except Exception:  # noqa: BLE001  (a damaged outline costs the levels of the headings and nothing else)
        return found
    return found


def _write_page(text: str, page: int, headings: dict[str, int], writer: BlockWriter) -> None:
    for paragraph in _BLANK_LINES.split(text):
        lines: list[str] = []
        for line in paragraph.split("\n"):
            level = headings.pop(_bare(line), 0) if headings else 0
            if not level:
                lines.append(line)
                continue
            writer.add("paragraph", "\n".join(lines), page=page)
            lines = []
            writer.heading(line, level, page=page)
        writer.add("paragraph", "\n".join(lines), page=page)


def _bare(title: str) -> str:
    """Return what an outline's entry and the line on the page have in common."""
    return "".join(each for each in title.casefold() if each.isalnum())
