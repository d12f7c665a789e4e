"""JSON and JSON lines: a line for each value, with its path in front."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from appliance.retrieval.parsing.plain import write_plain
from appliance.retrieval.parsing.source import read_text
from appliance.retrieval.parsing.writer import BlockWriter

MOST_DEPTH = 100


def read(path: Path, writer: BlockWriter) -> None:
    """Take the text from a file of one value; one that is no JSON, or nested too deeply, is taken as it is written."""
    text = read_text(path, writer.max_characters)
    try:
        value = _parsed(text.removeprefix("\ufeff"))
    except (ValueError, RecursionError):
        write_plain(text, writer)
    else:
        _write(value, writer)


def read_lines(path: Path, writer: BlockWriter) -> None:
    """Take the text from a file of one value a line."""
    text = read_text(path, writer.max_characters)
    for line in text.removeprefix("\ufeff").split("\n"):
        if not line.strip():
            continue
        try:
            value = _parsed(line)
        except (ValueError, RecursionError):
            writer.add("paragraph", line)
        else:
            writer.add("paragraph", "\n".join(_lines(value)))


def _parsed(text: str) -> Any:
    """Return a value, with numbers as they are written."""
    return json.loads(text, parse_int=str, parse_float=str, parse_constant=str)


def _write(value: Any, writer: BlockWriter) -> None:
    """Add a block for each record of a list, and for each member of an object that is no plain value."""
    if isinstance(value, list):
        for each in value:
            writer.add("paragraph", "\n".join(_lines(each)))
    elif isinstance(value, dict):
        plain = {key: each for key, each in value.items() if not isinstance(each, dict | list)}
        writer.add("paragraph", "\n".join(_lines(plain)))
        for key, each in value.items():
            if isinstance(each, list) and any(isinstance(record, dict) for record in each):
                for record in each:
                    writer.add("paragraph", "\n".join(_lines(record, key)))
            elif isinstance(each, dict | list):
                writer.add("paragraph", "\n".join(_lines(each, key)))
    else:
        writer.add("paragraph", _spelled(value))


def _lines(value: Any, path: str = "", depth: int = 0) -> Iterator[str]:
    if depth >= MOST_DEPTH:
        raise RecursionError
    if isinstance(value, dict):
        for key, each in value.items():
            yield from _lines(each, f"{path}.{key}" if path else key, depth + 1)
    elif isinstance(value, list) and any(isinstance(each, dict | list) for each in value):
        for each in value:
            yield from _lines(each, path, depth + 1)
    else:
        text = ", ".join(map(_spelled, value)) if isinstance(value, list) else _spelled(value)
        if text:
            yield f"{path}: {text}" if path else text


def _spelled(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    return "" if value is None else str(value)
