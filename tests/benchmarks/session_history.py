"""How quickly a long conversation opens, goes on and is searched, and what idle ones cost, in process and on the disk.

python -m tests.benchmarks.session_history [MESSAGES] [CONVERSATIONS]

Opening is the conversation and its last 100 items; an append is a question and an answer, each on the disk (fsync)
when it counts. Beside each append stands a bare write and fsync of as many bytes as it adds, since the disk decides.
Memory is the growth of this process's own pages (RSS) while so many idle conversations are made, opened and left: it
is measured first, before anything else has taken memory that they could use again, and twice, since the first of them
fill the database's caches.
"""

from __future__ import annotations

import asyncio
import os
import random
import string
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from statistics import median
from typing import Any

import psutil

from appliance.core.clock import SystemClock
from appliance.core.settings import Settings
from appliance.sessions.room import Sessions, open_sessions
from tests.sessions.boxes import nothing_to_forget

MESSAGES = 10_000
CONVERSATIONS = 1_000
ROUNDS = 200
WORDS = ["".join(random.Random(number).choices(string.ascii_lowercase, k=6)) for number in range(20_000)]
Rounds = list[tuple[float, float]]
"""Seconds by the clock and of the CPU."""

CHINESE = "热泵的滤网应当每三个月更换一次冷凝器压缩机维修手册温度压力"


def message(chance: random.Random, role: str) -> dict[str, Any]:
    """Return a message of about 80 words, a quarter of them Chinese."""
    said = " ".join(chance.choices(WORDS, k=60)) + " " + "".join(chance.choices(CHINESE, k=20))
    part = {"type": "output_text" if role == "assistant" else "input_text", "text": said}
    return {"type": "message", "role": role, "content": [part]}


def turn(chance: random.Random) -> list[dict[str, Any]]:
    """Return a question and an answer."""
    return [message(chance, "user"), message(chance, "assistant")]


def told(name: str, rounds: Rounds) -> None:
    """Print the figures of an action."""
    wall = sorted(seconds for seconds, _ in rounds)
    cpu = median(seconds for _, seconds in rounds)
    figures = (median(wall), wall[int(0.95 * len(wall))], cpu)
    print(
        f"{name:42} median {figures[0] * 1e3:7.2f} ms  p95 {figures[1] * 1e3:7.2f} ms  CPU {figures[2] * 1e3:7.2f} ms"
    )


def now() -> tuple[float, float]:
    """Return the time by the clock and of this process's CPU."""
    return time.perf_counter(), time.process_time()


def since(start: tuple[float, float]) -> tuple[float, float]:
    """Return the time since then."""
    end = now()
    return end[0] - start[0], end[1] - start[1]


def timed(action: Callable[[], object], rounds: int = ROUNDS) -> Rounds:
    """Return the seconds of each of some rounds."""
    found = []
    for _ in range(rounds):
        start = now()
        action()
        found.append(since(start))
    return found


async def awaited(action: Callable[[], Awaitable[object]], rounds: int = ROUNDS) -> Rounds:
    """Return the seconds of each of some rounds."""
    found = []
    for _ in range(rounds):
        start = now()
        await action()
        found.append(since(start))
    return found


def bare(folder: Path) -> Callable[[], object]:
    """Return an append of 40 KB to a file, and its fsync."""
    descriptor = os.open(folder / "bare", os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def write() -> None:
        os.write(descriptor, b"x" * 40_000)
        os.fsync(descriptor)

    return write


async def measure_long(each: Sessions, folder: Path, count: int) -> None:
    """Tell what a long conversation costs."""
    chance = random.Random(7)
    made = await each.conversations.create(tenant="a")
    for _ in range(count // 200):
        items = [item for _ in range(100) for item in turn(chance)]
        await each.conversations.append(made.id, items, tenant="a")
    conversations = each.conversations

    def open_it(name: str) -> None:
        conversations.get(name, tenant="a")
        conversations.items(name, tenant="a", limit=100, newest_first=True)

    size = (folder / "sessions.db").stat().st_size
    print(f"a conversation of {count:,} messages, all in a file of {size / 1e6:.1f} MB")
    told("open: conversation and last 100 items", timed(lambda: open_it(made.id)))
    told("append a turn, on the disk", await awaited(lambda: conversations.append(made.id, turn(chance), tenant="a")))
    told("  beside it: 40 KB written and fsynced", timed(bare(folder)))
    fork = await conversations.fork(made.id, tenant="a")
    told("fork", await awaited(lambda: conversations.fork(made.id, tenant="a"), 50))
    told("open a fork", timed(lambda: open_it(fork.id)))
    told("search for two words", timed(lambda: conversations.search(f"{WORDS[17]} 滤网", tenant="a", limit=20), 50))
    told("read all of it", timed(lambda: conversations.items(made.id, tenant="a"), 5))
    item = conversations.items(made.id, tenant="a", limit=1)[0][0]["id"]
    told("erase one item", await awaited(lambda: conversations.remove_item(made.id, item, tenant="a"), 1))
    told("erase it, the fork keeps all", await awaited(lambda: conversations.delete(made.id, tenant="a"), 1))


async def measure_idle(each: Sessions, count: int) -> None:
    """Tell what idle conversations cost in memory."""
    chance, process = random.Random(7), psutil.Process()
    await each.conversations.create(tenant="b", items=[*turn(chance), *turn(chance)])
    before = process.memory_info().rss
    for _ in range(count):
        made = await each.conversations.create(tenant="b", items=[*turn(chance), *turn(chance)])
        each.conversations.items(made.id, tenant="b", limit=100, newest_first=True)
    grown = process.memory_info().rss - before
    print(f"{count:,} idle conversations more: {grown / 1e6:.1f} MB of memory, {grown / count / 1e3:.2f} KB each")


async def measure(folder: Path, messages: int, conversations: int) -> None:
    """Measure and tell all."""
    async with open_sessions(Settings(data_dir=folder), SystemClock(), forget=nothing_to_forget) as each:
        assert isinstance(each, Sessions), "nobody else has the folder"
        await each.upkeep.once()
        for _ in range(2):
            await measure_idle(each, conversations)
        await measure_long(each, folder, messages)


def main() -> None:
    """Run from the command line."""
    counts = [int(each) for each in sys.argv[1:]]
    messages, conversations = (*counts, *(MESSAGES, CONVERSATIONS)[len(counts) :])
    with tempfile.TemporaryDirectory() as folder:
        asyncio.run(measure(Path(folder), messages, conversations))


if __name__ == "__main__":
    main()
