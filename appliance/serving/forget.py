"""Deleted text leaves the models' memory: parked KV states and idle slots are forgotten, of loaded models and others.

A state knows the session whose text it holds. Models that are loaded forget for themselves; the files of the others are
found by their heads. Whoever still works with text that he read before it was deleted goes on, but leaves nothing.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Collection

from appliance.core.errors import EngineError
from appliance.core.settings import Settings
from appliance.core.types import Session
from appliance.engine.llama.state_files import erase_sessions
from appliance.serving.loaded import LoadedModels

LOGGER = logging.getLogger("appliance.serving")

RETRY_S = 0.25
"""Time between looks at a folder that somebody has, a model that is loading, say."""

REMEMBERED_S = 86_400.0
"""How long it is remembered that a session was forgotten; no request takes as long."""


class SessionMemory:
    """What the models hold of sessions. Runs on the event loop."""

    def __init__(self, settings: Settings, models: LoadedModels) -> None:
        """Forget in these models and in the folder of parked states."""
        self._folder = settings.parking_dir
        self._models = models
        self._forgotten: dict[str, float] = {}

    def keeps(self, session: Session) -> bool:
        """Return whether a session's text, as it was read, may outlive the request: it was not deleted since."""
        return session.as_of > self._forgotten.get(session.id, float("-inf"))

    async def forget(self, sessions: Collection[str]) -> None:
        """Forget sessions; see `core.types.TextModels.forget`."""
        now = time.monotonic()
        self._forgotten = {each: at for each, at in self._forgotten.items() if at > now - REMEMBERED_S}
        self._forgotten |= dict.fromkeys(sessions, now)
        told = False
        while not await self._erase(sessions):
            if not told:
                told = True
                LOGGER.info("deleted conversations leave the folder of parked states once whoever has it lets it go")
            await asyncio.sleep(RETRY_S)

    async def _erase(self, sessions: Collection[str]) -> bool:
        """Forget in the models that are loaded now, and in the folders of the others; False if that was not all."""
        done = set()
        for engine in self._models.engines:
            try:
                await engine.forget(sessions)
            except EngineError as error:
                LOGGER.info("%s is unloaded while it forgets: %s", engine.name, error)
            else:
                done.add(engine.states_folder)
        return await asyncio.to_thread(erase_sessions, self._folder, sessions, skip=done)
