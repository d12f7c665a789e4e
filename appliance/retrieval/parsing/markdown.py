"""Markdown, as CommonMark with tables."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from markdown_it import MarkdownIt
from markdown_it.token import Token

from appliance.retrieval.parsing.source import read_text
from appliance.retrieval.parsing.writer import BlockWriter, one_line

PART_CHARACTERS = 200_000
"""A long file is read in parts from heading to heading, for the parser takes much memory."""

_FRONT_MATTER = re.compile(r"\A---[^\S\n]*\n(.*?)\n(?:---|\.\.\.)[^\S\n]*(?:\n|\Z)", re.DOTALL)
_TITLE = re.compile(r"^title:[^\S\n]*[\"']?(.+?)[\"']?[^\S\n]*$", re.MULTILINE)
_FENCE = re.compile(r" {0,3}(```|~~~)")
_HEADING = re.compile(r"#{1,6} ")
_LISTS = ("bullet_list_open", "ordered_list_open")


def read(path: Path, writer: BlockWriter) -> None:
    """Take the text from a file."""
    text = read_text(path, writer.max_characters).removeprefix("\ufeff").replace("\r\n", "\n").replace("\r", "\n")
    if front := _FRONT_MATTER.match(text):
        if title := _TITLE.search(front[1]):
            writer.name(title[1])
        writer.add("code", front[1])
        text = text[front.end() :]
    parser = MarkdownIt("commonmark").enable("table")
    for part in _parts(text):
        _Walk(parser.parse(part), writer).run()


def _parts(text: str) -> Iterator[str]:
    if len(text) <= PART_CHARACTERS:
        yield text
        return
    lines: list[str] = []
    size, fence = 0, ""
    for line in text.splitlines(keepends=True):
        if mark := _FENCE.match(line):
            fence = ("" if fence == mark[1] else fence) if fence else mark[1]
        elif size >= PART_CHARACTERS and not fence and _HEADING.match(line):
            yield "".join(lines)
            lines, size = [], 0
        lines.append(line)
        size += len(line)
    yield "".join(lines)


class _Walk:
    """Goes through a document's tokens once."""

    def __init__(self, tokens: list[Token], writer: BlockWriter) -> None:
        self._tokens = tokens
        self._writer = writer
        self._at = 0

    def run(self) -> None:
        while self._at < len(self._tokens):
            token = self._next()
            match token.type:
                case "heading_open":
                    text = _plain(self._next())
                    self._writer.heading(text, int(token.tag[1]))
                    if token.tag == "h1":
                        self._writer.name(text)
                case "inline":
                    self._writer.add("paragraph", _plain(token))
                case "fence" | "code_block":
                    self._writer.add("code", token.content)
                case "html_block":
                    self._writer.add("paragraph", _without_tags(token.content))
                case "bullet_list_open" | "ordered_list_open":
                    self._list(token)
                case "table_open":
                    self._writer.table(self._rows())

    def _next(self) -> Token:
        self._at += 1
        return self._tokens[self._at - 1]

    def _list(self, opened: Token) -> None:
        """Add a list with all that is in it as one block, a line an item; lists in it are indented."""
        lines: list[str] = []
        open_lists = [_first_number(opened)]
        mark = ""
        while open_lists:
            token = self._next()
            if token.type in _LISTS:
                open_lists.append(_first_number(token))
            elif token.type in ("bullet_list_close", "ordered_list_close"):
                open_lists.pop()
            elif token.type == "list_item_open":
                number = open_lists[-1]
                mark = "- " if number is None else f"{number}. "
                open_lists[-1] = None if number is None else number + 1
            elif token.type in ("inline", "fence", "code_block", "html_block"):
                text = _plain(token) if token.type == "inline" else token.content.rstrip()
                lines.append("  " * (len(open_lists) - 1) + mark + text)
                mark = ""
        self._writer.add("list", "\n".join(lines))

    def _rows(self) -> Iterator[list[str]]:
        row: list[str] = []
        while (token := self._next()).type != "table_close":
            if token.type == "tr_open":
                row = []
            elif token.type == "inline":
                row.append(_plain(token))
            elif token.type == "tr_close":
                yield row


def _first_number(opened: Token) -> int | None:
    return int(opened.attrGet("start") or 1) if opened.type == "ordered_list_open" else None


def _plain(inline: Token) -> str:
    """Return a line's text without its marks; of a picture, what is said in its place."""
    parts = []
    for child in inline.children or []:
        if child.type in ("softbreak", "hardbreak"):
            parts.append("\n")
        elif child.type == "html_inline":
            parts.append(" " if child.content.lower().startswith("<br") else "")
        else:
            parts.append(child.content)
    return "".join(parts)


def _without_tags(markup: str) -> str:
    return one_line(re.sub(r"<!--.*?-->|<[^<>]*>", " ", markup, flags=re.DOTALL))
