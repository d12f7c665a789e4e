"""DOCX, read as a stream of tags like HTML: also what stands in content controls, text boxes and tracked insertions.

The format is ECMA-376, part 1, WordprocessingML.
"""

from __future__ import annotations

import posixpath
import re
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Protocol

from lxml import etree

from appliance.retrieval.parsing.source import open_archive
from appliance.retrieval.parsing.writer import BlockWriter, InvalidError, one_line

READ_BYTES = 64 * 1024
_MAIN = "word/document.xml"
_HEADING_NAME = re.compile(r"(?:heading|标题|überschrift|titre) ?([1-9])", re.IGNORECASE)
_MOST_PARENTS = 20


class _Target(Protocol):
    def start(self, tag: str, attributes: dict[str, str]) -> None: ...
    def end(self, tag: str) -> None: ...
    def data(self, text: str) -> None: ...
    def close(self) -> None: ...


def read(path: Path, writer: BlockWriter) -> None:
    """Take the text from a file."""
    with open_archive(path) as archive:
        parts = set(archive.namelist())
        main = _main_part(archive, parts)
        folder = posixpath.dirname(main)
        styles = _Styles()
        if f"{folder}/styles.xml" in parts:
            _stream(archive, f"{folder}/styles.xml", styles)
        if "docProps/core.xml" in parts:
            _stream(archive, "docProps/core.xml", _Properties(writer.name))
        for part in (main, f"{folder}/footnotes.xml", f"{folder}/endnotes.xml"):
            if part in parts:
                _stream(archive, part, _Body(writer, styles))


def _main_part(archive: zipfile.ZipFile, parts: set[str]) -> str:
    relations = _Relations()
    if "_rels/.rels" in parts:
        _stream(archive, "_rels/.rels", relations)
    main = relations.main if relations.main in parts else _MAIN
    if main not in parts:
        raise InvalidError("is damaged: it has no text part")
    return main


def _stream(archive: zipfile.ZipFile, part: str, target: _Target) -> None:
    parser = etree.XMLParser(target=target, resolve_entities=False, no_network=True, load_dtd=False, huge_tree=False)
    try:
        with archive.open(part) as file:
            while data := file.read(READ_BYTES):
                parser.feed(data)
        parser.close()
    except (etree.XMLSyntaxError, zipfile.BadZipFile, EOFError, RuntimeError, NotImplementedError) as error:
        raise InvalidError(f"is damaged: {part}: {one_line(str(error))}") from error


class _Quiet:
    """What hears nothing."""

    def start(self, tag: str, attributes: dict[str, str]) -> None:
        """Take a start tag."""

    def end(self, tag: str) -> None:
        """Take an end tag."""

    def data(self, text: str) -> None:
        """Take text."""

    def close(self) -> None:
        """End."""


class _Relations(_Quiet):
    """Finds the main part."""

    def __init__(self) -> None:
        self.main = ""

    def start(self, tag: str, attributes: dict[str, str]) -> None:
        """Take a relation."""
        if _local(tag) == "Relationship" and attributes.get("Type", "").endswith("/officeDocument"):
            self.main = attributes.get("Target", "").lstrip("/")


class _Properties(_Quiet):
    """Finds the title."""

    def __init__(self, name: Callable[[str], None]) -> None:
        self._name = name
        self._title: list[str] | None = None

    def start(self, tag: str, attributes: dict[str, str]) -> None:
        """Take a property."""
        del attributes
        if _local(tag) == "title":
            self._title = []

    def data(self, text: str) -> None:
        """Take text."""
        if self._title is not None:
            self._title.append(text)

    def end(self, tag: str) -> None:
        """Take a property's end."""
        del tag
        if self._title is not None:
            self._name("".join(self._title))
        self._title = None


class _Styles(_Quiet):
    """Which styles are headings, and which are lists."""

    def __init__(self) -> None:
        self._style = ""
        self._names: dict[str, str] = {}
        self._parents: dict[str, str] = {}
        self._outline: dict[str, int] = {}

    def start(self, tag: str, attributes: dict[str, str]) -> None:
        """Take a style, or what is said of one."""
        tag, value = _local(tag), _value(attributes)
        if tag == "style":
            self._style = next((text for key, text in attributes.items() if _local(key) == "styleId"), "")
        elif tag == "name":
            self._names[self._style] = value
        elif tag == "basedOn":
            self._parents[self._style] = value
        elif tag == "outlineLvl" and value.isdecimal():
            self._outline[self._style] = int(value) + 1

    def level(self, style: str) -> int:
        """Return the level of the heading that a style makes, or 0."""
        for each in self._family(style):
            name = self._names.get(each, each)
            if found := _HEADING_NAME.fullmatch(name):
                return int(found[1])
            if 1 <= self._outline.get(each, 0) <= 9:
                return self._outline[each]
            if name.lower() == "title":
                return 1
        return 0

    def is_list(self, style: str) -> bool:
        """Return True if a style makes the items of a list."""
        return any(self._names.get(each, each).lower().startswith("list ") for each in self._family(style))

    def _family(self, style: str) -> Iterator[str]:
        for _ in range(_MOST_PARENTS):
            if not style:
                return
            yield style
            style = self._parents.get(style, "")


