"""Where a run is kept; and what stands for it where a response is not to be stored: nothing is kept."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from appliance.core.sessions import Item, ResponseStatus, Step


class Keeper(Protocol):
    """Where a run is kept: `core.sessions.Responses`, or nowhere."""

    async def add_step(self, response: str, step: Step) -> None:
        """Keep a step before it acts."""
        ...

    async def add_events(self, response: str, events: Sequence[Mapping[str, Any]]) -> None:
        """Keep events of its stream."""
        ...

    async def end(
        self,
        response: str,
        status: ResponseStatus,
        body: Mapping[str, Any],
        *,
        append: Sequence[Item] = (),
        after: str | None = None,
        fork: bool = False,
    ) -> Mapping[str, Any]:
        """Keep how it ended, and return the response object as it is kept."""
        ...


class Unkept:
    """Takes what a run keeps, and forgets it: the run itself remembers for as long as it lasts."""

    async def add_step(self, response: str, step: Step) -> None:
        """Forget a step."""

    async def add_events(self, response: str, events: Sequence[Mapping[str, Any]]) -> None:
        """Forget events."""

    async def end(
        self,
        response: str,
        status: ResponseStatus,
        body: Mapping[str, Any],
        *,
        append: Sequence[Item] = (),
        after: str | None = None,
        fork: bool = False,
    ) -> Mapping[str, Any]:
        """Forget how it ended."""
        del response, status, append, after, fork
        return body
