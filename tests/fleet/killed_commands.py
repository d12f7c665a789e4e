"""Carries out one command on a `fleet.db` in a process that ends by SIGKILL at the point that is named.

Arguments: the database, the file that each act adds a line to, and the point: `before_begin`, `after_begin`, `acting`,
`after_finish` or `never`. What is sent is printed.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec

from appliance.core.clock import SystemClock
from appliance.core.fleet import Command
from appliance.core.messaging import Message
from appliance.fleet.command_ledger import CommandLedger
from appliance.fleet.commands import Commands, Done
from appliance.fleet.hub_watch import HubWatch
from appliance.fleet.schema import open_fleet_database
from appliance.observe.metrics import Metrics

database, notes, point, expires = sys.argv[1:]


def maybe_die(here: str) -> None:
    if here == point:
        os.kill(os.getpid(), signal.SIGKILL)


class Printing:
    connected = True

    async def publish(self, message: Message) -> None:
        print(message.payload.decode(), flush=True)
        answered.set()


class Ledger(CommandLedger):
    async def begin(self, command: str) -> bool:
        maybe_die("before_begin")
        begun = await super().begin(command)
        maybe_die("after_begin")
        return begun

    async def finish(self, result: Any) -> Any:
        kept = await super().finish(result)
        maybe_die("after_finish")
        return kept


def note() -> None:
    with Path(notes).open("a") as file:
        file.write("acted\n")
        file.flush()
        os.fsync(file.fileno())


async def act(arguments: Mapping[str, Any]) -> Done:
    note()
    maybe_die("acting")
    return Done({"acted": True})


async def main() -> None:
    ledger = Ledger(open_fleet_database(Path(database)))
    hub = HubWatch(SystemClock())
    commands = Commands("box", Printing(), ledger, {"act": act}, hub=hub, metrics=Metrics().fleet)
    command = Command("once", "act", {}, float(expires))
    async with asyncio.timeout(30), asyncio.TaskGroup() as tasks:
        running = tasks.create_task(commands.run())
        if not (ledger.accepted() or ledger.begun()):
            await commands.handle("cmd", Message("", msgspec.json.encode(command), correlation=b"c"))
        await answered.wait()
        running.cancel()


answered = asyncio.Event()
asyncio.run(main())
os._exit(0)
