"""Plain text: paragraphs are what stands between blank lines."""

from __future__ import annotations

import re
from pathlib import Path

from appliance.retrieval.parsing.source import read_text
from appliance.retrieval.parsing.writer import BlockWriter

_BLANK_LINES = re.compile(r"\n[^\S\n]*\n\s*")


def read(path: Path, writer: BlockWriter) -> None:
    """Take the text from a file."""
    write_plain(read_text(path, writer.max_characters), writer)


def write_plain(text: str, writer: BlockWriter) -> None:
    """Add a text's paragraphs; single line ends stay in them."""
    start = 0
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    for gap in _BLANK_LINES.finditer(text):
        writer.add("paragraph", text[start : gap.start()])
        start = gap.end()
    writer.add("paragraph", text[start:])
