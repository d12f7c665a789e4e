"""SQLite files of others, read and never written: one query a process, which is killed when its time is over.

A thread would not do. SQLite looks at its clock between two steps only, and one step can take for ever: a pattern that
backtracks, a text that is doubled. See `read_only_child` for what the process may do.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from appliance.core.errors import DeadlineExceededError, InvalidRequestError, StorageError, UnavailableError

CHILD = Path(__file__).with_name("read_only_child.py")
GRACE_S = 1.0
"""Time beyond the deadline in which the process may say by itself that it was too slow."""
MOST_AT_ONCE = 2
LARGEST_SCHEMA = 4 * 1024 * 1024

_SLACK_BYTES = 64 * 1024
"""What an answer has beside its rows: the names of columns."""


@dataclass(frozen=True, slots=True)
class Table:
    """A table or view; `columns` have their declared types behind their names."""

    name: str
    columns: Sequence[str]


@dataclass(frozen=True, slots=True)
class Rows:
    """What a query found; `more` says whether rows were left out."""

    columns: Sequence[str]
    rows: Sequence[Sequence[Any]]
    more: bool


class _Answer(msgspec.Struct, frozen=True):
    error: str = ""
    columns: list[str] = []
    rows: list[list[str | int | float | None]] = []
    more: bool = False
    schema: list[tuple[str, list[str]]] = []


class ReadOnlyFiles:
    """Runs queries on SQLite files."""

    def __init__(self) -> None:
        self._slots = asyncio.Semaphore(MOST_AT_ONCE)

    async def schema(self, path: Path, *, deadline_s: float) -> Sequence[Table]:
        """Return the tables and views of a file.

        Raises:
            StorageError: It cannot be read.
            DeadlineExceededError: It took too long.
            UnavailableError: No process can be started.
        """
        try:
            answer = await self._ask({"path": str(path), "deadline_s": deadline_s}, LARGEST_SCHEMA)
        except InvalidRequestError as error:
            raise StorageError(
                f"The database {path.name} cannot be read: {error.message}", advice="Look at `sql_databases`."
            ) from error
        return [Table(name, columns) for name, columns in answer.schema]

    async def query(self, path: Path, sql: str, *, most_rows: int, most_bytes: int, deadline_s: float) -> Rows:
        """Return what one SELECT finds.

        Args:
            path: Of the file.
            sql: The query, from anybody.
            most_rows: Further rows are left out.
            most_bytes: Of the rows as JSON; so are rows behind that.
            deadline_s: Seconds until the query is stopped.

        Raises:
            InvalidRequestError: It is no single SELECT, wants what is not allowed, or SQLite refuses it.
            DeadlineExceededError: It took too long.
            UnavailableError: No process can be started.
        """
        job = {
            "path": str(path),
            "sql": sql,
            "most_rows": most_rows,
            "most_bytes": most_bytes,
            "deadline_s": deadline_s,
        }
        answer = await self._ask(job, most_bytes + _SLACK_BYTES)
        return Rows(answer.columns, answer.rows, answer.more)

    async def _ask(self, job: dict[str, Any], most_bytes: int) -> _Answer:
        deadline_s: float = job["deadline_s"]
        try:
            async with asyncio.timeout(deadline_s + GRACE_S), self._slots:
                said = await _say(msgspec.json.encode(job), most_bytes)
        except TimeoutError as error:
            raise _too_slow(deadline_s) from error
        try:
            answer = msgspec.json.decode(said, type=_Answer)
        except msgspec.MsgspecError as error:
            raise InvalidRequestError("The query ended its process: it needs too much memory or time.") from error
        if answer.error == "the query took too long":
            raise _too_slow(deadline_s)
        if answer.error:
            raise InvalidRequestError(f"SQLite refuses it: {answer.error[:500]}.")
        return answer


def _too_slow(deadline_s: float) -> DeadlineExceededError:
    return DeadlineExceededError(f"The query took longer than {deadline_s:g} s.", advice="Ask for less.")


async def _say(job: bytes, most_bytes: int) -> bytes:
    """Run the process, and return what it says; it is gone when this returns."""
    try:
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-I",
            "-S",
            str(CHILD),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.DEVNULL,
            env={name: os.environ[name] for name in ("LD_LIBRARY_PATH",) if name in os.environ},
            start_new_session=True,  # Ctrl-C in a terminal is for the server alone
        )
    except OSError as error:
        raise UnavailableError(
            f"No process for a query could be started: {error.strerror}.",
            advice="The machine may be out of memory or processes; `appliance doctor` looks.",
        ) from error
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            process.stdin.write(job)
            await process.stdin.drain()
            process.stdin.write_eof()
        said = b""
        while len(said) <= most_bytes and (part := await process.stdout.read(65536)):
            said += part
        return said[: most_bytes + 1]
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.wait()
