"""A SQLite database file with one writer.

Every write of this process goes through one thread, in the order of arrival, each in its own `BEGIN IMMEDIATE`
transaction; other processes (the command line beside a running server) are waited for by SQLite's own lock. Readers are
separate connections, taken from a pool for the time of one call, and see one snapshot during that call. WAL with
`synchronous=FULL`: what `write` returned from survives power loss, unless the database is opened as one that need not.
"""

from __future__ import annotations

import asyncio
import fcntl
import os
import queue
import sqlite3
import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar, cast

from appliance.core.errors import ConflictError, StorageError, UnreadableDatabaseError
from appliance.store.migrations import MIGRATIONS, Migration, check_history, migrate

if TYPE_CHECKING:
    from collections.abc import Iterator

T = TypeVar("T")
Connection: TypeAlias = sqlite3.Connection
Row: TypeAlias = sqlite3.Row

BUSY_TIMEOUT_S = 10.0
"""How long a write waits for another process's transaction."""

CLOSE_TIMEOUT_S = 30.0
"""How long `close` waits for accepted writes."""

_WAL_BYTES_KEPT = 16 * 1024 * 1024
"""The log is cut back to this size after a checkpoint, so that one large write does not hold the disk for ever."""


class Database:
    """Owns one database file: opens it, migrates it, and is the only one in the process to write to it.

    Functions handed to `read` and `write` get a connection whose rows answer to column names. They must not keep it,
    nor hand out a cursor: they return data. A constraint that they break becomes a ConflictError, an error of the file
    or disk a StorageError; any other exception is theirs and reaches the caller as it is.
    """

    def __init__(
        self,
        path: Path,
        *,
        read_only: bool = False,
        migrations: Sequence[Migration] = MIGRATIONS,
        durable: bool = True,
        overwrite_deleted: bool = False,
    ) -> None:
        """Open or create the file and bring its schema up to date.

        A new file is readable by its owner only, and so is a new folder: they hold the hashes of API keys.

        Args:
            path: The file; SQLite keeps `-wal` and `-shm` beside it.
            read_only: Only look: make nothing, migrate nothing, refuse to write.
            migrations: The history of its schema, oldest first.
            durable: False lets the last writes be lost with the power, which spares an fsync each; the file stays
                sound, and what a killed process had written is there.
            overwrite_deleted: Fill what is deleted with zeros; until `erase_log` the log may still have it.

        Raises:
            UnreadableDatabaseError: The file is damaged, or was written by a newer version.
            StorageError: It cannot be opened.
        """
        self.path = path
        self._read_only = read_only
        if not read_only:
            _create(path)
        with _storage_errors(path):
            connection = _connect(path, read_only=read_only, durable=durable)
            try:
                if overwrite_deleted:
                    connection.execute("PRAGMA secure_delete=ON").fetchall()
                (check_history if read_only else migrate)(connection, migrations)
            except BaseException:
                connection.close()
                raise
        self._idle_readers: deque[Connection] = deque()
        self._kept: dict[tuple[int, Callable[[Connection], Any]], tuple[int, Any]] = {}
        self._inbox: queue.SimpleQueue[tuple[Callable[[Connection], Any], Future[Any]] | None] = queue.SimpleQueue()
        self._closed = False
        self._closing = threading.Lock()
        self._writer = threading.Thread(
            target=self._run_writer, args=(connection,), name=f"writer {path.name}", daemon=True
        )
        self._writer.start()

    def read(self, function: Callable[[Connection], T]) -> T:
        """Return `function(connection)` on a read-only connection. Takes microseconds; safe on the loop."""
        with _storage_errors(self.path):
            connection = self._take_reader()
            try:
                connection.execute("BEGIN")
                return function(connection)
            finally:
                self._give_back(connection)

    def read_kept(self, function: Callable[[Connection], T]) -> T:
        """As `read`, but keep what the function returned until something is committed, by whatever process.

        Args:
            function: Depends on nothing but the database, and nobody changes what it returns.
        """
        with _storage_errors(self.path):
            connection = self._take_reader()
            try:
                key = id(connection), function  # each connection counts for itself what others have committed
                kept = self._kept.get(key)
                if kept is None or kept[0] != _commits(connection):
                    connection.execute("BEGIN")
                    kept = self._kept[key] = _commits(connection), function(connection)
                return cast("T", kept[1])
            finally:
                self._give_back(connection)

    def write_blocking(self, function: Callable[[Connection], T]) -> T:
        """Run `function(connection)` in a transaction on the writer thread and wait for the commit.

        An exception rolls back and is raised here.
        """
        if threading.current_thread() is self._writer:
            raise RuntimeError("A write waits for another write of the same database; use the connection at hand.")
        return self.submit(function).result()

    async def write(self, function: Callable[[Connection], T]) -> T:
        """As `write_blocking`, without holding up the event loop.

        When the waiting task is cancelled, a write that has not begun is dropped; one that has is finished.
        """
        return await asyncio.wrap_future(self.submit(function))

    def submit(self, function: Callable[[Connection], T]) -> Future[T]:
        """Queue a write and return at once; the future has the result once it is on the disk.

        Raises:
            StorageError: The database is closed.
        """
        future: Future[T] = Future()
        if self._read_only:
            raise StorageError(f"The database {self.path} was opened to look at only; nothing was changed.")
        with self._closing:  # else a write could be queued behind the writer's end and never be answered
            self._refuse_when_closed()
            self._inbox.put((function, future))
        return future

    async def erase_log(self) -> None:
        """Empty the write-ahead log, so that what was deleted and overwritten is in no file any more.

        Raises:
            StorageError: A reader or another process still needs the log.
        """
        if await self.write(_empty_log):
            raise StorageError(
                f"The log of {self.path} is in use; what was deleted may still be in it.", advice="Try again."
            )

    def close(self) -> None:
        """Commit what was accepted, then close every connection. Idempotent.

        Raises:
            StorageError: A write has been running for `CLOSE_TIMEOUT_S`; it will be rolled back when the process ends.
        """
        with self._closing:
            if not self._closed:
                self._closed = True
                self._inbox.put(None)
        self._writer.join(CLOSE_TIMEOUT_S)
        self._close_idle_readers()
        if self._writer.is_alive():
            raise StorageError(
                f"The database {self.path} is still writing {CLOSE_TIMEOUT_S:.0f} s after it was told to close.",
                advice="The disk may hang: look at `dmesg`. Unfinished writes are rolled back at the next start.",
            )

    def _refuse_when_closed(self) -> None:
        if self._closed:
            raise StorageError(f"The database {self.path} is closed.", advice="The program is shutting down.")

    def _take_reader(self) -> Connection:
        self._refuse_when_closed()
        try:
            return self._idle_readers.pop()
        except IndexError:
            return _connect(self.path, read_only=self._read_only, query_only=True)

    def _give_back(self, connection: Connection) -> None:
        if connection.in_transaction:
            connection.execute("ROLLBACK")
        self._idle_readers.append(connection)
        if self._closed:  # it was closed during this read
            self._close_idle_readers()

    def _close_idle_readers(self) -> None:
        while self._idle_readers:
            try:
                self._idle_readers.pop().close()
            except IndexError:  # another thread that ends a read during `close` was quicker
                return

    def _run_writer(self, connection: Connection) -> None:
        while (task := self._inbox.get()) is not None:
            self._run(connection, *task)
            del task  # or the last write's result would live until the next one
        connection.close()

    def _run(self, connection: Connection, function: Callable[[Connection], Any], future: Future[Any]) -> None:
        if not future.set_running_or_notify_cancel():
            return
        try:
            with _storage_errors(self.path):
                result = _in_transaction(connection, function)
        except BaseException as error:  # noqa: BLE001  (it belongs to the caller, whatever it is)
            future.set_exception(error)
        else:
            future.set_result(result)


