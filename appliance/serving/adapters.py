"""The LoRA adapters that are loaded beside one model: on demand, at most so many, idle ones making room.

An adapter's file is held only while a request uses it, since the engine keeps a copy of its own. So an idle adapter can
be removed from the registry at any time, and is then dropped here; one in use cannot.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Collection
from dataclasses import dataclass

from appliance.core.errors import UnavailableError
from appliance.engine.llama.engine import LlamaEngine
from appliance.engine.llama.lora import Adapter
from appliance.observe.metrics import Metrics
from appliance.observe.resources import memory
from appliance.registry.known import RegisteredModel
from appliance.registry.versions import Registry
from appliance.store.locks import Hold

LOGGER = logging.getLogger("appliance.serving")
RETRY_AFTER_S = 5.0


@dataclass(eq=False, slots=True)
class LoadedAdapter:
    """One adapter that requests can use.

    Attributes:
        users: Requests from being routed here to their end.
        last_used: The loop's time of the last change of `users`.
        hold: Keeps the file from removal while there are users.
    """

    registered: RegisteredModel
    adapter: Adapter
    last_used: float
    users: int = 0
    hold: Hold | None = None


class ModelAdapters:
    """Owns the adapters of one engine."""

    def __init__(self, engine: LlamaEngine, registry: Registry, metrics: Metrics, most: int) -> None:
        """Start without any; at most `most` are loaded at once."""
        self._engine = engine
        self._registry = registry
        self._metrics = metrics
        self._most = most
        self._loaded: dict[str, LoadedAdapter] = {}

    @property
    def names(self) -> Collection[str]:
        """Return the full names of the adapters that are loaded."""
        return self._loaded.keys()

    def find(self, registered: RegisteredModel) -> LoadedAdapter | None:
        """Return the adapter if it is loaded, from the very file that is registered."""
        loaded = self._loaded.get(registered.full_name)
        return loaded if loaded is not None and loaded.registered.files == registered.files else None

    def take(self, loaded: LoadedAdapter, now: float) -> None:
        """Count one more user.

        Raises:
            NotFoundError: It has been removed meanwhile.
            ConflictError: It is being removed just now.
        """
        if loaded.hold is None:
            loaded.hold = self._registry.hold(loaded.registered)
        loaded.users += 1
        loaded.last_used = now

    def release(self, loaded: LoadedAdapter, now: float) -> None:
        """Count one user less; after the last one the file may be removed."""
        loaded.users -= 1
        loaded.last_used = now
        if not loaded.users and loaded.hold is not None:
            loaded.hold.close()
            loaded.hold = None

    async def load(self, registered: RegisteredModel) -> LoadedAdapter:
        """Load an adapter, unless it is loaded; idle ones make room for it.

        Raises:
            NotFoundError: It has been removed meanwhile.
            UnavailableError: Too many others are in use, or the memory does not suffice.
            ModelFileError: llama.cpp refuses the file.
            EngineError: Its answers are not numbers, or the engine has ended.
        """
        if (loaded := self.find(registered)) is not None:
            return loaded
        if (former := self._loaded.get(registered.full_name)) is not None:
            await self._drop(former)
        await self._make_room(registered)
        (file,) = registered.files
        adapter = Adapter(file.sha256, registered.full_name, file.path, self._metrics.for_model(registered.full_name))
        with self._registry.hold(registered):
            await self._engine.load_adapter(adapter)
        loaded = LoadedAdapter(registered, adapter, last_used=asyncio.get_running_loop().time())
        self._loaded[registered.full_name] = loaded
        LOGGER.info("loaded the adapter %s", registered.full_name)
        return loaded

    async def sweep(self, registered: Collection[RegisteredModel], oldest: float) -> None:
        """Drop the idle ones that are not registered any more or were last used before the time `oldest`."""
        for loaded in [each for each in self._loaded.values() if not each.users]:
            if loaded.registered not in registered or loaded.last_used < oldest:
                await self._drop(loaded)

    def close(self) -> None:
        """Let go of the files; the engine frees the adapters with itself."""
        for loaded in self._loaded.values():
            if loaded.hold is not None:
                loaded.hold.close()
                loaded.hold = None
        self._loaded.clear()

    async def _make_room(self, registered: RegisteredModel) -> None:
        while len(self._loaded) >= self._most or memory().available < registered.minimum_memory:
            idle = [each for each in self._loaded.values() if not each.users]
            if idle:
                await self._drop(min(idle, key=lambda each: each.last_used))
                continue
            if len(self._loaded) >= self._most:
                raise UnavailableError(
                    f"{registered.full_name} cannot be loaded now: {', '.join(self._loaded)} are in use.",
                    advice="Try again later, or raise `max_loaded_adapters` if the memory allows.",
                    retry_after_s=RETRY_AFTER_S,
                )
            raise UnavailableError(
                f"{registered.full_name} needs {registered.minimum_memory / 2**20:.1f} MiB of memory; "
                f"{memory().available / 2**20:.1f} MiB are free.",
                advice="Stop other programs, or choose a smaller adapter.",
                code="not_enough_memory",
                retry_after_s=RETRY_AFTER_S,
            )

    async def _drop(self, loaded: LoadedAdapter) -> None:
        """Free an idle adapter, but its memory only if no other name means the same file."""
        del self._loaded[loaded.registered.full_name]
        if all(each.adapter.id != loaded.adapter.id for each in self._loaded.values()):
            await self._engine.drop_adapter(loaded.adapter.id)
        LOGGER.info("dropped the adapter %s", loaded.registered.full_name)
