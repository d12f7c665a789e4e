"""Which models embed: each is loaded by the first request for it, and makes room when it is idle.

Embedders are counted apart from the models that write text, so that neither kind drops the other: a box that answers
from retrieved passages needs both for every question. A model that is loaded for text already lends its weights.

A load is part of the request that needs it, one at a time; if its client leaves, the next one who waits starts anew. An
embedder that dies takes the process down: systemd starts it afresh.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass

from appliance.core.errors import EngineError, UnavailableError
from appliance.core.settings import Settings
from appliance.core.types import Health
from appliance.engine.cpu_budget import CpuBudget
from appliance.engine.llama_embedding.engine import LlamaEmbedder
from appliance.engine.llama_embedding.worker import EmbeddingConfig
from appliance.observe.metrics import Metrics
from appliance.observe.resources import memory, physical_cores
from appliance.registry.versions import RegisteredModel, Registry
from appliance.serving.loaded import RETRY_AFTER_S, LoadedModels
from appliance.serving.purposes import check_embeds
from appliance.serving.room import nothing_to_spare
from appliance.store.locks import Hold

LOGGER = logging.getLogger("appliance.serving")


@dataclass(eq=False, slots=True)
class LoadedEmbedder:
    """One model that embeds.

    Attributes:
        leases: Requests between being routed here and being answered.
    """

    registered: RegisteredModel
    engine: LlamaEmbedder
    hold: Hold
    last_used: float = 0.0
    leases: int = 0


class LoadedEmbedders:
    """Owns every embedder of the process."""

    def __init__(
        self, settings: Settings, registry: Registry, metrics: Metrics, models: LoadedModels, cpu: CpuBudget
    ) -> None:
        """Nothing is loaded yet; weights are borrowed from `models` where they are.

        Whoever else holds memory that can be spared puts a function into `ask_others` that gives some back, if any.
        """
        self._settings = settings
        self._registry = registry
        self._metrics = metrics
        self._models = models
        self._cpu = cpu
        self._loaded: dict[str, LoadedEmbedder] = {}
        self._loading = asyncio.Lock()
        self._wake = asyncio.Event()
        self._draining = False
        self.ask_others: Callable[[], Awaitable[bool]] = nothing_to_spare

    @property
    def names(self) -> frozenset[str]:
        """Return the full names of the models that embed now."""
        return frozenset(self._loaded)

    @asynccontextmanager
    async def lease(self, name: str) -> AsyncIterator[LoadedEmbedder]:
        """Route a request: yield the embedder of that name, loading it first if need be; it stays until the end.

        Raises:
            NotFoundError: No such model; the message names those that exist.
            InvalidRequestError: The model is for something else.
            UnavailableError: It cannot be loaded now.
            ModelFileError: Its file is damaged, or makes no embeddings.
        """
        registered = self._registry.resolve(name)
        check_embeds(registered)
        model = self._loaded.get(registered.full_name) or await self._find_or_load(registered)
        model.leases += 1
        model.last_used = asyncio.get_running_loop().time()
        try:
            yield model
        finally:
            model.leases -= 1

    async def run(self) -> None:
        """Watch the embedders, until cancelled.

        Raises:
            EngineError: One died; nothing here can mend that.
        """
        while True:
            for name, model in self._loaded.items():
                if model.engine.ended.done():
                    error = model.engine.ended.result()
                    raise EngineError(f"The embedder of {name} ended: {error}", code="engine_died") from error
            await self._wake.wait()
            self._wake.clear()

    async def spare(self) -> bool:
        """Unload the idle embedder that was unused for longest; return False if there is none."""
        idle = [each for each in self._loaded.values() if each.leases == 0]
        if not idle:
            return False
        await self._unload(min(idle, key=lambda each: each.last_used))
        return True

    def drain(self) -> None:
        """Load nothing any more: the process is about to stop."""
        self._draining = True

    async def close(self) -> None:
        """Unload everything; open requests end with an error."""
        self.drain()
        async with self._loading:
            while self._loaded:
                await self._unload(next(iter(self._loaded.values())))

    # State

    def health(self) -> Health:
        """Return readiness as of the embedders' last heartbeats; nothing needs to be loaded for it."""
        if stalled := self.stalled:
            return Health(ready=False, reason=f"The embedder of {', '.join(stalled)} does not answer.")
        if full := [name for name, model in self._loaded.items() if model.engine.queue_full]:
            return Health(ready=False, reason=f"The queue for embeddings of {', '.join(full)} is full.")
        return Health(ready=True)

    @property
    def stalled(self) -> list[str]:
        """Return the models whose thread has ended or has not gone round for too long."""
        limit = self._settings.stalled_engine_s
        return [name for name, model in self._loaded.items() if model.engine.heartbeat_age_s > limit]

    # Loading

    async def _find_or_load(self, registered: RegisteredModel) -> LoadedEmbedder:
        async with self._loading:
            if self._draining:
                raise UnavailableError("The server is stopping.", retry_after_s=RETRY_AFTER_S)
            return self._loaded.get(registered.full_name) or await self._load(registered)

    async def _load(self, registered: RegisteredModel) -> LoadedEmbedder:
        name, settings = registered.full_name, self._settings
        await self._make_room(registered)
        LOGGER.info("loading %s for embeddings", name)
        hold = self._registry.hold(registered)
        try:
            engine = await LlamaEmbedder.load(
                name,
                registered.files[0].path,
                EmbeddingConfig(
                    longest_input=min(settings.max_embedding_tokens, registered.default_context or 2**31),
                    batch_tokens=settings.batch_tokens,
                    threads=settings.threads or physical_cores(),
                    queue_size=settings.queue_size,
                    flash_attention=settings.flash_attention,
                ),
                self._metrics.for_embedder(name),
                gpu_layers=settings.gpu_layers,
                shared=self._models.find(name).engine.share_model() if name in self._models.names else None,
                cpu=self._cpu,
            )
        except BaseException:
            hold.close()
            raise
        engine.ended.add_done_callback(lambda _: self._wake.set())
        self._loaded[name] = model = LoadedEmbedder(registered, engine, hold, asyncio.get_running_loop().time())
        LOGGER.info(
            "loaded %s for embeddings of up to %d tokens, pooled by %s", name, engine.longest_input, engine.pooling
        )
        return model

    async def _make_room(self, registered: RegisteredModel) -> None:
        """Unload idle embedders until the number and the memory allow one more.

        Raises:
            UnavailableError: Those that are loaded are busy, or the memory does not suffice even without them.
        """
        while (full := len(self._loaded) >= self._settings.max_loaded_embedders) or self._lacks_memory(registered):
            if await self.spare() or (not full and await self.ask_others()):
                continue
            if full:
                raise UnavailableError(
                    f"{registered.full_name} cannot be loaded now: {', '.join(self._loaded)} is busy.",
                    advice="Try again later, or raise `max_loaded_embedders` if the memory allows.",
                    retry_after_s=RETRY_AFTER_S,
                )
            raise UnavailableError(
                f"{registered.full_name} needs {registered.minimum_memory / 2**20:.0f} MiB of memory; "
                f"{memory().available / 2**20:.0f} MiB are free.",
                advice="Stop other programs, or choose a smaller model.",
                code="not_enough_memory",
                retry_after_s=RETRY_AFTER_S,
            )

    def _lacks_memory(self, registered: RegisteredModel) -> bool:
        return registered.full_name not in self._models.names and memory().available < registered.minimum_memory

    async def _unload(self, model: LoadedEmbedder) -> None:
        del self._loaded[model.registered.full_name]
        try:
            await model.engine.close()
        finally:
            model.hold.close()
        LOGGER.info("unloaded %s for embeddings", model.registered.full_name)
