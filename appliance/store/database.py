"""A SQLite database file with one writer.

Every write of this process goes through one thread, in the order of arrival, each in its own `BEGIN IMMEDIATE`
transaction; other processes (the command line beside a running server) are waited for by SQLite's own lock. Readers are
separate connections, one a thread, and see a snapshot. WAL with `synchronous=FULL`: what `write` returned from
survives power loss.
"""

from __future__ import annotations

import asyncio
import queue
import sqlite3
import threading
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias, TypeVar

from appliance.core.errors import ApplianceError, StorageError
from appliance.store.migrations import migrate

if TYPE_CHECKING:
    from collections.abc import Iterator

T = TypeVar("T")
Connection: TypeAlias = sqlite3.Connection
Row: TypeAlias = sqlite3.Row

BUSY_TIMEOUT_S = 10.0
"""How long a write waits for another process's transaction."""


class Database:
    """Owns one database file: opens it, migrates it, and is the only one in the process to write to it.

    Functions handed to `read` and `write` get a connection whose rows answer to column names. They must not keep it.
    """

    def __init__(self, path: Path) -> None:
        """Open or create the file and bring its schema up to date.

        Raises:
            StorageError: The file cannot be opened, is damaged, or was written by a newer version.
        """
        self.path = path
        with _storage_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            connection = _connect(path)
            try:
                migrate(connection)
            finally:
                connection.close()
        self._readers = threading.local()
        self._open_readers: list[Connection] = []
        self._readers_lock = threading.Lock()
        self._inbox: queue.SimpleQueue[tuple[Callable[[Connection], object], Future[object]] | None] = (
            queue.SimpleQueue()
        )
        self._closed = False
        self._writer = threading.Thread(target=self._run_writer, name=f"writer {path.name}", daemon=True)
        self._writer.start()

    def read(self, function: Callable[[Connection], T]) -> T:
        """Return `function(connection)` on this thread's reader connection. Takes microseconds; safe on the loop."""
        with _storage_errors(self.path):
            return function(self._reader())

    def write_blocking(self, function: Callable[[Connection], T]) -> T:
        """Run `function(connection)` in a transaction on the writer thread and wait for the commit.

        An exception rolls back and is raised here.
        """
        return self._submit(function).result()

    async def write(self, function: Callable[[Connection], T]) -> T:
        """As `write_blocking`, without holding up the event loop."""
        return await asyncio.wrap_future(self._submit(function))

    def close(self) -> None:
        """Commit what was accepted, then close every connection. Idempotent."""
        if self._closed:
            return
        self._closed = True
        self._inbox.put(None)
        self._writer.join()
        with self._readers_lock:
            for connection in self._open_readers:
                connection.close()
            self._open_readers.clear()

    def _submit(self, function: Callable[[Connection], T]) -> Future[T]:
        if self._closed:
            raise StorageError(f"The database {self.path} is closed.", advice="The program is shutting down.")
        future: Future[T] = Future()
        self._inbox.put((function, future))  # type: ignore[arg-type]
        return future

    def _reader(self) -> Connection:
        connection: Connection | None = getattr(self._readers, "connection", None)
        if connection is None:
            connection = _connect(self.path)
            connection.execute("PRAGMA query_only=ON")
            self._readers.connection = connection
            with self._readers_lock:
                self._open_readers.append(connection)
        return connection

    def _run_writer(self) -> None:
        connection = _connect(self.path)
        while (task := self._inbox.get()) is not None:
            function, future = task
            if not future.set_running_or_notify_cancel():
                continue
            try:
                with _storage_errors(self.path):
                    future.set_result(_in_transaction(connection, function))
            except BaseException as error:  # noqa: BLE001  (it belongs to the caller, whatever it is)
                future.set_exception(error)
        connection.close()


def _connect(path: Path) -> Connection:
    connection = sqlite3.connect(path, timeout=BUSY_TIMEOUT_S, isolation_level=None, check_same_thread=False)
    connection.row_factory = sqlite3.Row
    connection.execute("PRAGMA journal_mode=WAL")
    connection.execute("PRAGMA synchronous=FULL")
    connection.execute("PRAGMA foreign_keys=ON")
    connection.execute("PRAGMA trusted_schema=OFF")
    return connection


def _in_transaction(connection: Connection, function: Callable[[Connection], T]) -> T:
    connection.execute("BEGIN IMMEDIATE")
    try:
        result = function(connection)
        connection.execute("COMMIT")
    except BaseException:
        if connection.in_transaction:
            connection.execute("ROLLBACK")
        raise
    return result


@contextmanager
def _storage_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except ApplianceError:
        raise
    except sqlite3.IntegrityError:
        raise  # a room that can break a constraint turns it into its own error inside its function
    except (sqlite3.Error, OSError) as error:
        raise StorageError(
            f"The database {path} failed: {error}.",
            advice="Check that the disk has space and that the folder belongs to this user; `appliance doctor` looks.",
        ) from error
