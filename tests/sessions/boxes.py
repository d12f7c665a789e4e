"""A room of sessions on a folder, with a clock in the test's hands."""

from __future__ import annotations

from collections.abc import AsyncIterator, Collection, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from appliance.core.sessions import Item, StoredResponse
from appliance.core.settings import Settings
from appliance.sessions.erasure import Forget
from appliance.sessions.room import Sessions, open_sessions

START = 1_800_000_000
DAY_S = 86_400


@dataclass(slots=True)
class HandClock:
    """Time goes on when the test says so."""

    now: float = START

    def monotonic(self) -> float:
        return self.now

    def unix(self) -> float:
        return self.now


async def nothing_to_forget(sessions: Collection[str]) -> None:
    """Stand for models that keep nothing."""


@asynccontextmanager
async def room(
    folder: Path, clock: HandClock | None = None, forget: Forget | None = None, **changes: Any
) -> AsyncIterator[Sessions]:
    """Open the room, without models that had anything to forget unless they are given."""
    settings = replace(Settings(), **{"data_dir": folder, **changes})
    async with open_sessions(settings, clock or HandClock(), forget=forget or nothing_to_forget) as each:
        assert isinstance(each, Sessions), "nobody else has the folder"
        yield each


def said(text: str, name: str | None = None, role: str = "user") -> dict[str, Any]:
    """Return a message, with an id if one is given."""
    kind = "output_text" if role == "assistant" else "input_text"
    item = {"type": "message", "role": role, "content": [{"type": kind, "text": text}]}
    return item if name is None else {"id": name, **item}


def texts(items: Iterable[Item]) -> list[str]:
    """Return what messages say."""
    return [each["content"][0]["text"] for each in items]


def response(name: str = "resp_1", *, tenant: str = "a", **fields: Any) -> StoredResponse:
    """Return a response that is to begin."""
    values: dict[str, Any] = {"created": START, "status": "in_progress", "request": {}, "body": {}, "input": []}
    return StoredResponse(**{"id": name, "tenant": tenant, **values, **fields})


def files_with(folder: Path, *words: str) -> list[tuple[str, str]]:
    """Return the files in which a word stands, in UTF-8."""
    return [
        (path.name, word)
        for path in sorted(folder.rglob("*"))
        if path.is_file()
        for word in words
        if word.encode() in path.read_bytes()
    ]
