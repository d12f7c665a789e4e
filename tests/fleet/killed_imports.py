"""Imports a stick again and again, killed by SIGKILL before or after its n-th journal write, fsync or rename.

    python -m tests.fleet.killed_imports FOLDER [EVERY]

FOLDER is empty. Prints one JSON line a kill: where it was, and how the box was after the next start.
"""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

from appliance.registry.install import import_model
from appliance.store.database import Database
from tests.fleet.killed_updates import KILLED, Executioner, in_fork
from tests.fleet.test_imports import Site
from tests.fleet.updating import MODEL, tiny_model


def prepare(folder: Path) -> None:
    """Make a closed site with `tiny:1`, and a stick with the release that is newer."""
    site = Site(folder)
    asyncio.run(site.record.anchor(site.hub.authority.root()))
    tiny_model(folder / "old.gguf", seed=0)
    import_model(folder / "old.gguf", site.box.registry, name=MODEL, version="1")
    site.export("stick", site.release(1))
    site.box.close()


def live(folder: Path, at: int) -> None:
    """Import the stick, or go on with what an earlier life began, in this process, which is killed at a moment."""
    site = Site(folder)
    executioner = Executioner(at)
    executioner.watch(os, "fsync")
    executioner.watch(os, "posix_fallocate")
    executioner.watch(Path, "rename")
    executioner.watch(Path, "replace")
    executioner.watch(Database, "submit")

    async def run() -> None:
        requests = site.desk.requests()
        if requests:
            await site.followed(requests[0])
        elif site.meant() == "1":
            answer = await site.imported(folder / "stick")
            assert answer.installed, answer
        await site.settled()

    asyncio.run(run())
    site.box.close()
    os.write(2, f"moments {executioner.count}\n".encode())


def outcome(folder: Path) -> dict[str, Any]:
    """Return how the box is."""
    site = Site(folder)
    found = {
        "meant": site.meant(),
        "versions": sorted(each.version for each in site.box.registry.list()),
        "right": site.box.registry.resolve(MODEL).files[0].path.read_bytes()
        == (folder / f"{MODEL}-1.gguf").read_bytes(),
        "old": site.box.registry.resolve(f"{MODEL}:1").files[0].path.read_bytes() == (folder / "old.gguf").read_bytes(),
        "partial": sorted(each.name for each in site.box.blobs.partial_folder.iterdir()),
        "requests": list(site.desk.requests()),
        "open": site.box.journal.current() is not None,
        "floor": site.box.journal.floor(MODEL),
        "newest": site.box.journal.newest(),
        "reports": len(site.box.reports()),
    }
    site.box.close()
    return found


def say_outcome(folder: Path) -> None:
    os.write(2, json.dumps(outcome(folder)).encode())


def main() -> None:
    base, every = Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 1
    fresh, folder = base / "fresh", base / "site"
    fresh.mkdir()
    status, said = in_fork(lambda: prepare(fresh))
    assert status == 0, said
    at = 1
    while True:
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(fresh, folder, symlinks=True)
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