class _Paragraph:
    def __init__(self) -> None:
        self.text: list[str] = []
        self.style = ""
        self.level = 0
        self.indent: int | None = None


class _Body:
    """What the parser calls for each tag and text of a part."""

    def __init__(self, writer: BlockWriter, styles: _Styles) -> None:
        self._writer = writer
        self._styles = styles
        self._paragraphs: list[_Paragraph] = []
        self._tables: list[list[list[list[str]]]] = []
        self._items: list[str] = []
        self._is_text = False
        self._fallbacks = 0

    def start(self, tag: str, attributes: dict[str, str]) -> None:
        """Take a start tag."""
        tag = _local(tag)
        if tag == "Fallback":  # the same text once more, for programs that know less
            self._fallbacks += 1
        elif self._fallbacks:
            return
        elif tag == "p":
            self._paragraphs.append(_Paragraph())
        elif tag == "tbl":
            self._end_items()
            self._tables.append([])
        elif tag == "tr" and self._tables:
            self._tables[-1].append([])
        elif tag == "tc" and self._tables and self._tables[-1]:
            self._tables[-1][-1].append([])
        elif self._paragraphs:
            self._in_paragraph(tag, _value(attributes))

    def end(self, tag: str) -> None:
        """Take an end tag."""
        tag = _local(tag)
        if tag == "Fallback":
            self._fallbacks -= 1
        elif self._fallbacks:
            return
        elif tag == "t":
            self._is_text = False
        elif tag == "p" and self._paragraphs:
            self._end_paragraph(self._paragraphs.pop())
        elif tag == "tbl" and self._tables:
            self._end_table()

    def data(self, text: str) -> None:
        """Take text."""
        if self._is_text and self._paragraphs and not self._fallbacks:
            self._paragraphs[-1].text.append(text)

    def close(self) -> None:
        """Add what is left."""
        self._end_items()

    def _in_paragraph(self, tag: str, value: str) -> None:
        paragraph = self._paragraphs[-1]
        match tag:
            case "t":
                self._is_text = True
            case "tab":
                paragraph.text.append("\t")
            case "br" | "cr":
                paragraph.text.append("\n")
            case "noBreakHyphen":
                paragraph.text.append("-")
            case "pStyle":
                paragraph.style = value
            case "outlineLvl" if value.isdecimal() and int(value) < 9:
                paragraph.level = int(value) + 1
            case "ilvl":
                paragraph.indent = int(value) if value.isdecimal() else 0
            case "numId":
                paragraph.indent = None if value == "0" else paragraph.indent or 0

    def _end_paragraph(self, paragraph: _Paragraph) -> None:
        text = "".join(paragraph.text).strip()
        if not text:
            return
        if self._tables and self._tables[-1] and self._tables[-1][-1]:
            self._tables[-1][-1][-1].append(text)
            return
        level = paragraph.level or self._styles.level(paragraph.style)
        if level:
            self._end_items()
            self._writer.heading(text, level)
        elif paragraph.indent is not None or self._styles.is_list(paragraph.style):
            self._items.append("  " * min(paragraph.indent or 0, 8) + "- " + text)
        else:
            self._end_items()
            self._writer.add("paragraph", text)

    def _end_table(self) -> None:
        rows = [[" ".join(cell) for cell in row] for row in self._tables.pop()]
        if self._tables and self._tables[-1] and self._tables[-1][-1]:  # a table in a cell becomes its text
            self._tables[-1][-1][-1] += [" ".join(filter(None, row)) for row in rows]
        else:
            self._writer.table(rows)

    def _end_items(self) -> None:
        self._writer.add("list", "\n".join(self._items))
        self._items.clear()


def _local(name: str) -> str:
    return name.rpartition("}")[2]


def _value(attributes: dict[str, str]) -> str:
    return next((text for key, text in attributes.items() if _local(key) == "val"), "")
