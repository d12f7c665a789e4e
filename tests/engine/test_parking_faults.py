"""What befalls the process or the disk while conversations are being parked costs nobody an answer."""

from __future__ import annotations

import resource
import select
import subprocess
import sys
from pathlib import Path

import pytest

from tests.engine.conftest import DEADLINE_S
from tests.engine.test_parking import OTHER, PAST, ask, files, parking

pytestmark = pytest.mark.anyio

PARK_UNTIL_KILLED = """
import asyncio, sys
from pathlib import Path
from tests.engine.test_parking import PAST, ask, files, parking

async def main(model, folder):
    async with parking(model, folder) as subject:
        await ask(subject, PAST)
        await subject.until(lambda: bool(files(folder)))
        print("parked", flush=True)
        number = 0
        while True:
            number += 1
            await ask(subject, f"{number}: {PAST}")

asyncio.run(main(Path(sys.argv[1]), Path(sys.argv[2])))
"""


def kill_while_parking(model: Path, folder: Path, delay_s: float) -> None:
    """Kill a process some time after it has parked one conversation, while it goes on parking others."""
    arguments = [sys.executable, "-c", PARK_UNTIL_KILLED, str(model), str(folder)]
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, cwd=Path(__file__).parents[2]) as child:
        assert child.stdout is not None
        try:
            assert select.select([child.stdout], [], [], DEADLINE_S)[0], "it parked nothing"
            assert child.stdout.readline() == b"parked\n"
            select.select([child.stdout], [], [], delay_s)  # it says no more: this is the moment of the kill
        finally:
            child.kill()


@pytest.mark.slow
async def test_a_parked_conversation_goes_on_after_a_kill_in_the_middle_of_parking_others(
    tiny_model_path: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "kv"
    for delay_s in (0.0, 0.15, 0.4):
        kill_while_parking(tiny_model_path, folder, delay_s)
        async with parking(tiny_model_path, folder) as subject:
            _, _, cached = await ask(subject, PAST)
            assert cached == len(await subject.tokens(PAST)) - 1
        assert all(path.suffix == ".kv" for path in folder.glob("*/*")), "leftovers"


async def test_a_disk_that_is_full_while_parking_costs_the_file_and_nothing_else(
    tiny_model_path: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    async with parking(tiny_model_path, tmp_path / "kv") as subject:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
        try:
            first = await ask(subject, PAST)
            await subject.until(lambda: "cannot be written" in caplog.text)
            assert list((tmp_path / "kv").glob("*/*")) == []
            await ask(subject, OTHER)
            again = await ask(subject, PAST)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert again[0] == first[0]
        assert again[2] == len(await subject.tokens(PAST)) - 1, "it was kept in RAM"
        await ask(subject, OTHER + PAST)
        await subject.until(lambda: len(files(tmp_path / "kv")) > 0)
