"""Acknowledgements on a box that keeps its telemetry to itself: what is left of them is of job reports."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from appliance.core.fleet import DownKind
from appliance.core.messaging import Message
from appliance.fleet.telemetry import acknowledged_reports, read_ack


class JobAcknowledgements:
    """Tells of job reports that the hub has. A `FleetPart`."""

    def __init__(self, acknowledged: Callable[[int], None]) -> None:
        """Call `acknowledged` with the sequence up to which the hub has them."""
        self._acknowledged = acknowledged

    @property
    def kinds(self) -> frozenset[DownKind]:
        """Return the topics it reads."""
        return frozenset({"ack"})

    async def connected(self) -> None:
        """Do nothing: the reports are sent by whoever has them."""

    async def handle(self, kind: DownKind, message: Message) -> None:  # noqa: ARG002
        """Take an acknowledgement."""
        ack = read_ack(message)
        up_to = None if ack is None else acknowledged_reports(ack)
        if up_to is not None:
            self._acknowledged(up_to)

    async def run(self) -> None:
        """Do nothing until cancelled."""
        await asyncio.Event().wait()
