"""Commands to devices, and what became of them.

Whoever wants a command writes a row, in this process or in another; the running hub sends it and waits for the reply.
The row's id is the command's: the device acts once however often it comes, so a hub that was killed sends it again.
"""

from __future__ import annotations

import asyncio
import logging

import msgspec

from appliance.core.clock import Clock
from appliance.core.errors import ApplianceError
from appliance.core.fleet import Command, CommandResult, UpKind, down
from appliance.core.messaging import Link, Message
from appliance.hub.command_store import LARGEST_RESULT_BYTES, CommandRow, SqliteCommands
from appliance.hub.dispatch import Complaints

logger = logging.getLogger("appliance.hub")

POLL_S = 0.2
AT_ONCE = 64

_RESULTS = msgspec.json.Decoder(CommandResult)


class Commands:
    """The part of the hub that sends commands and takes in replies."""

    kinds: frozenset[UpKind] = frozenset({"res"})

    def __init__(self, store: SqliteCommands, link: Link, complaints: Complaints, clock: Clock) -> None:
        self.store = store
        self._link = link
        self._complaints = complaints
        self._clock = clock

    async def handle(self, device: str, kind: UpKind, rest: str, message: Message) -> None:  # noqa: ARG002
        """Take in a reply; one to another device's command, or to none, changes nothing."""
        try:
            result = _RESULTS.decode(message.payload)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            self._complaints.refuse(device, "bad_document", f"res: {error}")
            return
        if len(message.payload) > LARGEST_RESULT_BYTES or len(result.code) > 100:
            self._complaints.refuse(device, "too_large", "the reply to a command")
            return
        if not await self.store.finish(device, result):
            self._complaints.refuse(device, "unknown_command", result.id)

    async def run(self) -> None:
        """Send what waits, and give up what nobody answered."""
        while True:
            try:
                await self.store.expire()
                if self._link.connected:
                    await self._send()
            except ApplianceError as error:
                logger.warning("Commands could not be sent: %s", error)
            await asyncio.sleep(POLL_S)

    async def _send(self) -> None:
        waiting = self.store.waiting(limit=AT_ONCE)
        async with asyncio.TaskGroup() as tasks:
            sending = [tasks.create_task(self._send_one(each), name=f"command {each.id}") for each in waiting]
        sent = [each.id for each, task in zip(waiting, sending, strict=True) if task.result()]
        if sent:
            await self.store.note_sent(sent)

    async def _send_one(self, row: CommandRow) -> bool:
        command = Command(row.id, row.name, row.arguments, row.expires)
        expiry_s = max(1, int(row.expires - self._clock.unix()))
        topic = down(row.device, "cmd")
        payload = msgspec.json.encode(command)
        try:
            await self._link.publish(Message(topic, payload, expiry_s=expiry_s, correlation=row.id.encode()))
        except ApplianceError as error:
            logger.info("The command %s for %s waits: %s", row.id, row.device, error)
            return False
        return True
