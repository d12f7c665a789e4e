"""Work that ends when its client leaves."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable
from contextlib import asynccontextmanager
from typing import TypeVar

from starlette.types import Receive

from appliance.core.errors import DeadlineExceededError

T = TypeVar("T")


class ClientGoneError(Exception):
    """The client closed its connection; nobody waits for the answer. Never leaves the door."""


@asynccontextmanager
async def task_group() -> AsyncIterator[asyncio.TaskGroup]:
    """Open a TaskGroup whose first error is raised as itself, so that callers can catch it by its class.

    The others, if any, are in its context.
    """
    try:
        async with asyncio.TaskGroup() as group:
            yield group
    except BaseExceptionGroup as errors:
        raise errors.exceptions[0]  # noqa: B904  (the group is the context, and that is meant)


async def until_disconnected(receive: Receive, work: Awaitable[T], *, limit_s: float | None = None) -> T:
    """Return what the work returns; cancel it when the client leaves or the time is over.

    Args:
        receive: The request's, whose body has been read.
        work: What to wait for.
        limit_s: Longest time to wait; None where the work has its own limit.

    Raises:
        ClientGoneError: The client left; the work was cancelled and has ended.
        DeadlineExceededError: The time was over; the work was cancelled and has ended.
    """
    results: list[T] = []

    async def run() -> None:
        try:
            results.append(await work)
        finally:
            watcher.cancel()

    try:
        async with asyncio.timeout(limit_s) as limit, task_group() as group:
            # In a task of its own the work wakes up cheaply: not through all the layers of the application. It comes
            # first, so that it has begun, and cleans up, even if the client has left already.
            group.create_task(run(), name="work for a client")
            watcher = group.create_task(_raise_on_disconnect(receive), name="disconnect watcher")
    except ClientGoneError:
        if not results:
            raise
    except TimeoutError as error:
        if not limit.expired():
            raise
        if not results:
            raise DeadlineExceededError(
                f"The request was not accepted within {limit_s:g} s.",
                advice="Try again, or raise `timeout_s` and `request_timeout_s`.",
            ) from error
    if not results:
        raise asyncio.CancelledError  # from within the work, which a TaskGroup passes over
    # Where both happened at once, the result may own something, so it goes to the caller, who will notice soon enough.
    return results[0]


async def _raise_on_disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass  # trailing empty parts of the body
    raise ClientGoneError
