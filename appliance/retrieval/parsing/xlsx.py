"""XLSX: each sheet is a heading and a table; of formulas, what they came to when the file was saved."""

from __future__ import annotations

import datetime as dt
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openpyxl

from appliance.retrieval.parsing.source import open_archive
from appliance.retrieval.parsing.writer import BlockWriter


def read(path: Path, writer: BlockWriter) -> None:
    """Take the text from a file."""
    open_archive(path).close()
    with path.open("rb") as file:
        book = openpyxl.load_workbook(file, read_only=True, data_only=True, keep_links=False)
        writer.name(str(book.properties.title or ""))
        for sheet in book.worksheets:
            sheet.reset_dimensions()  # what the file says of its size may be far too much
            rows = _rows(sheet)
            first = next(rows, None)
            if first is None:
                continue
            writer.heading(sheet.title, 1)
            writer.table(_with(first, rows))


def _rows(sheet: Any) -> Iterator[list[str]]:
    for row in sheet.iter_rows(values_only=True):
        cells = [_spelled(value) for value in row]
        if any(cells):
            yield cells


def _with(first: list[str], rest: Iterator[list[str]]) -> Iterator[list[str]]:
    yield first
    yield from rest


def _spelled(value: Any) -> str:
    match value:
        case None:
            return ""
        case bool():
            return "TRUE" if value else "FALSE"
        case float():
            return str(int(value)) if value.is_integer() and abs(value) < 1e15 else repr(value)
        case dt.datetime() if value.time() == dt.time():
            return value.date().isoformat()
        case dt.datetime():
            return value.isoformat(sep=" ")
        case _:
            return str(value)
