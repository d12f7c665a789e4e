"""A device that fetches one file from the hub, answers commands meanwhile, and may be killed at any time.

    python -m tests.fleet.download_child FOLDER PORT DEVICE BROKER-FOLDER DIGEST LENGTH

Reads the piece list from FOLDER/pieces, and counts the bytes of blocks that reach it in FOLDER/received. Prints `done`
once the file is there and right.
"""

from __future__ import annotations

import asyncio
import os
import sys
from pathlib import Path

import msgspec

from appliance.core.clock import SystemClock
from appliance.core.fleet import Command, CommandResult, down, up
from appliance.core.messaging import Message, Subscription
from appliance.fleet.download import Download, Lies, is_reserved, reserve
from appliance.fleet.hub_source import HubBlocks
from appliance.fleet.journal import Journal
from appliance.fleet.pieces import PieceList
from appliance.fleet.schema import open_fleet_database
from appliance.fleet.sources import fetch
from appliance.messaging.connection import Connection, ConnectionOptions, TlsFiles
from appliance.registry.blobs import Blobs


class Device:
    """The connection, the blocks and the answers to commands."""

    def __init__(self, folder: Path, port: int, device: str, tls: TlsFiles) -> None:
        self.name = device
        options = ConnectionOptions(host="localhost", port=port, client_id=device, tls=tls)
        self.link = Connection(
            options,
            self.receive,
            subscriptions=[Subscription(down(device, "cmd")), Subscription(down(device, "blk"), qos=0)],
            on_connected=self.greet,
            uniform=lambda: 0.05,
        )
        self.received = os.open(folder / "received", os.O_RDWR | os.O_CREAT, 0o600)
        self.blocks = HubBlocks(device, self.link, SystemClock(), lambda: 0)

    async def greet(self) -> None:
        self.blocks.connected()

    async def receive(self, message: Message) -> None:
        if message.topic.endswith("/blk"):
            before = int.from_bytes(os.pread(self.received, 8, 0), "big")  # survives a kill
            os.pwrite(self.received, (before + len(message.payload)).to_bytes(8, "big"), 0)
            self.blocks.handle(message)
            return
        command = msgspec.json.decode(message.payload, type=Command)
        result = msgspec.json.encode(CommandResult(command.id, ok=True))
        await self.link.publish(Message(up(self.name, "res"), result, correlation=message.correlation))


async def run(folder: Path, port: int, device: str, tls: TlsFiles, pieces: PieceList) -> None:
    database = open_fleet_database(folder / "fleet.db")
    journal, blobs = Journal(database, SystemClock()), Blobs(folder / "models" / "blobs")
    if not is_reserved(blobs, pieces):
        await journal.commit(pieces.digest, b"")
        reserve(blobs, pieces)
    end = Device(folder, port, device, tls)
    async with asyncio.TaskGroup() as group:
        connection = group.create_task(end.link.run())
        with Download(
            blobs,
            pieces,
            safe=journal.safe(pieces.digest),
            commit=journal.commit,
            clock=SystemClock(),
            lies=Lies(),
        ) as download:
            await fetch(download, [end.blocks.source(patient=True)])
        connection.cancel()
    database.close()
    print("done", flush=True)


def main() -> None:
    folder, port, device, broker, digest, length = sys.argv[1:]
    keys = Path(broker)
    tls = TlsFiles(keys / "authority.crt", keys / f"{device}.crt", keys / f"{device}.key")
    pieces = PieceList(digest, int(length), (Path(folder) / "pieces").read_bytes())
    asyncio.run(run(Path(folder), int(port), device, tls, pieces))


if __name__ == "__main__":
    main()
