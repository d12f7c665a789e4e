"""How the worker's thread reaches the event loop."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


def post(loop: asyncio.AbstractEventLoop, function: Callable[[T], object], argument: T) -> None:
    """Call a function on the loop from the worker's thread; a loop that has closed needs no answer any more."""
    with contextlib.suppress(RuntimeError):
        loop.call_soon_threadsafe(function, argument)
