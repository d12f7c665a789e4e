"""Comma-separated values, and those that other marks separate."""

from __future__ import annotations

import csv
import io
import sys
from pathlib import Path

from appliance.retrieval.parsing.plain import write_plain
from appliance.retrieval.parsing.source import read_text
from appliance.retrieval.parsing.writer import BlockWriter

DELIMITERS = (",", ";", "\t", "|")
_SAMPLE_CHARACTERS = 64 * 1024
_SAMPLE_ROWS = 20


def read(path: Path, writer: BlockWriter) -> None:
    """Take the text from a file."""
    text = read_text(path, writer.max_characters).removeprefix("\ufeff").replace("\0", "")
    csv.field_size_limit(sys.maxsize)
    delimiter = _delimiter(text[:_SAMPLE_CHARACTERS])
    rows = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter)
    try:
        writer.table(rows)
    except csv.Error:
        write_plain(text, writer)


def _delimiter(sample: str) -> str:
    """Return the mark that most evenly makes most columns; a comma if there is none."""
    return max(DELIMITERS, key=lambda each: _evenness(sample, each))


def _evenness(sample: str, delimiter: str) -> tuple[float, int]:
    rows = csv.reader(io.StringIO(sample, newline=""), delimiter=delimiter)
    widths: list[int] = []
    try:
        for row in rows:
            if len(widths) == _SAMPLE_ROWS:
                break
            if row:
                widths.append(len(row))
    except csv.Error:
        return (0.0, 0)
    usual = max(set(widths), key=lambda width: (widths.count(width), width), default=1)
    return (widths.count(usual) / len(widths) if usual > 1 else 0.0, usual)