def _create(path: Path) -> None:
    """Make the folder (0700) and an empty database (0600) if need be; SQLite gives its log the file's mode and owner.

    Processes that start at once take turns: SQLite's switch to WAL fails at once when another is at it.
    """
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        if path.exists() and path.stat().st_size > 0:
            return
        folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            fcntl.flock(folder, fcntl.LOCK_EX)
            _touch_private(path)
            with _storage_errors(path):
                _connect(path).close()
            os.fsync(folder)
        finally:
            os.close(folder)
    except OSError as error:
        raise StorageError(
            f"The database {path} cannot be created: {error.strerror}.",
            advice="Name a data folder that this user may write to with --data.",
        ) from error


def _touch_private(path: Path) -> None:
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    except FileExistsError:
        return
    try:
        folder = path.parent.stat()
        if os.geteuid() == 0 and folder.st_uid != 0:
            os.fchown(descriptor, folder.st_uid, folder.st_gid)  # or the service could not open it after `sudo`
    finally:
        os.close(descriptor)


def _connect(path: Path, *, read_only: bool = False, query_only: bool = False, durable: bool = True) -> Connection:
    """Open a connection: `read_only` needs no right to write to the file, `query_only` makes no use of it."""
    connection = sqlite3.connect(
        f"{path.absolute().as_uri()}?mode={'ro' if read_only else 'rwc'}",
        uri=True,
        timeout=BUSY_TIMEOUT_S,
        isolation_level=None,
        check_same_thread=False,
    )
    try:
        connection.row_factory = sqlite3.Row
        if not read_only:
            connection.execute("PRAGMA journal_mode=WAL")
            connection.execute(f"PRAGMA synchronous={'FULL' if durable else 'NORMAL'}")
            connection.execute(f"PRAGMA journal_size_limit={_WAL_BYTES_KEPT}")
        connection.execute("PRAGMA foreign_keys=ON")
        connection.execute("PRAGMA trusted_schema=OFF")
        if query_only:
            connection.execute("PRAGMA query_only=ON")
    except BaseException:
        connection.close()
        raise
    return connection


