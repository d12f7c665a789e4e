"""`appliance serve` with a built-in tool `note`, which ends by SIGKILL at the point that KILL names.

KILL is `METHOD:N:before` or `METHOD:N:after`: the Nth call, from 0, of a method of the ledger of responses that begins
in this process, or of the tool. The tool's work is a line in the file NOTES. Nothing in the product can be asked to
die, so the fault is planted from outside, into the real process.
"""

from __future__ import annotations

import os
import signal
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from appliance import compose
from appliance.__main__ import main
from appliance.agents.registry import ToolRegistry
from appliance.core.tools import BuiltInTool, Tool, ToolResult
from appliance.sessions.responses import StoredResponses

METHODS = ("begin", "add_step", "add_events", "end")
counts: Counter[str] = Counter()
mine: set[str] = set()


def maybe_die(method: str, when: str) -> None:
    if os.environ.get("KILL") == f"{method}:{counts[method]}:{when}":
        os.kill(os.getpid(), signal.SIGKILL)


def plant(method: str) -> None:
    original = getattr(StoredResponses, method)

    async def planted(self: StoredResponses, response: Any, *rest: Any, **named: Any) -> Any:
        name = response if isinstance(response, str) else response.id
        if method == "begin":
            mine.update((name, response.request["request_id"]))
        if name not in mine:
            return await original(self, response, *rest, **named)
        maybe_die(method, "before")
        done = await original(self, response, *rest, **named)
        maybe_die(method, "after")
        counts[method] += 1
        return done

    setattr(StoredResponses, method, planted)


def write_note(text: str) -> None:
    with Path(os.environ["NOTES"]).open("a") as file:
        file.write(f"{text}\n")
        file.flush()
        os.fsync(file.fileno())


class Note:
    """Writes a line, or asks a person before it does."""

    label = "notes"

    def __init__(self, guarded: bool) -> None:
        self.guarded = guarded

    @property
    def tools(self) -> Sequence[Tool]:
        return [Tool("note", "Write a note.", {"type": "object", "properties": {}, "additionalProperties": False})]

    def needs_approval(self, name: str) -> bool:
        return self.guarded

    async def call(
        self, name: str, arguments: Mapping[str, Any], *, tenant: str, deadline_s: float, request_id: str
    ) -> ToolResult:
        if request_id in mine:
            maybe_die("tool", "before")
        write_note(request_id)
        if request_id in mine:
            maybe_die("tool", "after")
        return ToolResult("ok", "noted")


async def note(definition: Mapping[str, Any], *, tenant: str, request_id: str) -> BuiltInTool:
    return Note(bool(definition.get("guarded")))


if __name__ == "__main__":
    import sys

    for each in METHODS:
        plant(each)
    vars(compose)["open_tools"] = lambda _settings, _stores: ToolRegistry({"note": note})
    sys.argv.insert(1, "serve")
    main()
