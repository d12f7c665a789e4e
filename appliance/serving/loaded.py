"""Which models run, against which are wanted: the wish and the fact.

A request or the start of the process only writes a wish. One task, `LoadedModels.run`, compares wishes with what runs,
loads what is missing and unloads what is idle to make room. An adapter is loaded beside its base model. A load that
fails answers those who wait for it and leaves everything else as it was. An engine that dies takes the process down:
systemd starts it afresh.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from appliance.core.errors import (
    ApplianceError,
    ConflictError,
    EngineError,
    InvalidRequestError,
    ModelFileError,
    NotFoundError,
    StorageError,
    UnavailableError,
)
from appliance.core.settings import Settings
from appliance.core.types import Health
from appliance.engine.cpu_budget import CpuBudget
from appliance.engine.llama.engine import LlamaEngine
from appliance.engine.llama.state_files import remove_foreign
from appliance.observe.metrics import Metrics
from appliance.observe.resources import memory
from appliance.registry.versions import RegisteredModel, Registry
from appliance.serving.adapters import ModelAdapters
from appliance.serving.engine_config import engine_config, model_tools, renderer
from appliance.serving.purposes import check_writes
from appliance.serving.room import nothing_to_spare
from appliance.serving.route import LoadedModel, Route

LOGGER = logging.getLogger("appliance.serving")
RETRY_MISSING_S = 2.0
"""How often the model that should run is looked for again while it is missing: it may have been pulled meanwhile."""
RETRY_AFTER_S = 5.0
SWEEP_S = 2.0
"""How often idle adapters are looked through for those that can be dropped."""


@dataclass(eq=False, slots=True)
class _Wish:
    model: RegisteredModel
    answers: list[asyncio.Future[Route]] = field(default_factory=list)


class LoadedModels:
    """Owns every engine of the process."""

    def __init__(self, settings: Settings, registry: Registry, metrics: Metrics, cpu: CpuBudget) -> None:
        """Nothing is loaded until `run` runs.

        Whoever else holds memory that can be spared puts a function into `ask_others` that gives some back, if any.
        """
        self._settings = settings
        self._registry = registry
        self._metrics = metrics
        self._cpu = cpu
        self._loaded: dict[str, LoadedModel] = {}
        self._wishes: dict[str, _Wish] = {}
        self._wake = asyncio.Event()
        self._attempted = False
        self._working = False
        self._problem = "starting"
        self._draining = False
        self.ask_others: Callable[[], Awaitable[bool]] = nothing_to_spare
        self._next_sweep = 0.0

    @property
    def names(self) -> frozenset[str]:
        """Return the full names of the models that run, and of the adapters that are loaded beside them."""
        return frozenset(self._loaded).union(*(each.adapters.names for each in self._loaded.values()))

    @property
    def engines(self) -> Sequence[LlamaEngine]:
        """Return the engines of the models that run."""
        return [each.engine for each in self._loaded.values()]

    @property
    def idle(self) -> bool:
        """Return True if no request is open, and no model is being loaded for one."""
        return not self._working and all(each.idle for each in self._loaded.values())

    def find(self, name: str) -> LoadedModel:
        """Return the model of that name, or the base of that adapter, if it runs.

        It may be unloaded as soon as the caller awaits anything.

        Raises:
            NotFoundError: No such model, or it is not loaded.
        """
        registered = self._registry.resolve(name)
        model = self._loaded.get(registered.base_name)
        if model is None:
            raise NotFoundError(
                f"The model {registered.full_name} is not loaded; loaded are: {', '.join(self._loaded) or 'none'}.",
                advice="The first request for it loads it.",
                code="model_not_loaded",
                param="model",
            )
        return model

    @asynccontextmanager
    async def lease(self, name: str) -> AsyncIterator[Route]:
        """Route a request: yield the loaded model or adapter of that name, loading it first if need be.

        It stays loaded at least until the lease ends; after that, for as long as the engine has open requests.

        Raises:
            NotFoundError: No such model; the message names those that exist.
            UnavailableError: It cannot be loaded now.
            ModelFileError: Its file is damaged.
        """
        registered = self._registry.resolve(name)
        check_writes(registered)
        route = self._route(registered)
        if route is None:
            route = await self._wish(registered)
        else:
            route.take()
        try:
            yield route
        finally:
            route.give_back()
            self._wake.set()

    async def unload(self, name: str) -> None:
        """Unload a model that nobody uses; one that is not loaded stays so.

        Raises:
            NotFoundError: No such model.
            ConflictError: It is in use, or it is the settings' model, which would only be loaded again.
        """
        model = self._loaded.get(self._registry.resolve(name).base_name)
        if model is None:
            return
        full_name = model.registered.full_name
        if self._settings.model in model.registered.names:
            raise ConflictError(f"{full_name} is the model of the setting `model`, which stays loaded.")
        if self._working or not model.idle:
            raise ConflictError(f"{full_name} is in use.", advice="Try again when its requests have ended.")
        await self._unload(model)

    def _route(self, registered: RegisteredModel) -> Route | None:
        model = self._loaded.get(registered.base_name)
        adapter = model.adapters.find(registered) if model is not None else None
        if model is None or (registered.adapter and adapter is None):
            return None
        return Route(model, adapter)

    async def run(self) -> None:
        """Bring the facts to the wishes, until cancelled.

        Raises:
            EngineError: An engine died; nothing here can mend that.
        """
        while True:
            self._working = True  # what is loaded is in use here: nobody else may unload it
            await self._load_default()
            while self._wishes:
                name, wish = next(iter(self._wishes.items()))
                await self._grant(wish)
                del self._wishes[name]
            self._attempted = True
            self._raise_death()
            await self._sweep()
            self._working = False
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(RETRY_MISSING_S):
                    await self._wake.wait()
            self._wake.clear()

    async def spare(self) -> bool:
        """Unload the idle model that was unused for longest, but never that of the settings; False if there is none."""
        others = [each for each in self._loaded.values() if self._settings.model not in each.registered.names]
        idle = [each for each in others if each.idle]
        if self._working or not idle:
            return False
        await self._unload(min(idle, key=lambda each: each.last_used))
        return True

    @property
    def attempted(self) -> bool:
        """Return True once the model of the settings has been loaded or has failed to."""
        return self._attempted

    def drain(self) -> None:
        """Turn readiness red and load the settings' model no more: the process is about to stop."""
        self._draining = True

    async def close(self) -> None:
        """Unload everything; open requests end with an error."""
        for wish in self._wishes.values():
            _refuse(wish, UnavailableError("The server is stopping.", retry_after_s=RETRY_AFTER_S))
        while self._loaded:
            await self._unload(next(iter(self._loaded.values())))

    # State

    def health(self) -> Health:
        """Return readiness as of the engines' last heartbeats."""
        if self._draining:
            return Health(ready=False, reason="The server is stopping.")
        if stalled := self.stalled:
            return Health(ready=False, reason=f"The engine of {', '.join(stalled)} does not answer.")
        full = [name for name, model in self._loaded.items() if model.engine.queue_full]
        if full:
            return Health(ready=False, reason=f"The queue of {', '.join(full)} is full.")
        if self._problem and (self._settings.model or not self._attempted):
            return Health(ready=False, reason=self._problem)
        return Health(ready=True)

    @property
    def stalled(self) -> list[str]:
        """Return the models whose thread has ended or has not gone round for too long."""
        limit = self._settings.stalled_engine_s
        return [name for name, model in self._loaded.items() if model.engine.heartbeat_age_s > limit]

    # Wish

    async def _wish(self, registered: RegisteredModel) -> Route:
        """Wait until it is loaded; the route is taken then, so that it is not unloaded before it is used."""
        if self._draining:
            raise UnavailableError("The server is stopping.", retry_after_s=RETRY_AFTER_S)
        wish = self._wishes.setdefault(registered.full_name, _Wish(registered))
        answer: asyncio.Future[Route] = asyncio.get_running_loop().create_future()
        wish.answers.append(answer)
        self._wake.set()
        try:
            return await answer
        except asyncio.CancelledError:
            if answer.done() and not answer.cancelled() and answer.exception() is None:
                answer.result().give_back()
            raise

    async def _load_default(self) -> None:
        """Wish for the model of the settings for as long as it does not run and the process is not about to stop."""
        if self._draining:
            return  # `close` unloads it, and would have to wait for its successor too
        if not self._settings.model:
            self._problem = ""
            return
        try:
            registered = self._registry.resolve(self._settings.model)
            check_writes(registered)
        except InvalidRequestError as error:
            self._report(str(error))
            return
        except ApplianceError as error:
            self._report(f"{error} Pull it with `appliance models pull {self._settings.model}`.")
            return
        if registered.base_name in self._loaded:
            self._problem = ""
        elif not self._attempted or not self._loaded:
            self._wishes.setdefault(registered.full_name, _Wish(registered))

    def _report(self, problem: str) -> None:
        if problem != self._problem:
            LOGGER.warning("not ready: %s", problem)
        self._problem = problem

    # Fact

    async def _grant(self, wish: _Wish) -> None:
        wanted = wish.model
        try:
            model = self._loaded.get(wanted.base_name)
            if model is None:
                model = await self._load(self._registry.resolve(wanted.base_name))
        except ApplianceError as error:
            self._report(str(error))
            _refuse(wish, error)
            return
        self._problem = ""
        try:
            adapter = await model.adapters.load(wanted) if wanted.adapter else None
            for answer in wish.answers:
                if not answer.done():
                    route = Route(model, adapter)
                    route.take()
                    answer.set_result(route)
        except ApplianceError as error:
            LOGGER.warning("%s is not loaded: %s", wanted.full_name, error)
            _refuse(wish, error)

    async def _load(self, registered: RegisteredModel) -> LoadedModel:
        """Load one model beside the others, or in place of an idle one."""
        await self._make_room(registered)
        self._problem = f"Loading {registered.full_name}."
        LOGGER.info("loading %s", registered.full_name)
        await self._remove_foreign_states()
        hold = self._registry.hold(registered)
        try:
            engine = await LlamaEngine.load(
                registered.full_name,
                registered.files[0].path,
                engine_config(self._settings, registered),
                self._metrics.for_model(registered.full_name),
                self._cpu,
            )
        except BaseException:
            hold.close()
            raise
        engine.ended.add_done_callback(lambda _: self._wake.set())
        adapters = ModelAdapters(engine, self._registry, self._metrics, self._settings.max_loaded_adapters)
        tools = await model_tools(registered, engine)
        model = LoadedModel(registered, engine, renderer(self._settings, registered, engine), tools, hold, adapters)
        if model.renderer is not None:
            try:
                await model.renderer.start()
            except (ModelFileError, UnavailableError) as error:  # it is raised again at the first chat request
                LOGGER.warning("%s serves completions only: %s", registered.full_name, error)
        model.last_used = asyncio.get_running_loop().time()
        self._loaded[registered.full_name] = model
        LOGGER.info("loaded %s with %d KV cells", registered.full_name, engine.config.cells)
        return model

    async def _remove_foreign_states(self) -> None:
        """Delete the parked conversations of models and settings that are no more."""
        models = [each for each in self._registry.list() if each.kind == "gguf"]
        keep = {engine_config(self._settings, each).origin.fingerprint for each in models}
        try:
            await asyncio.to_thread(remove_foreign, self._settings.parking_dir, keep)
        except StorageError as error:  # it costs the room on disk and nothing else
            LOGGER.warning("parked conversations of other models stay: %s", error)

    async def _make_room(self, registered: RegisteredModel) -> None:
        """Unload idle models, longest unused first, until the number and the memory allow one more.

        Raises:
            UnavailableError: Those that are loaded are busy, or the memory does not suffice even without them.
        """
        while len(self._loaded) >= self._settings.max_loaded_models or self._lacks_memory(registered):
            idle = [each for each in self._loaded.values() if each.idle]
            if idle:
                await self._unload(min(idle, key=lambda each: each.last_used))
                continue
            if self._lacks_memory(registered) and await self.ask_others():
                continue
            if self._loaded:
                raise UnavailableError(
                    f"{registered.full_name} cannot be loaded now: {', '.join(self._loaded)} is busy.",
                    advice="Try again later, or raise `max_loaded_models` if the memory allows.",
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
        return memory().available < registered.minimum_memory

    async def _unload(self, model: LoadedModel) -> None:
        name = model.registered.full_name
        del self._loaded[name]
        try:
            if model.renderer is not None:
                await model.renderer.close()
            await model.engine.close()
        finally:
            model.adapters.close()
            model.hold.close()
        LOGGER.info("unloaded %s", name)

    async def _sweep(self) -> None:
        """Drop adapters that are idle for too long or not registered any more."""
        now = asyncio.get_running_loop().time()
        with_adapters = [each for each in self._loaded.values() if each.adapters.names]
        if now < self._next_sweep or not with_adapters:
            return
        self._next_sweep = now + SWEEP_S
        known = {each.full_name: each for each in self._registry.list()}
        for model in with_adapters:
            await model.adapters.sweep(known, now - self._settings.adapter_idle_s)

    def _raise_death(self) -> None:
        for name, model in self._loaded.items():
            if model.engine.ended.done():
                error = model.engine.ended.result()
                raise EngineError(f"The engine of {name} ended: {error}", code="engine_died") from error


def _refuse(wish: _Wish, error: ApplianceError) -> None:
    for answer in wish.answers:
        if not answer.done():
            answer.set_exception(error)
