"""Which models embed: each is loaded by the first request for it, and makes room when it is idle.

Embedders are counted apart from the models that write text, so that neither kind drops the other: a box that answers
from retrieved passages needs both for every question. A model that is loaded for text already lends its weights.

A load is part of the request that needs it, one at a time; if its client leaves, the next one who waits starts anew. An
embedder that dies takes the process down: systemd starts it afresh.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from appliance.core.errors import ApplianceError, EngineError, UnavailableError
from appliance.core.settings import Settings
from appliance.core.types import Health
from appliance.engine.cpu_budget import CpuBudget
from appliance.engine.llama_embedding.engine import LlamaEmbedder
from appliance.observe.metrics import Metrics
from appliance.observe.resources import memory
from appliance.registry.known import RegisteredModel
from appliance.registry.versions import Registry
from appliance.registry.wishes import Wishes
from appliance.serving.engine_config import embedding_config
from appliance.serving.loaded import RETRY_AFTER_S, LoadedModels
from appliance.serving.purposes import check_embeds
from appliance.serving.room import nothing_to_spare
from appliance.serving.short_names import ShortNames
from appliance.serving.soak import Record, recorded
from appliance.serving.switching import VersionSwitch
from appliance.store.locks import Hold

LOGGER = logging.getLogger("appliance.serving")
LOOK_S = 2.0
"""How often it is looked whether another version is wished for."""


@dataclass(eq=False, slots=True)
class LoadedEmbedder:
    """One model that embeds.

    Attributes:
        leases: Requests between being routed here and being answered.
        record: What became of its requests.
    """

    registered: RegisteredModel
    engine: LlamaEmbedder
    hold: Hold
    last_used: float = 0.0
    leases: int = 0
    record: Record = field(default_factory=Record)


class LoadedEmbedders:
    """Owns every embedder of the process; its public methods further down are those of a `switching.Loader`."""

    def __init__(  # noqa: PLR0917
        self,
        settings: Settings,
        registry: Registry,
        wishes: Wishes,
        metrics: Metrics,
        models: LoadedModels,
        cpu: CpuBudget,
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
        self._short_names = ShortNames(registry)
        self._switch = VersionSwitch(self, wishes)
        self._loading = asyncio.Lock()
        self._wake = asyncio.Event()
        self._draining = False
        self.ask_others: Callable[[], Awaitable[bool]] = nothing_to_spare

    @property
    def names(self) -> frozenset[str]:
        """Return the full names of the models that embed now."""
        return frozenset(self._loaded)

    @property
    def loading(self) -> bool:
        """Return True while something may be coming or going."""
        return self._loading.locked()

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
            with recorded(model.record, asyncio.get_running_loop().time):
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
                    death = EngineError(f"The embedder of {name} ended: {error}", code="engine_died")
                    await self._switch.load_failed(model.registered, death)
                    raise death from error
            if not self._draining:
                async with self._loading:
                    await self._switch.follow()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(LOOK_S):
                    await self._wake.wait()
            self._wake.clear()

    async def spare(self) -> bool:
        """Unload the idle embedder that was unused for longest; return False if there is none."""
        return await self._spare("")

    async def _spare(self, beside: str) -> bool:
        idle = [each for name, each in self._loaded.items() if each.leases == 0 and name != beside]
        if not idle:
            return False
        kept = self._switch.kept
        await self._unload(min(idle, key=lambda each: (each.registered.full_name not in kept, each.last_used)))
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
            if (model := self._loaded.get(registered.full_name)) is not None:
                return model
            if (refusal := self._switch.refusal(registered.full_name)) is not None:
                raise refusal
            try:
                await self._make_room(registered)
                return await self._load(registered)
            except ApplianceError as error:
                await self._switch.load_failed(registered, error)
                raise

    async def _load(self, registered: RegisteredModel) -> LoadedEmbedder:
        name, settings = registered.full_name, self._settings
        LOGGER.info("loading %s for embeddings", name)
        hold = self._registry.hold(registered)
        try:
            engine = await LlamaEmbedder.load(
                name,
                registered.files[0].path,
                embedding_config(settings, registered),
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
        self._short_names.loaded(registered)
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
        self._short_names.unloaded(model.registered)
        self._switch.forget(model.registered.full_name)
        try:
            await model.engine.close()
        finally:
            model.hold.close()
        LOGGER.info("unloaded %s for embeddings", model.registered.full_name)

    # Versions: see `switching.Loader`

    @property
    def short_names(self) -> ShortNames:
        """Return which version answers for each."""
        return self._short_names

    def wake(self) -> None:
        """Compare wish and fact at once."""
        self._wake.set()

    def takes(self, registered: RegisteredModel) -> bool:
        """Return True if it can embed here."""
        return registered.kind == "gguf"

    def is_home_of(self, registered: RegisteredModel) -> bool:
        """Return True if embedding is all that it is for."""
        return registered.kind == "gguf" and registered.task == "embedding"

    def find_loaded(self, full_name: str) -> RegisteredModel | None:
        """Return the model if it is loaded."""
        model = self._loaded.get(full_name)
        return None if model is None else model.registered

    def record(self, full_name: str) -> Record | None:
        """Return what became of its requests, or None if it is not loaded."""
        model = self._loaded.get(full_name)
        return None if model is None else model.record

    def has_place(self) -> bool:
        """Return True if one more may be loaded without another making room."""
        return len(self._loaded) < self._settings.max_loaded_embedders

    def is_unused(self, full_name: str, since: float) -> bool:
        """Return True if unloading it hurts nobody, and no request has come for it since that time of the loop."""
        model = self._loaded[full_name]
        return model.leases == 0 and model.last_used <= since

    async def spare_beside(self, full_name: str) -> bool:
        """Unload something idle, but not this model; return False if there is nothing."""
        return await self._spare(full_name) or await self.ask_others()

    async def load_version(self, registered: RegisteredModel) -> None:
        """Load it beside what is loaded; nothing is unloaded for it."""
        await self._load(registered)

    async def unload_version(self, full_name: str) -> None:
        """Unload it."""
        await self._unload(self._loaded[full_name])
