"""A program that does something over and over, killed (SIGKILL) at its n-th change of the disk, then once undisturbed.

Usage: python -m tests.fleet.killed init FOLDER
       python -m tests.fleet.killed enrol FOLDER BUNDLE

For each n there is a folder FOLDER/n of its own. It ends when one ran through without being killed, and prints how
often it was killed. A change is a file's being put in its place, or removed.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from appliance.core.clock import SystemClock
from appliance.core.hub_settings import HubSettings
from appliance.fleet.enrolment import Pauses, begin, enrol, read_bundle
from appliance.fleet.identity import IdentityFolder
from appliance.hub.init import HubDocument, init_hub


def init(folder: Path) -> None:
    init_hub(HubSettings(data_dir=folder), HubDocument("hub.test"), SystemClock())


def become(folder: Path, bundle: str) -> None:
    identity = IdentityFolder(folder)
    pending = begin(identity, f"box-{folder.name}", read_bundle(Path(bundle), now=0.0))
    if pending is not None:
        ask = enrol(identity, pending, facts={}, clock=SystemClock(), say=lambda _: None, pauses=Pauses(0.01, 0.05))
        asyncio.run(asyncio.wait_for(ask, 30))


def kill_at(count: int) -> None:
    """Kill this process before its n-th change, or after it where n is odd."""
    done = 0

    def killing(change: Callable[..., Any]) -> Callable[..., Any]:
        def changed(*arguments: Any, **options: Any) -> Any:
            nonlocal done
            done += 1
            if done == count and count % 2 == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            result = change(*arguments, **options)
            if done == count:
                os.kill(os.getpid(), signal.SIGKILL)
            return result

        return changed

    for name in ("replace", "rename", "unlink", "symlink_to"):
        setattr(Path, name, killing(getattr(Path, name)))


def in_child(work: Callable[[], None], count: int) -> bool:
    """Return whether the work ended in a child process, which is killed at its n-th change unless n is 0."""
    child = os.fork()
    if child == 0:
        try:
            if count:
                kill_at(count)
            work()
            os._exit(0)
        finally:
            os._exit(1)
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        return False
    assert os.waitstatus_to_exitcode(status) == 0, "it failed"
    return True


def main(what: str, folder: str, *rest: str) -> None:
    works: dict[str, Callable[..., None]] = {"init": init, "enrol": become}
    for count in range(1, 500):
        work = partial(works[what], Path(folder) / str(count), *rest)
        ended = in_child(work, count)
        assert in_child(work, 0)
        if ended:
            print(count - 1)
            return


if __name__ == "__main__":
    main(*sys.argv[1:])
