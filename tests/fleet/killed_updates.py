"""Runs an update again and again, killed by SIGKILL before or after its n-th journal write, fsync or rename, for all n.

    python -m tests.fleet.killed_updates FOLDER [EVERY]

FOLDER holds `old.gguf` and `new.gguf`. Prints one JSON line a kill: where it was, and how the box was after the next
start. Each life is a fork of this process, so that it costs milliseconds; nothing is open in it when it forks.
"""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from appliance.registry.install import import_model
from appliance.store.database import Database
from tests.fleet.links import KeptLink
from tests.fleet.updating import MODEL, Releases, UpdatingBox, sealed

KILLED = -signal.SIGKILL


class Executioner:
    """Counts the moments before and after each lasting side effect, and ends the process at one of them."""

    def __init__(self, at: int) -> None:
        self.at = at
        self.count = 0

    def moment(self, what: str) -> None:
        self.count += 1
        if self.count == self.at:
            os.write(2, f"{what}\n".encode())
            os.kill(os.getpid(), signal.SIGKILL)

    def watch(self, owner: Any, name: str) -> None:
        original: Callable[..., Any] = getattr(owner, name)

        def watched(*arguments: Any, **more: Any) -> Any:
            self.moment(f"before {name}")
            result = original(*arguments, **more)
            if name == "submit":
                result.result()  # the write is on the disk
            self.moment(f"after {name}")
            return result

        setattr(owner, name, watched)


def live(folder: Path, at: int) -> None:
    """Run the update to its end in this process, which is killed at a moment."""
    releases = Releases(folder.parent / "released")
    box = UpdatingBox(folder, KeptLink(), releases, folders=[releases.folder])
    job = releases.add((folder.parent / "new.gguf").read_bytes())
    executioner = Executioner(at)
    executioner.watch(os, "fsync")
    executioner.watch(os, "posix_fallocate")
    executioner.watch(Path, "rename")
    executioner.watch(Database, "submit")

    async def run() -> None:
        await box.updates.take(sealed(job))
        await box.until("confirmed", "failed", "rejected", "rolled_back")

    asyncio.run(run())
    box.close()
    os.write(2, f"moments {executioner.count}\n".encode())


def in_fork(function: Callable[[], None]) -> tuple[int, str]:
    """Return the exit status of a fork that runs a function, and what it said."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.dup2(writing, 2)
        status = 1
        try:
            function()
            status = 0
        finally:
            os._exit(status)
    os.close(writing)
    with os.fdopen(reading) as said:
        text = said.read()
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status), text.strip()


def prepare(folder: Path) -> None:
    releases = Releases(folder.parent / "released")
    box = UpdatingBox(folder, KeptLink(), releases)
    import_model(folder.parent / "old.gguf", box.registry, name=MODEL, version="1")
    box.close()


def outcome(folder: Path) -> dict[str, Any]:
    """Return how the box is."""
    box = UpdatingBox(folder, KeptLink(), Releases(folder.parent / "released"))
    new = (folder.parent / "new.gguf").read_bytes()
    found = {
        "states": box.states("job-2"),
        "sequences": [each.sequence for each in box.reports()],
        "meant": box.registry.resolve(MODEL).version,
        "versions": sorted(each.version for each in box.registry.list()),
        "right": box.registry.resolve(f"{MODEL}:2").files[0].path.read_bytes() == new,
        "partial": sorted(each.name for each in box.blobs.partial_folder.iterdir()),
        "floor": box.journal.floor(MODEL),
    }
    box.close()
    return found


def say_outcome(folder: Path) -> None:
    os.write(2, json.dumps(outcome(folder)).encode())


def main() -> None:
    base, every = Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 1
    fresh, folder = base / "fresh", base / "data"
    assert in_fork(lambda: prepare(fresh))[0] == 0
    at = 1
    while True:
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(fresh, folder)
        status, where = in_fork(lambda at=at: live(folder, at))  # type: ignore[misc]
        if status == KILLED:
            again, said = in_fork(lambda: live(folder, 0))
            assert again == 0, said
        else:
            assert status == 0, where
        _, found = in_fork(lambda: say_outcome(folder))
        print(json.dumps({"at": at, "status": status, "where": where, "then": json.loads(found)}), flush=True)
        if status == 0:
            return
        at += every


if __name__ == "__main__":
    main()
