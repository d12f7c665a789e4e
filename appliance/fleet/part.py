"""What the agent is made of: parts that each read some of the topics of this device, and work in between."""

from __future__ import annotations

from typing import Protocol

from appliance.core.fleet import Answer, DownKind, Question
from appliance.core.messaging import Message


class FleetPart(Protocol):
    """A part of the agent."""

    @property
    def kinds(self) -> frozenset[DownKind]:
        """Return the topics it reads; each topic has one reader."""
        ...

    async def handle(self, kind: DownKind, message: Message) -> None:
        """Take one message. Whatever it contains raises nothing: it is refused in a log line or in an answer.

        It asks the hub nothing and takes no long time, for the answer may wait behind this very message: what needs
        either is kept, and done by `run`.
        """
        ...

    async def connected(self) -> None:
        """Say what has to be said anew after each connecting, before anything else is handled; ask nothing here."""
        ...

    async def run(self) -> None:
        """Work until cancelled, connected or not."""
        ...


class Asking(Protocol):
    """Questions to the hub."""

    async def ask(self, question: Question, *, timeout_s: float = 10.0) -> Answer:
        """Return the hub's answer.

        Raises:
            UnavailableError: There is no connection, or no answer came in time.
        """
        ...
