"""The wishes of a box as its doors and the fleet see them."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from appliance.core.errors import NotFoundError
from appliance.core.releases import Criteria
from appliance.core.settings import Settings
from appliance.core.wishes import REQUESTED, SelfTestReport, Soak, Wish
from appliance.registry.wishes import Wishes
from appliance.serving.self_test import run_self_test
from appliance.serving.trials import Trials

LOOK_S = 0.2
"""How often a trial is looked at by who waits for its end: another process may be the one that ends it."""


class WishedVersions:
    """The serving floor's answer to `core.wishes.ModelVersions`."""

    def __init__(self, settings: Settings, wishes: Wishes, trials: Trials) -> None:
        """Write into the wishes of this box; `trials` is woken by each."""
        self._settings = settings
        self._wishes = wishes
        self._trials = trials
        self._testing = asyncio.Lock()

    def wishes(self) -> Sequence[Wish]:
        """Return every wish there is; see `core.wishes.ModelVersions.wishes`."""
        return list(self._wishes.all().values())

    def wish(self, name: str) -> Wish | None:
        """Return the wish for a name."""
        return self._wishes.find(name)

    async def test(self, full_name: str, criteria: Criteria) -> SelfTestReport:
        """Try a version in a process of its own, one at a time; see `core.wishes.ModelVersions.test`."""
        registered = self._wishes.registered(full_name)
        async with self._testing:
            return await run_self_test(self._settings, registered, criteria)

    async def activate(self, full_name: str, *, origin: str, soak: Soak | None, criteria: Criteria) -> Wish:
        """Write a wish; see `core.wishes.ModelVersions.activate`."""
        wish = await asyncio.to_thread(self._wishes.activate, full_name, origin=origin, soak=soak, criteria=criteria)
        self._trials.wake()
        return wish

    async def rollback(self, name: str, *, origin: str, reason: str, code: str = REQUESTED) -> Wish:
        """Go back to the version before; see `core.wishes.ModelVersions.rollback`."""
        wish = await asyncio.to_thread(self._wishes.roll_back, name, origin=origin, reason=reason, code=code)
        self._trials.wake()
        return wish

    async def settled(self, name: str) -> Wish:
        """Wait until the trial of a name is over; see `core.wishes.ModelVersions.settled`.

        Raises:
            NotFoundError: There is no wish for it.
        """
        while True:
            wish = self._wishes.find(name)
            if wish is None:
                raise NotFoundError(f"Nothing is wished for {name!r:.100}.", code="no_wish", param="model")
            if wish.state != "trial":
                return wish
            await asyncio.sleep(LOOK_S)
