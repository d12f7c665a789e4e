"""Commands of the hub: `dn/<dev>/cmd`, answered on `up/<dev>/res` with the same correlation data.

    cmd ──> refused at the door │ answered from memory │ accepted ──> begun ──> acts ──> done ──> res
                                                        (on the disk)                  (on the disk)

Every command acts at most once. A repeated id is answered from memory; a process that was killed between acting and
replying answers `interrupted` after its restart, and leaves it to a person to look and to send a new one. What takes
its time (loading a model) has a lane of its own, so that a ping never waits for it.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any

import msgspec

from appliance.core.errors import ApplianceError
from appliance.core.fleet import LARGEST_DOCUMENT_BYTES, Command, CommandResult, DownKind, up
from appliance.core.messaging import Link, Message
from appliance.fleet.command_ledger import TOO_MANY, Accepted, CommandLedger, Reply
from appliance.fleet.command_policy import LONGEST_LIFE_S, SLOW, refusal
from appliance.fleet.hub_watch import HubWatch
from appliance.observe.fleet_metrics import FleetMetrics

LOGGER = logging.getLogger("appliance.fleet")
LARGEST_COMMAND_BYTES = 16 * 1024
LONGEST_ACTION_S = 280.0
QUICK_LANES = 3
EXPIRY_S = 300


@dataclass(frozen=True, slots=True)
class Done:
    """What an action gave.

    Attributes:
        result: Goes to the hub.
        afterwards: Called once the result is on the disk and, if there is a connection, with the broker.
    """

    result: dict[str, Any]
    afterwards: Callable[[], None] | None = None


Action = Callable[[Mapping[str, Any]], Awaitable[Done]]
"""Carries out a command with its arguments; an ApplianceError is the command's failure."""


class Commands:
    """A part of the agent."""

    def __init__(
        self,
        device: str,
        link: Link,
        ledger: CommandLedger,
        actions: Mapping[str, Action],
        *,
        hub: HubWatch,
        metrics: FleetMetrics,
    ) -> None:
        """Carry out commands by their names."""
        self._device = device
        self._link = link
        self._ledger = ledger
        self._actions = actions
        self._hub = hub
        self._metrics = metrics
        self._quick: asyncio.Queue[Command] = asyncio.Queue()
        self._slow: asyncio.Queue[Command] = asyncio.Queue()

    @property
    def kinds(self) -> frozenset[DownKind]:
        """Return the topic of commands."""
        return frozenset({"cmd"})

    async def handle(self, kind: DownKind, message: Message) -> None:  # noqa: ARG002
        """Accept a command, or answer at once why not; an accepted one is on the disk when this returns."""
        correlation = message.correlation or b""
        try:
            command = _decoded(message.payload)
        except (msgspec.DecodeError, RecursionError) as error:
            LOGGER.warning("a command of the hub is none: %s", error)
            await self._refuse(CommandResult("", ok=False, code="bad_command", detail=f"{error}"[:500]), correlation)
            return
        refused = refusal(command, self._hub.unix(), retained=message.retain, known=self._actions.keys())
        if refused is not None:
            LOGGER.warning("the hub's command %s was refused: %s", command.name, refused.detail)
            await self._refuse(refused, correlation)
            return
        outcome = await self._ledger.accept(Accepted(command, correlation), self._hub.unix())
        if isinstance(outcome, CommandResult):
            self._metrics.command("refused" if outcome.code == TOO_MANY else "repeated")
            await self._send(Reply(outcome, correlation))
        elif outcome:
            self._enqueue(command)

    async def connected(self) -> None:
        """Send the replies that could not be sent before, for as long as somebody may wait for them."""
        for reply in self._ledger.unsent(self._hub.unix() - LONGEST_LIFE_S):
            await self._send(reply)

    async def run(self) -> None:
        """Carry out what was accepted, before the last start too."""
        for command in self._ledger.begun():
            detail = "The box stopped while it carried this out; whether it was done is not known. It is not repeated."
            await self._finish(CommandResult(command, ok=False, code="interrupted", detail=detail))
        for waiting in self._ledger.accepted():
            self._enqueue(waiting)
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._work(self._slow), name="slow commands")
            for number in range(QUICK_LANES):
                tasks.create_task(self._work(self._quick), name=f"quick commands {number}")

    def _enqueue(self, command: Command) -> None:
        (self._slow if command.name in SLOW else self._quick).put_nowait(command)

    async def _work(self, queue: asyncio.Queue[Command]) -> None:
        while True:
            command = await queue.get()
            if not await self._ledger.begin(command.id):
                continue  # it was queued twice
            result, afterwards = await self._carry_out(command)
            self._metrics.command("done" if result.ok else "failed")
            await self._finish(result)
            if afterwards is not None:
                afterwards()

    async def _carry_out(self, command: Command) -> tuple[CommandResult, Callable[[], None] | None]:
        late = refusal(command, self._hub.unix(), retained=False, known=self._actions.keys())
        if late is not None:
            return late, None
        LOGGER.info("carrying out the hub's command %s (%s)", command.name, command.id)
        try:
            async with asyncio.timeout(LONGEST_ACTION_S):
                done = await self._actions[command.name](command.arguments)
        except TimeoutError:
            return _failed(command, "timeout", f"It took longer than {LONGEST_ACTION_S:g} s."), None
        except ApplianceError as error:
            return _failed(command, error.code, str(error)), None
        except Exception:
            LOGGER.exception("the hub's command %s failed", command.name)
            return _failed(command, "internal_error", "A mistake of ours; the box's log has it."), None
        result = CommandResult(command.id, ok=True, result=done.result)
        if (size := len(msgspec.json.encode(result))) > LARGEST_DOCUMENT_BYTES:
            return _failed(command, "too_large", f"The result has {size:,} bytes, too many to send."), done.afterwards
        return result, done.afterwards

    async def _finish(self, result: CommandResult) -> None:
        await self._send(await self._ledger.finish(result))

    async def _refuse(self, result: CommandResult, correlation: bytes) -> None:
        """Answer what is not remembered: it never comes so far as to act."""
        self._metrics.command("refused")
        if correlation:
            await self._publish(Reply(result, correlation))

    async def _send(self, reply: Reply) -> None:
        if await self._publish(reply):
            await self._ledger.note_sent(reply.result.id)

    async def _publish(self, reply: Reply) -> bool:
        message = Message(
            topic=up(self._device, "res"),
            payload=msgspec.json.encode(reply.result),
            expiry_s=EXPIRY_S,
            correlation=reply.correlation,
        )
        try:
            await self._link.publish(message)
        except ApplianceError as error:
            LOGGER.info("the answer to a command waits for the next connection: %s", error)
            return False
        return True


def _decoded(payload: bytes) -> Command:
    if len(payload) > LARGEST_COMMAND_BYTES:
        raise msgspec.DecodeError(f"{len(payload):,} bytes, {LARGEST_COMMAND_BYTES:,} are allowed")
    return msgspec.json.decode(payload, type=Command)


def _failed(command: Command, code: str, detail: str) -> CommandResult:
    return CommandResult(command.id, ok=False, code=code, detail=detail[:2000])