def _commits(connection: Connection) -> int:
    """Return a number that differs from the last one if another connection has committed something meanwhile."""
    return int(connection.execute("PRAGMA data_version").fetchone()[0])


def _empty_log(connection: Connection) -> bool:
    """Return True if somebody still needs the log. Ends the transaction: a log is emptied outside of one."""
    connection.execute("COMMIT")
    busy = connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()[0]
    connection.execute("BEGIN")
    return bool(busy)


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
    """Turn SQLite's errors into ours; its ProgrammingError and InterfaceError are bugs of ours and pass as they are."""
    try:
        yield
    except (sqlite3.ProgrammingError, sqlite3.InterfaceError):
        raise
    except sqlite3.IntegrityError as error:
        raise ConflictError(
            f"The database {path} refused the change and kept what it had: {error}.",
            advice="Someone else may have made the same change meanwhile: look, then try again.",
        ) from error
    except sqlite3.Error as error:
        kind = UnreadableDatabaseError if _primary_code(error) in _DAMAGE else StorageError
        advice = _ADVICE.get(_primary_code(error), "`appliance doctor` looks at the disk, the rights and the file.")
        raise kind(f"The database {path} failed: {error}.", advice=advice) from error


def _primary_code(error: sqlite3.Error) -> int:
    return (getattr(error, "sqlite_errorcode", None) or sqlite3.SQLITE_ERROR) & 0xFF


_DAMAGE = (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB)

_ADVICE = {
    sqlite3.SQLITE_FULL: "The disk is full: free some space, then try again. Nothing was changed.",
    sqlite3.SQLITE_BUSY: f"Another process has held it for {BUSY_TIMEOUT_S:.0f} s: see which with `fuser`, try again.",
    sqlite3.SQLITE_READONLY: "The file or its folder is read-only for this user: correct the owner, or remount.",
    sqlite3.SQLITE_CANTOPEN: "The file or its folder is not open to this user: correct the owner and the rights.",
    sqlite3.SQLITE_IOERR: "The disk reports errors: look at `dmesg`, and back up what can be read.",
    sqlite3.SQLITE_CORRUPT: "The file is damaged: stop the appliance, keep a copy, restore it from a backup.",
    sqlite3.SQLITE_NOTADB: "The file is no database or is damaged: keep a copy, restore it from a backup.",
}
