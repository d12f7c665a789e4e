"""`appliance serve` that ends by SIGKILL at a point of a batch's life, and notes each line that is answered.

KILL is `METHOD:N:before` or `METHOD:N:after`: the Nth call, from 0, of a method of the ledger of batches, or `file`,
the writing of an output file, for a batch that begins in this process. Each line that the door is asked for is a line
in the file NOTES.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections import Counter
from pathlib import Path
from typing import Any

from appliance.__main__ import main
from appliance.api.offline import HandlerDoor
from appliance.batches.ledger import Ledger
from appliance.core.batches import OUTPUT_PURPOSE
from appliance.retrieval.files import UploadedFiles

counts: Counter[str] = Counter()
mine: set[str] = set()


def maybe_die(method: str, when: str) -> None:
    if os.environ.get("KILL") == f"{method}:{counts[method]}:{when}":
        os.kill(os.getpid(), signal.SIGKILL)


def plant(owner: type, method: str, name: str, purpose: str = "") -> None:
    original = getattr(owner, method)

    async def planted(self: Any, *given: Any, **named: Any) -> Any:
        if purpose and given[1] != purpose:
            return await original(self, *given, **named)
        if name != "create" and given[0].removesuffix("_output.jsonl").removesuffix("_error.jsonl") not in mine:
            return await original(self, *given, **named)
        maybe_die(name, "before")
        done = await original(self, *given, **named)
        if name == "create":
            mine.add(done.id)
        maybe_die(name, "after")
        counts[name] += 1
        return done

    setattr(owner, method, planted)


def note_answers() -> None:
    original = HandlerDoor.answer

    async def answer(self: HandlerDoor, endpoint: Any, body: bytes, **named: Any) -> Any:
        descriptor = os.open(Path(os.environ["NOTES"]), os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        os.write(descriptor, json.dumps(json.loads(body)["messages"][0]["content"]).encode() + b"\n")
        os.close(descriptor)
        return await original(self, endpoint, body, **named)

    HandlerDoor.answer = answer  # type: ignore[method-assign]


if __name__ == "__main__":
    for each in ("create", "apply", "begin_line", "end_line", "finish"):
        plant(Ledger, each, each)
    plant(UploadedFiles, "create", "file", OUTPUT_PURPOSE)
    note_answers()
    sys.argv.insert(1, "serve")
    main()
