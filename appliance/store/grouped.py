"""Many small writes in one transaction: who waits for the disk waits together.

The first write goes at once. Those that come while it is on its way to the disk go together in the next transaction,
and so on, in the order of arrival; thousands of small writes a second cost a few dozen commits. Each write still stands
or falls by itself: one that raises is undone, its neighbours are not.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from typing import Any, TypeAlias, TypeVar

from appliance.store.database import Connection, Database

T = TypeVar("T")
_Waiting: TypeAlias = "tuple[Callable[[Connection], Any], asyncio.Future[Any]]"

MOST_TOGETHER = 500
"""Writes of one transaction; other writers of the database wait no longer than these take."""


class GroupedWrites:
    """Writes to one database from one event loop."""

    def __init__(self, database: Database) -> None:
        """Write to a database that the caller opens and closes."""
        self._database = database
        self._waiting: deque[_Waiting] = deque()
        self._writing = False

    @property
    def waiting(self) -> int:
        """Return how many writes wait for their transaction."""
        return len(self._waiting)

    async def write(self, function: Callable[[Connection], T]) -> T:
        """Return `function(connection)` once it is on the disk, as `Database.write` does.

        The function's place in the order is taken before this first waits.

        Raises:
            StorageError: The transaction failed; none of its writes was kept.
        """
        future: asyncio.Future[T] = asyncio.get_running_loop().create_future()
        self._waiting.append((function, future))
        if not self._writing:
            self._write_next()
        return await future

    def _write_next(self) -> None:
        together: list[_Waiting] = []
        while self._waiting and len(together) < MOST_TOGETHER:
            function, future = self._waiting.popleft()
            if not future.cancelled():
                together.append((function, future))
        self._writing = bool(together)
        if not together:
            return
        functions = [function for function, _ in together]
        try:
            written = asyncio.wrap_future(self._database.submit(lambda connection: _run_all(connection, functions)))
        except Exception as error:  # noqa: BLE001  (it belongs to those who wait)
            self._writing = False
            _fail(together, error)
            return
        written.add_done_callback(lambda done: self._written(together, done))

    def _written(self, together: list[_Waiting], done: asyncio.Future[list[tuple[Any, Exception | None]]]) -> None:
        error = None if done.cancelled() else done.exception()
        if done.cancelled():
            _fail(together, asyncio.CancelledError())
        elif error is not None:
            _fail(together, error)
        else:
            for (_, future), (result, refusal) in zip(together, done.result(), strict=True):
                if future.done():
                    continue
                if refusal is None:
                    future.set_result(result)
                else:
                    future.set_exception(refusal)
        self._write_next()


def _run_all(
    connection: Connection, functions: list[Callable[[Connection], Any]]
) -> list[tuple[Any, Exception | None]]:
    return [_run_one(connection, each) for each in functions]


def _run_one(connection: Connection, function: Callable[[Connection], Any]) -> tuple[Any, Exception | None]:
    connection.execute("SAVEPOINT one")
    try:
        result = function(connection)
    except Exception as error:
        if not connection.in_transaction:
            raise  # SQLite gave up the transaction, and with it every write in it
        connection.execute("ROLLBACK TO one")
        connection.execute("RELEASE one")
        return None, error
    connection.execute("RELEASE one")
    return result, None


def _fail(together: list[_Waiting], error: BaseException) -> None:
    for _, future in together:
        if not future.done():
            if isinstance(error, asyncio.CancelledError):
                future.cancel()
            else:
                future.set_exception(error)
