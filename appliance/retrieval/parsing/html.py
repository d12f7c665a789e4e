"""HTML, read as a stream of tags: no tree is built, so neither depth nor size cost more than the text."""

from __future__ import annotations

import re
from pathlib import Path

from lxml import etree

from appliance.retrieval.parsing.decoding import decode
from appliance.retrieval.parsing.source import read_bytes
from appliance.retrieval.parsing.writer import BlockWriter, one_line

FEED_CHARACTERS = 64 * 1024
MOST_COLUMN_LISTS = 32
"""Lists within lists are indented up to here."""

_HEADINGS = {f"h{level}": level for level in range(1, 7)}
_UNSEEN = frozenset(
    ("script", "style", "noscript", "template", "svg", "math", "select", "textarea", "iframe", "object")
)
_BREAKING = frozenset(
    (
        "address",
        "article",
        "aside",
        "blockquote",
        "body",
        "caption",
        "center",
        "dd",
        "details",
        "div",
        "dl",
        "dt",
        "fieldset",
        "figcaption",
        "figure",
        "footer",
        "form",
        "header",
        "hr",
        "legend",
        "main",
        "nav",
        "p",
        "section",
        "summary",
    )
)
_LISTS = frozenset(("ul", "ol", "menu"))
_DECLARED = re.compile(
    rb"<(?:meta|\?xml)[^>]{0,200}?(?:charset|encoding)\s*=\s*[\"']?\s*([\w.:-]{1,40})", re.IGNORECASE
)


def read(path: Path, writer: BlockWriter) -> None:
    """Take the text from a file."""
    data = read_bytes(path, writer.max_characters)
    declared = _DECLARED.search(data[:4096])
    write_html(decode(data, declared[1].decode("ascii") if declared else ""), writer)


def write_html(markup: str, writer: BlockWriter) -> None:
    """Add what a reader of a page sees."""
    parser = etree.HTMLParser(target=_Page(writer), no_network=True, remove_comments=True, remove_pis=True)
    markup = re.sub(r"\A\s*<\?xml[^>]*\?>", "", markup).replace("\0", "")
    for start in range(0, len(markup), FEED_CHARACTERS):
        parser.feed(markup[start : start + FEED_CHARACTERS].encode("utf-8", "replace").decode())
    if markup.strip():
        parser.close()


class _Table:
    """A table that is open; one that holds another is only there for the layout."""

    def __init__(self) -> None:
        self.rows: list[list[str]] = []
        self.is_layout = False


class _Page:
    """What the parser calls for each tag and text."""

    def __init__(self, writer: BlockWriter) -> None:
        self._writer = writer
        self._text: list[str] = []
        self._unseen = 0
        self._title: list[str] | None = None
        self._level = 0
        self._preformatted = 0
        self._lists: list[int | None] = []
        self._items: list[str] = []
        self._mark = ""
        self._tables: list[_Table] = []

    def start(self, tag: str, _: object) -> None:
        """Take a start tag."""
        if tag in _UNSEEN:
            self._unseen += 1
        elif tag == "title" and not self._unseen:
            self._title = []
        elif tag == "br":
            self._text.append("\n")
        elif tag in _HEADINGS:
            self._break()
            self._level = _HEADINGS[tag]
        elif tag == "pre":
            self._break()
            self._preformatted += 1
        elif tag in _LISTS:
            self._break()
            self._lists.append(1 if tag == "ol" else None)
        elif tag == "li":
            self._start_item()
        elif tag == "img":
            self._text.append(" ")
        else:
            self._start_of_table(tag)

    def end(self, tag: str) -> None:
        """Take an end tag, written or implied."""
        if tag in _UNSEEN:
            self._unseen = max(self._unseen - 1, 0)
        elif tag == "title" and self._title is not None:
            self._writer.name("".join(self._title))
            self._title = None
        elif tag in _HEADINGS:
            self._break()
            self._level = 0
        elif tag == "pre":
            self._break()
            self._preformatted = max(self._preformatted - 1, 0)
        elif tag in _LISTS and self._lists:
            self._break()
            self._lists.pop()
            self._end_items()
        elif tag == "li":
            self._break()
        else:
            self._end_of_table(tag)

    def data(self, text: str) -> None:
        """Take text."""
        if self._title is not None:
            self._title.append(text)
        elif not self._unseen:
            self._text.append(text)

    def close(self) -> None:
        """Add what is left."""
        self._break()
        while self._tables:
            self._end_of_table("table")
        self._lists.clear()
        self._end_items()

    # Tables

    def _start_of_table(self, tag: str) -> None:
        if tag == "table":
            if self._tables:
                self._give_up(self._tables[-1])
            self._break()
            self._tables.append(_Table())
        elif tag == "tr" and self._in_table:
            self._add_caption()
            self._tables[-1].rows.append([])
        elif tag in ("td", "th") and self._in_table:
            self._add_caption()
        elif tag in _BREAKING or tag in ("td", "th", "tr"):
            self._break()

    def _end_of_table(self, tag: str) -> None:
        if tag == "table" and self._tables:
            self._break()
            table = self._tables.pop()
            if all(len(row) <= 1 for row in table.rows):
                self._give_up(table)
            self._writer.table(table.rows)
        elif tag in ("td", "th") and self._in_table:
            rows = self._tables[-1].rows or [[]]
            rows[-1].append(one_line(self._take()))
            self._tables[-1].rows = rows
        elif tag in _BREAKING or tag in ("td", "th", "tr"):
            self._break()

    def _add_caption(self) -> None:
        """Add what stands in a table and in no cell."""
        self._writer.add("paragraph", one_line(self._take()))

    @property
    def _in_table(self) -> bool:
        return bool(self._tables) and not self._tables[-1].is_layout

    def _give_up(self, table: _Table) -> None:
        """Add the cells of what is no table as paragraphs."""
        table.is_layout = True
        for cell in (cell for row in table.rows for cell in row):
            self._writer.add("paragraph", cell)
        table.rows = []

    # Blocks

    def _take(self) -> str:
        text = "".join(self._text)
        self._text.clear()
        return text

    def _break(self) -> None:
        """End the block that is open."""
        if self._in_table:
            self._text.append("\n")
            return
        text = self._take()
        if not self._preformatted:
            text = "\n".join(filter(None, map(one_line, text.split("\n")))) if "\n" in text else one_line(text)
        if not text.strip():
            return
        if self._level:
            self._end_items()
            self._writer.heading(text, self._level)
        elif self._preformatted:
            self._end_items(among_lists=True)
            self._writer.add("code", text)
        elif self._lists:
            self._items.append("  " * min(len(self._lists) - 1, MOST_COLUMN_LISTS) + self._mark + text)
            self._mark = ""
        else:
            self._writer.add("paragraph", text)

    def _start_item(self) -> None:
        self._break()
        number = self._lists[-1] if self._lists else None
        self._mark = "- " if number is None else f"{number}. "
        if self._lists and number is not None:
            self._lists[-1] = number + 1

    def _end_items(self, *, among_lists: bool = False) -> None:
        """Add the list that is open, once the outermost ends or something else stands in it."""
        if self._lists and not (self._level or among_lists):
            return
        self._writer.add("list", "\n".join(self._items))
        self._items.clear()
