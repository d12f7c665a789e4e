"""A response that has ended, or whose process has: it is told from what was kept."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any

from appliance.agents.narration import TERMINAL, terminal
from appliance.core.agents import Event
from appliance.core.sessions import Responses, StoredResponse


class Stored:
    """A response that nobody works on."""

    def __init__(self, responses: Responses, stored: StoredResponse) -> None:
        self._responses = responses
        self._stored = stored

    @property
    def streamed(self) -> bool:
        """Whether its events were kept."""
        return bool(self._stored.request.get("stream"))

    @property
    def body(self) -> Mapping[str, Any]:
        """The response object."""
        return self._stored.body

    async def events(self, after: int = -1, *, silence_s: float | None = None) -> AsyncIterator[Sequence[Event]]:
        """Yield what was told behind a number; the last event is made of how it ended. There is no silence."""
        del silence_s
        told = self._responses.events(self._stored.id, tenant=self._stored.tenant)
        number = told[-1]["sequence_number"] + 1 if told else 0
        ending = [terminal(self.body, number)] if self._stored.status in TERMINAL else []
        new = [each for each in (*told, *ending) if each["sequence_number"] > after]
        if new:
            yield new

    async def whole(self) -> Mapping[str, Any]:
        """Return the response object."""
        return self.body

    def cancel(self) -> None:
        """Do nothing: it has ended."""
