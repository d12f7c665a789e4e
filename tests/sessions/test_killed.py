"""What was acknowledged survives SIGKILL: each item once, whole, in order, and no erased byte comes back."""

from __future__ import annotations

import asyncio
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Collection
from pathlib import Path

import pytest

from tests.sessions.boxes import files_with, room, texts

pytestmark = [pytest.mark.anyio, pytest.mark.slow, pytest.mark.timeout(300)]

ROUNDS = 50
DEADLINE_S = 30.0

CHILD = """
import asyncio, sys
from pathlib import Path
from tests.sessions.boxes import response, room, said

def tell(*words):
    print(*words, flush=True)

async def main(folder, name, number):
    async with room(folder) as each:
        if not name:
            name = (await each.conversations.create(tenant="a")).id
            tell("made", name)
        while True:
            pair = [said(f"text {n} " + "x" * 500, f"i{n}") for n in (number, number + 1)]
            last = each.conversations.get(name, tenant="a").last
            if number % 4:
                await each.conversations.append(name, pair, tenant="a", after=last)
            else:
                begun = response(f"resp_{number}", conversation=name, input=pair[:1])
                await each.responses.begin(begun)
                await each.responses.end(begun.id, "completed", {"output": pair[1:]}, append=pair, after=last)
            tell("kept", number)
            number += 2

asyncio.run(main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])))
"""


def killed(folder: Path, name: str, number: int, kept: int, delay_s: float) -> tuple[str, int]:
    """Let a child append until some time after it has kept some; return its id and the last number told."""
    command = [sys.executable, "-c", CHILD, str(folder), name, str(number)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        last = -1
        try:
            for _ in range(kept + (not name)):
                kind, value = child.stdout.readline().split()
                name, last = (value, last) if kind == "made" else (name, int(value))
            time.sleep(delay_s)  # waits for nothing: it says at which moment of an append the kill comes
        finally:
            child.send_signal(signal.SIGKILL)
        whole, _, _ = child.stdout.read().rpartition("\n")  # the last line may be cut off
        for line in whole.splitlines():
            if line.startswith("kept "):
                last = int(line.split()[1])
        assert child.wait(DEADLINE_S) == -signal.SIGKILL
    return name, last


async def test_every_item_that_was_acknowledged_is_there_once(tmp_path: Path) -> None:
    chance = random.Random(7)
    name, number = "", 0
    for _ in range(ROUNDS):
        name, last = await asyncio.to_thread(
            killed, tmp_path, name, number, chance.randint(1, 3), chance.random() * 0.02
        )
        async with room(tmp_path) as each:
            items, _ = each.conversations.items(name, tenant="a")
            names = [item["id"] for item in items]
            assert names == [f"i{n}" for n in range(len(names))]
            assert len(names) in (last + 2, last + 4), "acknowledged and lost, or half of an append"
            assert [text.split()[1] for text in texts(items)] == [str(n) for n in range(len(names))]
            assert each.conversations.wrong(name, tenant="a") == ""
            for unfinished in each.responses.unfinished():
                assert unfinished.input[0]["id"] not in names
                await each.responses.delete(unfinished.id, tenant="a")
            number = len(names)


ERASER = """
import asyncio, os, signal, sys
from pathlib import Path
from appliance.store.database import Database
from tests.sessions.boxes import room

left = int(sys.argv[3])
submit = Database.submit

def counted(self, function):
    global left
    future = submit(self, function)
    future.result()
    left -= 1
    if left == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    return future

async def forget(sessions):
    Path(sys.argv[1], "forgotten").write_text(" ".join(sessions))

async def main():
    async with room(Path(sys.argv[1]), forget=forget) as each:
        Database.submit = counted
        await each.conversations.delete(sys.argv[2], tenant="a")

asyncio.run(main())
"""


async def test_an_erasure_that_was_killed_is_ended_by_the_next_start(tmp_path: Path) -> None:
    code, moment = -signal.SIGKILL, 0
    while code == -signal.SIGKILL:
        moment += 1
        folder = tmp_path / str(moment)
        async with room(folder) as each:
            made = await each.conversations.create(tenant="a", items=[{"type": "message", "content": "quincesecret"}])
        command = [sys.executable, "-c", ERASER, str(folder), made.id, str(moment)]
        code = (await asyncio.to_thread(subprocess.run, command, timeout=DEADLINE_S, check=False)).returncode
        assert code in (0, -signal.SIGKILL)
        told = folder / "forgotten"

        async def forget(sessions: Collection[str], note: Callable[[str], object] = told.write_text) -> None:
            note(" ".join(sessions))

        async with room(folder, forget=forget) as each:
            await each.upkeep.once()
            assert told.read_text() == made.id, "the models forget it, before the kill or after"
            told.unlink()
            assert files_with(folder, "quincesecret") == []
    assert moment > 4, "step 1, the rows, the index, the log and the record"
