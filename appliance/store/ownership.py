"""Whose a part of a data folder is: one process at a time has its database and all that is derived from it.

    the owner       opens all of it, and tidies it in the background
    anybody else    opens none of it; each of its doors says who has it, until it is started anew

It is one lock for all of a part: two processes that erased, swept or took up what was left at once would undo, or do
twice, each other's work.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from appliance.core.errors import StorageError, UnavailableError
from appliance.store.locks import Hold, holders, lock

_WAIT_S = 0.5
"""For a process that is just ending."""


ADVICE = "Ask that server. Or stop it, then start this one again. Or give each a folder of its own with --data."
"""For the errors that say whose something is."""


def own(path: Path, in_use: Callable[[str], UnavailableError]) -> Hold:
    """Take what the lock file stands for; the kernel gives it back when this process ends.

    Args:
        path: The lock file.
        in_use: Makes the error that names the owner.

    Raises:
        UnavailableError: Another process has it.
        StorageError: The file cannot be made or opened.
    """
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        return Hold([lock(path, os.O_RDWR | os.O_CREAT, exclusive=True, wait_s=_WAIT_S)])
    except BlockingIOError as error:
        owner = ", ".join(f"process {each}" for each in holders(path)) or "another process"
        raise in_use(owner) from error
    except OSError as error:
        raise StorageError(f"{path} cannot be opened: {error.strerror}.", advice="Check its owner.") from error


def is_owned(path: Path) -> bool:
    """Tell whether a process has what the lock file stands for.

    Raises:
        StorageError: The file cannot be opened.
    """
    try:
        os.close(lock(path, os.O_RDWR, exclusive=True))
    except FileNotFoundError:
        return False
    except BlockingIOError:
        return True
    except OSError as error:
        raise StorageError(f"{path} cannot be opened: {error.strerror}.", advice="Check its owner.") from error
    return False


class Elsewhere:
    """Stands where the owner has an object: it has every method that there is, and each is refused before it begins.

    What works in the background has nothing to do here.
    """

    def __init__(self, error: UnavailableError) -> None:
        """Refuse with what `own` raised."""
        self._error = (error.message, error.advice, error.code)

    async def run(self) -> None:
        """Do nothing: the owner does it."""

    def drain(self) -> None:
        """Do nothing: nothing was begun."""

    def __getattr__(self, name: str) -> NoReturn:
        message, advice, code = self._error
        raise UnavailableError(message, advice=advice, code=code)
