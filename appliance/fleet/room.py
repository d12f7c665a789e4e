"""The room as a whole: waits until this box is enrolled, and then speaks for it.

Nothing of it is needed to serve. It is built after the doors are open, and whatever is wrong with it is a log line and
another try: no error of it ends the process.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

from appliance.core.clock import Clock
from appliance.core.errors import ApplianceError
from appliance.core.settings import EffectiveSetting, Settings
from appliance.fleet.identity import Identity, IdentityFolder
from appliance.fleet.means import FleetMeans
from appliance.observe.log_ring import LogRing, last_lines

if TYPE_CHECKING:
    from appliance.fleet.session import FleetSession

LOGGER = logging.getLogger("appliance.fleet")
LOOK_S = 5.0
"""How often a box that is not enrolled looks whether it is: the verb that enrols it runs beside the server."""
AGAIN_S = 60.0
"""After an error of the agent itself."""


class Fleet:
    """The agent of this box, once it is enrolled."""

    def __init__(
        self,
        settings: Settings,
        effective: Sequence[EffectiveSetting],
        clock: Clock,
        means: FleetMeans,
        log: LogRing,
    ) -> None:
        """Touch nothing before `run`."""
        self._settings = settings
        self._effective = effective
        self._clock = clock
        self._means = means
        self._log = log
        self._folder = IdentityFolder(settings.fleet_dir)
        self._session: FleetSession | None = None

    async def run(self) -> None:
        """Speak to the hub until cancelled; ends only where the settings want no hub."""
        if self._settings.fleet == "off":
            return
        while True:
            try:
                identity = await self._identity()
                kind = await asyncio.to_thread(_session_kind)
                self._session = kind(self._settings, self._effective, self._clock, self._means, self._log)
                await self._session.run(identity)
            except ApplianceError as error:
                LOGGER.error("the fleet's agent begins anew in %g s: %s", AGAIN_S, error)  # noqa: TRY400
            except Exception:
                LOGGER.exception("the fleet's agent failed and begins anew in %g s", AGAIN_S)
            self._session = None
            await asyncio.sleep(AGAIN_S)

    async def say_goodbye(self) -> None:
        """Tell the hub that this end is meant, if it can be told at once."""
        if self._session is not None:
            await self._session.say_goodbye()

    async def _identity(self) -> Identity:
        """Wait until this box is enrolled."""
        told = False
        while (identity := await asyncio.to_thread(self._folder.identity)) is None:
            if not told and self._settings.fleet == "on":
                LOGGER.warning("this box is not enrolled at a hub: `appliance fleet enrol` does that")
            told = True
            await asyncio.sleep(LOOK_S)
        return identity


@asynccontextmanager
async def open_fleet(
    settings: Settings, effective: Sequence[EffectiveSetting], clock: Clock, means: FleetMeans
) -> AsyncIterator[Fleet]:
    """Prepare the agent; `Fleet.run` does the work. Takes no time: nothing is opened, and nobody is called, before."""
    with last_lines() as log:
        yield Fleet(settings, effective, clock, means, log)


def _session_kind() -> type[FleetSession]:
    from appliance.fleet.session import FleetSession  # noqa: PLC0415  (a box without a hub does without its libraries)

    return FleetSession
