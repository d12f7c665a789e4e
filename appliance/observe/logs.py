"""Log lines: JSON for machines, text for a terminal, one record a line, whatever was logged.

What clients send ends up in messages, so line breaks and control characters are escaped: nobody forges a line or drives
the reader's terminal. llama.cpp's own messages are native output and not logged here.
"""

from __future__ import annotations

import logging
import os
import sys
from contextvars import ContextVar
from datetime import UTC, datetime
from json import dumps
from typing import Literal, TextIO

import msgspec

from appliance.core.printable import printable

request_id: ContextVar[str] = ContextVar("request_id", default="")
"""The request that the current task works for; every line logged there carries it."""

_FOREIGN_LOGGERS = ("uvicorn", "uvicorn.error", "uvicorn.access", "uvicorn.asgi")
"""Loggers whose libraries may have given them handlers of their own."""

_STANDARD_ATTRIBUTES = frozenset(logging.makeLogRecord({}).__dict__) | {
    "message",
    "asctime",
    "taskName",
    "color_message",
}

_COLOURS = {
    "DEBUG": "\x1b[2m",
    "INFO": "\x1b[32m",
    "WARNING": "\x1b[33m",
    "ERROR": "\x1b[31m",
    "CRITICAL": "\x1b[1;31m",
}
_PLAIN = "\x1b[0m"


def configure_logging(
    level: Literal["debug", "info", "warning", "error"],
    format: Literal["auto", "json", "text"],  # noqa: A002  (named as the setting is)
    stream: TextIO | None = None,
) -> None:
    """Send every record of this process to one stream, in one form. May be called again.

    Args:
        level: Least severity that is logged.
        format: `auto` is text when the stream is a terminal and JSON lines otherwise.
        stream: None is standard error.
    """
    stream = stream or sys.stderr
    handler = logging.StreamHandler(stream)
    if format == "text" or (format == "auto" and stream.isatty()):
        handler.setFormatter(TextFormatter(colour=stream.isatty() and "NO_COLOR" not in os.environ))
    else:
        handler.setFormatter(JsonFormatter())
    root = logging.getLogger()
    for old in root.handlers[:]:
        root.removeHandler(old)
    root.addHandler(handler)
    root.setLevel(level.upper())
    for name in _FOREIGN_LOGGERS:
        logger = logging.getLogger(name)
        logger.handlers.clear()
        logger.propagate = True
        logger.setLevel(logging.NOTSET)
    logging.captureWarnings(True)


def set_log_level(level: str) -> None:
    """Change the least severity that is logged: `debug`, `info`, `warning` or `error`."""
    logging.getLogger().setLevel(level.upper())


class JsonFormatter(logging.Formatter):
    """One JSON object a line.

    Keys: `timestamp` (ISO 8601, UTC, milliseconds), `level`, `logger`, `message`, then `request_id` and the record's
    extra fields where there are any, and `exception` with the traceback.
    """

    def format(self, record: logging.LogRecord) -> str:
        """Return the record as one line of JSON, visible characters only."""
        fields: dict[str, object] = {
            "timestamp": _utc(record.created),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        for name, value in _extra_fields(record).items():
            fields.setdefault(name, value)
        if traceback := _traceback(self, record):
            fields["exception"] = traceback
        return _visible(_encode(fields))


class TextFormatter(logging.Formatter):
    """Local time, level, logger, message and extra fields on one line; a traceback follows, indented."""

    def __init__(self, *, colour: bool) -> None:
        super().__init__()
        self._colour = colour

    def format(self, record: logging.LogRecord) -> str:
        """Return the record as a line, with its traceback on further, indented lines."""
        time = datetime.fromtimestamp(record.created).astimezone().isoformat(sep=" ", timespec="milliseconds")[:-6]
        level = f"{record.levelname:<8}"
        if self._colour:
            level = f"{_COLOURS.get(record.levelname, '')}{level}{_PLAIN}"
        extra = "".join(f" {name}={value}" for name, value in _extra_fields(record).items())
        line = f"{time} {level} {record.name}: {printable(record.getMessage() + extra)}"
        traceback = _traceback(self, record).splitlines()
        return "\n".join([line, *(f"    {printable(each)}" for each in traceback)])


def _utc(created: float) -> str:
    return datetime.fromtimestamp(created, tz=UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def _extra_fields(record: logging.LogRecord) -> dict[str, object]:
    fields = {name: value for name, value in record.__dict__.items() if name not in _STANDARD_ATTRIBUTES}
    if current := request_id.get():
        fields.setdefault("request_id", current)
    return fields


def _traceback(formatter: logging.Formatter, record: logging.LogRecord) -> str:
    parts = []
    if record.exc_info:
        parts.append(formatter.formatException(record.exc_info))
    if record.stack_info:
        parts.append(formatter.formatStack(record.stack_info))
    return "\n".join(parts)


def _encode(fields: dict[str, object]) -> str:
    try:
        return msgspec.json.encode(fields, enc_hook=str).decode()
    except (TypeError, ValueError, OverflowError, RecursionError):
        # A field that JSON has no form for, or a lone surrogate: the line is worth more than the field's type.
        texts = {name: str(value).encode("utf-8", "backslashreplace").decode() for name, value in fields.items()}
        return msgspec.json.encode(texts).decode()


def _visible(line: str) -> str:
    """Escape what JSON lets stand but a terminal obeys: DEL, C1 controls, line separators, direction marks."""
    if line.isprintable():
        return line
    return "".join(each if each.isprintable() or each == "\u3000" else dumps(each)[1:-1] for each in line)
