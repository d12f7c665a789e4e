"""What the hub is made of: parts that each read some of the topics of all devices, and work in between."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Protocol

from appliance.core.fleet import Answer, Question, UpKind
from appliance.core.messaging import Message


class HubPart(Protocol):
    """A part of the hub."""

    @property
    def kinds(self) -> frozenset[UpKind]:
        """Return the topics it reads; each topic has one reader."""
        ...

    async def handle(self, device: str, kind: UpKind, rest: str, message: Message) -> None:
        """Take one message of a device, `rest` being what follows the kind in the topic.

        It returns once what the message says is committed, for then the broker forgets it. Whatever a device sends
        raises nothing: it is refused in a log line or in an answer.
        """
        ...

    async def run(self) -> None:
        """Work until cancelled, connected or not."""
        ...


Answerer = Callable[[str, Question], Awaitable[Answer]]
"""Answers one kind of question of a device; what it refuses is an `Answer` that is not ok."""
