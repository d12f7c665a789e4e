"""The process that runs one strange query on one SQLite file, run by its path: `python -I -S read_only_child.py`.

A model wrote the query, and the file is an operator's. So it runs in a process that may be killed: with bounded memory
and CPU time, nothing to write to, and SQLite told to refuse all but reading. It knows Python's own library only.
Standard input has a job, standard output the answer, both JSON.
"""

from __future__ import annotations

import json
import math
import os
import resource
import signal
import sqlite3
import sys
import time
from collections.abc import Iterator
from typing import Any
from urllib.parse import quote

MEMORY_BYTES = 256 * 1024 * 1024
"""Address space beyond what the process has at its start; sorting and temporary tables are in it too."""
LARGEST_WRITE = 1024 * 1024
"""Of a file: a database in WAL mode has an index of its log that readers write, and nothing else is written."""
MOST_COLUMNS = 100
MOST_TABLES = 200
MOST_CELL_CHARACTERS = 4000
NICENESS = 10

_STEPS = 2000
"""Steps of SQLite's machine between two looks at the clock."""

_LIMITS = {
    sqlite3.SQLITE_LIMIT_LENGTH: 16 * 1024 * 1024,
    sqlite3.SQLITE_LIMIT_SQL_LENGTH: 100_000,
    sqlite3.SQLITE_LIMIT_EXPR_DEPTH: 200,
    sqlite3.SQLITE_LIMIT_COMPOUND_SELECT: 50,
    sqlite3.SQLITE_LIMIT_ATTACHED: 0,
    sqlite3.SQLITE_LIMIT_LIKE_PATTERN_LENGTH: 256,
    sqlite3.SQLITE_LIMIT_WORKER_THREADS: 0,
}

_NAMES = """
-> ->> abs acos asin atan atan2 avg ceil ceiling char coalesce concat concat_ws cos count cume_dist date
datetime degrees dense_rank exp first_value floor glob group_concat hex ifnull iif instr json json_array
json_array_length json_extract json_group_array json_group_object json_object json_type json_valid julianday
lag last_value lead length like ln log log10 log2 lower ltrim max median min mod nth_value ntile nullif
octet_length percent_rank pi pow power quote radians rank replace round row_number rtrim sign sin sqrt
strftime string_agg substr substring sum tan time timediff total trim trunc typeof unicode unixepoch upper
match bm25 snippet highlight
"""
FUNCTIONS = frozenset(_NAMES.split())
"""Functions that a query may use. None of them reads or writes anything but its arguments."""


def main() -> None:
    """Answer the one job."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # only the parent ends this process, however the service is stopped
    job = json.load(sys.stdin)
    _restrict(job["deadline_s"])
    try:
        answer = _answer(job)
    except sqlite3.Error as error:
        answer = {"error": _reason(error)}
    except MemoryError:
        answer = {"error": "the query needs more memory than it may have"}
    except sqlite3.Warning as warning:  # of two statements, in some versions
        answer = {"error": str(warning)}
    json.dump(answer, sys.stdout)


def _restrict(deadline_s: float) -> None:
    """Take from this process, for good, what a query has no use for."""
    os.nice(NICENESS)
    with open("/proc/self/statm") as file:  # noqa: PTH123  (fewer modules to load)
        pages = int(file.read().split()[0])
    for kind, limit in (
        (resource.RLIMIT_AS, pages * resource.getpagesize() + MEMORY_BYTES),
        (resource.RLIMIT_CPU, math.ceil(deadline_s) + 1),
        (resource.RLIMIT_FSIZE, LARGEST_WRITE),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_NPROC, 0),
        (resource.RLIMIT_NOFILE, 16),
    ):
        resource.setrlimit(kind, (limit, limit))


def _answer(job: dict[str, Any]) -> dict[str, Any]:
    connection = sqlite3.connect(f"file:{quote(job['path'])}?mode=ro", uri=True, isolation_level=None, timeout=1.0)
    connection.text_factory = lambda data: data.decode("utf-8", "replace")
    for name, value in _LIMITS.items():
        connection.setlimit(name, value)
    for pragma in ("query_only=ON", "trusted_schema=OFF", "cell_size_check=ON", "temp_store=MEMORY", "mmap_size=0"):
        connection.execute(f"PRAGMA {pragma}")
    until = time.monotonic() + job["deadline_s"]
    connection.set_progress_handler(lambda: time.monotonic() >= until, _STEPS)
    if "sql" not in job:
        return {"schema": list(_schema(connection))}
    connection.set_authorizer(_allowed)
    cursor = connection.execute(job["sql"])
    if cursor.description is None:
        return {"error": "the query is no SELECT"}
    names = [str(each[0])[:200] for each in cursor.description]
    if len(names) > MOST_COLUMNS:
        return {"error": f"the query has {len(names)} columns; {MOST_COLUMNS} are allowed"}
    rows, more = _rows(cursor, job["most_rows"], job["most_bytes"])
    return {"columns": names, "rows": rows, "more": more}


def _allowed(action: int, first: str | None, second: str | None, *_: str | None) -> int:
    """Answer SQLite's question, while it compiles the query, whether the query may do that."""
    if action in (sqlite3.SQLITE_SELECT, sqlite3.SQLITE_RECURSIVE):
        return sqlite3.SQLITE_OK
    if action == sqlite3.SQLITE_READ and not _is_internal(first or ""):
        return sqlite3.SQLITE_OK
    if action == sqlite3.SQLITE_FUNCTION and (second or "").lower() in FUNCTIONS:
        return sqlite3.SQLITE_OK
    return sqlite3.SQLITE_DENY


def _is_internal(table: str) -> bool:
    """Return whether a table is SQLite's own way to its settings, pages or files."""
    return table.lower().startswith(("pragma_", "sqlite_dbpage", "sqlite_stmt", "dbstat", "bytecode", "tables_used"))


def _rows(cursor: sqlite3.Cursor, most_rows: int, most_bytes: int) -> tuple[list[list[Any]], bool]:
    """Return as many rows as may be, and whether there are more."""
    rows: list[list[Any]] = []
    size = 0
    for row in cursor:
        shown = [_shown(each) for each in row]
        size += len(json.dumps(shown))
        if len(rows) == most_rows or size > most_bytes:
            return rows, True
        rows.append(shown)
    return rows, False


def _shown(value: Any) -> Any:
    if isinstance(value, bytes):
        return f"<{len(value)} bytes>"
    if isinstance(value, str) and len(value) > MOST_CELL_CHARACTERS:
        return f"{value[:MOST_CELL_CHARACTERS]}… <{len(value)} characters>"
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value


def _schema(connection: sqlite3.Connection) -> Iterator[tuple[str, list[str]]]:
    """Yield the tables and views, each with its columns and their types."""
    listed = connection.execute(
        "SELECT name FROM sqlite_schema WHERE type IN ('table', 'view') AND name NOT LIKE 'sqlite\\_%' ESCAPE '\\' "
        "ORDER BY name LIMIT ?",
        (MOST_TABLES,),
    ).fetchall()
    for (table,) in listed:
        columns = connection.execute("SELECT name, type FROM pragma_table_info(?)", (table,)).fetchmany(MOST_COLUMNS)
        yield table, [f"{name} {kind}".strip() for name, kind in columns]


def _reason(error: sqlite3.Error) -> str:
    if getattr(error, "sqlite_errorcode", None) == sqlite3.SQLITE_INTERRUPT:
        return "the query took too long"
    return str(error)


if __name__ == "__main__":
    main()
