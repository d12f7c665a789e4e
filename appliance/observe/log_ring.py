"""The last log lines of this process, for whoever looks after the box from afar.

They leave the box, so they hold less than the log: a message of another library, whose words nobody here has weighed,
is left out, and of an error only its kind and where it was raised, for its text may quote what a client sent. Nothing
below `info` is kept, whatever is logged.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from traceback import extract_tb

import msgspec

from appliance.core.printable import printable

MOST_LINES = 1000
MOST_CHARACTERS = 1000
MOST_FRAMES = 8
OUR_LOGGERS = "appliance"
_PACKAGE = Path(__file__).parents[1]


class LogRing(logging.Handler):
    """A log handler that keeps the last lines as JSON, the oldest giving way."""

    def __init__(self, lines: int = MOST_LINES) -> None:
        """Keep at most so many lines."""
        super().__init__(logging.INFO)
        self._lines: deque[tuple[int, str]] = deque(maxlen=lines)

    def emit(self, record: logging.LogRecord) -> None:
        """Keep a record; like any handler it never raises into whoever logs."""
        try:
            self._lines.append((record.levelno, _line(record)))
        except Exception:  # noqa: BLE001  (the logging module's own way: report it on stderr, and go on)
            self.handleError(record)

    def tail(self, lines: int, *, least: int = logging.INFO) -> list[str]:
        """Return the newest lines of at least a severity, oldest first."""
        found = [line for level, line in tuple(self._lines) if level >= least]
        return found[-lines:] if lines > 0 else []


@contextmanager
def last_lines() -> Iterator[LogRing]:
    """Keep what is logged from now on until the end of the block."""
    ring = LogRing()
    root = logging.getLogger()
    root.addHandler(ring)
    try:
        yield ring
    finally:
        root.removeHandler(ring)


def _line(record: logging.LogRecord) -> str:
    ours = record.name == OUR_LOGGERS or record.name.startswith(f"{OUR_LOGGERS}.")
    fields = {
        "timestamp": datetime.fromtimestamp(record.created, tz=UTC).isoformat(timespec="milliseconds"),
        "level": record.levelname.lower(),
        "logger": record.name,
        "message": printable(record.getMessage())[:MOST_CHARACTERS] if ours else "(on the box only)",
    }
    if record.exc_info and record.exc_info[1] is not None:
        fields["exception"] = _where(record.exc_info[1])
    return msgspec.json.encode(fields).decode()


def _where(error: BaseException) -> str:
    """Return an error's kind and the frames that led to it, innermost last, without what it says."""
    frames = [f"{_short(each.filename)}:{each.lineno}" for each in extract_tb(error.__traceback__)[-MOST_FRAMES:]]
    return f"{type(error).__name__} at {' > '.join(frames)}"


def _short(path: str) -> str:
    file = Path(path)
    return str(file.relative_to(_PACKAGE)) if file.is_relative_to(_PACKAGE) else file.name
