"""What stands for the disk where a response is not to be stored: nothing is kept."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from appliance.core.sessions import Item, ResponseStatus, Step


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
    ) -> None:
        """Forget how it ended."""
