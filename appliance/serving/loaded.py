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

from appliance.core.errors import ApplianceError, EngineError, InvalidRequestError, NotFoundError, UnavailableError
from appliance.core.settings import Settings
from appliance.core.types import Health
from appliance.engine.cpu_budget import CpuBudget
from appliance.engine.llama.engine import LlamaEngine
from appliance.observe.metrics import Metrics
from appliance.observe.resources import memory
from appliance.registry.known import RegisteredModel
from appliance.registry.versions import Registry
from appliance.registry.wishes import Wishes
from appliance.serving.purposes import check_writes
from appliance.serving.room import nothing_to_spare
from appliance.serving.route import LoadedModel, Route
from appliance.serving.short_names import ShortNames
from appliance.serving.switching import VersionSwitch
from appliance.serving.text_loader import TextModelLoader
from appliance.serving.text_versions import TextVersions

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
    """Owns every engine of the process.

    Attributes:
        short_names: Which version answers for each.
        versions: The same models, as far as their versions are concerned.
    """

    def __init__(
        self, settings: Settings, registry: Registry, wishes: Wishes, metrics: Metrics, cpu: CpuBudget
    ) -> None:
        """Nothing is loaded until `run` runs.

        Whoever else holds memory that can be spared puts a function into `ask_others` that gives some back, if any.
        """
        self._settings = settings
        self._registry = registry
        self._loader = TextModelLoader(settings, registry, metrics, cpu)
        self._loaded: dict[str, LoadedModel] = {}
        self.short_names = ShortNames(registry)
        self.versions = TextVersions(
            self.short_names, self._loaded, settings.max_loaded_models, self._load, self._unload, self._spare
        )
        self._switch = VersionSwitch(self.versions, wishes)
        self._wishes: dict[str, _Wish] = {}
        self._wake = asyncio.Event()
        self._attempted = False
        self._working = False
        self._problem = "starting"
        self._draining = False
        self._next_sweep = 0.0
        self.ask_others: Callable[[], Awaitable[bool]] = nothing_to_spare

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

    @property
    def loading(self) -> bool:
        """Return True while something may be coming or going."""
        return self._working

    def find(self, name: str) -> LoadedModel:
        """Return the model of that name, or the base of that adapter, if it runs.

        It may be unloaded as soon as the caller awaits anything.

        Raises:
            NotFoundError: No such model, or it is not loaded.
        """
        registered = self.short_names.resolve(name)
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
        while (route := await self._taken(name)) is None:
            pass
        try:
            yield route
        finally:
            route.give_back()
            self._wake.set()

    async def _taken(self, name: str) -> Route | None:
        """Return the route of a name, taken; None if the name has come to mean another version meanwhile."""
        registered = self.short_names.resolve(name)
        check_writes(registered)
        route = self._route(registered)
        if route is not None:
            route.take()
            return route
        try:
            return await self._wish(registered)
        except ApplianceError:
            if self.short_names.resolve(name).full_name == registered.full_name:
                raise
            return None

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
            await self._raise_death()
            if not self._draining:
                await self._switch.follow()
            await self._sweep()
            self._working = False
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(RETRY_MISSING_S):
                    await self._wake.wait()
            self._wake.clear()

    async def spare(self) -> bool:
        """Unload the idle model that was unused for longest, but never that of the settings; False if there is none."""
        return not self._working and await self._spare("")

    async def _spare(self, beside: str) -> bool:
        loaded = [each for name, each in self._loaded.items() if name != beside]
        idle = [each for each in loaded if each.idle and not self._is_default(each)]
        if idle:
            await self._unload(self._most_dispensable(idle))
        return bool(idle) or (beside != "" and await self.ask_others())

    def _is_default(self, model: LoadedModel) -> bool:
        """Return True for the version that the settings' model means, and not for one that is kept for the way back."""
        registered = model.registered
        return self._settings.model in registered.names and registered.full_name not in self._switch.kept

    def _most_dispensable(self, idle: Sequence[LoadedModel]) -> LoadedModel:
        """Return the model to unload first: one kept for the way back, else the one unused for longest."""
        return min(idle, key=lambda each: (each.registered.full_name not in self._switch.kept, each.last_used))

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
            registered = self.short_names.resolve(self._settings.model)
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
            model = self._loaded.get(wanted.base_name) or await self._load_for_request(wanted)
        except ApplianceError as error:
            self._report(str(error))
            _refuse(wish, error)
            self._wake.set()  # what the name means now may be another version
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

    async def _load_for_request(self, wanted: RegisteredModel) -> LoadedModel:
        """Load a model beside the others, or in place of an idle one."""
        registered = self._registry.resolve(wanted.base_name)
        if (refusal := self._switch.refusal(registered.full_name)) is not None:
            raise refusal
        try:
            await self._make_room(registered)
            self._problem = f"Loading {registered.full_name}."
            return await self._load(registered)
        except ApplianceError as error:
            await self._switch.load_failed(registered, error)
            raise

    async def _load(self, registered: RegisteredModel) -> LoadedModel:
        model = await self._loader.load(registered)
        model.engine.ended.add_done_callback(lambda _: self._wake.set())
        self._loaded[registered.full_name] = model
        self.short_names.loaded(registered)
        return model

    async def _make_room(self, registered: RegisteredModel) -> None:
        """Unload idle models, longest unused first, until the number and the memory allow one more.

        Raises:
            UnavailableError: Those that are loaded are busy, or the memory does not suffice even without them.
        """
        while len(self._loaded) >= self._settings.max_loaded_models or self._lacks_memory(registered):
            idle = [each for each in self._loaded.values() if each.idle]
            if idle:
                await self._unload(self._most_dispensable(idle))
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
        self.short_names.unloaded(model.registered)
        self._switch.forget(name)
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
        for model in with_adapters:
            await model.adapters.sweep(self._registry.known().models, now - self._settings.adapter_idle_s)

    async def _raise_death(self) -> None:
        for name, model in self._loaded.items():
            if model.engine.ended.done():
                error = model.engine.ended.result()
                death = EngineError(f"The engine of {name} ended: {error}", code="engine_died")
                await self._switch.load_failed(model.registered, death)
                raise death from error

    def wake(self) -> None:
        """Compare wish and fact at once."""
        self._wake.set()


def _refuse(wish: _Wish, error: ApplianceError) -> None:
    for answer in wish.answers:
        if not answer.done():
            answer.set_exception(error)
