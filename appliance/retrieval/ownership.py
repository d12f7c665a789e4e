"""Whose a data folder's files and vector stores are: one process at a time has the database, the indexes and the files.

    the owner       opens all of it; takes in, erases and sweeps
    anybody else    opens none of it; each of its doors says who has it, until it is started anew

It is one lock for all of it: two processes that erased, swept or checked an index against the database at once would
undo each other's work.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import NoReturn, cast

from appliance.core.errors import StorageError, UnavailableError
from appliance.core.retrieval import Files, VectorStores
from appliance.store.locks import Hold, holders, lock

_WAIT_S = 0.5
"""For a process that is just ending."""


def own(path: Path) -> Hold:
    """Take what the lock file stands for; the kernel gives it back when this process ends.

    Raises:
        UnavailableError: Another process has it; code `retrieval_in_use`.
        StorageError: The file cannot be made or opened.
    """
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        return Hold([lock(path, os.O_RDWR | os.O_CREAT, exclusive=True, wait_s=_WAIT_S)])
    except BlockingIOError as error:
        owner = ", ".join(f"process {each}" for each in holders(path)) or "another process"
        raise _in_use(owner) from error
    except OSError as error:
        raise StorageError(f"{path} cannot be opened: {error.strerror}.", advice="Check its owner.") from error


def _in_use(owner: str) -> UnavailableError:
    return UnavailableError(
        f"The files and vector stores of this data folder are in use by {owner}.",
        advice="Ask that server. Or stop it, then start this one again. Or give each a folder of its own with --data.",
        code="retrieval_in_use",
    )


class DocumentsElsewhere:
    """Stands where `Documents` stands in their owner: whatever is asked of files and stores is refused.

    Attributes:
        files: Refuses.
        stores: Refuses.
    """

    def __init__(self, error: UnavailableError) -> None:
        """Refuse with what `own` raised."""
        refusal = _Refusal(error.message, error.advice)
        self.files = cast("Files", refusal)
        self.stores = cast("VectorStores", refusal)

    async def run(self) -> None:
        """Do nothing: the owner does it."""


class _Refusal:
    """Has every method that there is, and each is refused before it begins."""

    def __init__(self, message: str, advice: str) -> None:
        self._said = (message, advice)

    def __getattr__(self, name: str) -> NoReturn:
        message, advice = self._said
        raise UnavailableError(message, advice=advice, code="retrieval_in_use")
