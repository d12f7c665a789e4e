"""Which ONNX models are loaded: each by the first request for it, and it makes room when it is idle.

A model is loaded once, whatever it is for: an encoder's one session answers tensors and texts. As for the models that
write text there is the wish and the fact: a request or the repository's doors only write down what should be loaded or
unloaded, and one task, `LoadedTensorModels.run`, does it, so that nobody who leaves takes a load from the others who
wait for it. Loads of different models run beside each other; each finds its room first, one after the other.

A session's thread that dies takes only its own model down: what it was asked has been answered, its session is given up
with it, and a later request loads the model afresh, after a rest. A thread that hangs is another matter, since nothing
ends native code: it turns readiness red, and systemd starts the process afresh.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Literal

from appliance.core.errors import ApplianceError, EngineError, UnavailableError
from appliance.core.settings import Settings
from appliance.core.types import Health
from appliance.observe.resources import memory
from appliance.registry.known import RegisteredModel
from appliance.registry.versions import Registry
from appliance.registry.wishes import Wishes
from appliance.serving.loaded import RETRY_AFTER_S
from appliance.serving.room import nothing_to_spare
from appliance.serving.short_names import ShortNames
from appliance.serving.soak import recorded
from appliance.serving.switching import VersionSwitch
from appliance.serving.tensor_loader import LoadedTensorModel, TensorModelLoader
from appliance.serving.tensor_loads import Load, waited_for
from appliance.serving.tensor_versions import TensorVersions

LOGGER = logging.getLogger("appliance.serving")
LOOK_S = 2.0
"""How often it is looked whether another version is wished for."""
UNLOAD_WAIT_S = 30.0
"""How long one who needs room waits for an idle model's thread to end."""

State = Literal["READY", "LOADING", "UNLOADING", "UNAVAILABLE"]


@dataclass(frozen=True, slots=True)
class _Rest:
    """Why a model whose thread died is not loaded, and until when, in the loop's time."""

    reason: str
    until: float


class LoadedTensorModels:
    """Owns every ONNX session of the process.

    Attributes:
        short_names: Which version answers for each.
        versions: The same models, as far as their versions are concerned.
    """

    def __init__(self, settings: Settings, registry: Registry, wishes: Wishes, loader: TensorModelLoader) -> None:
        """Nothing is loaded until `run` runs.

        Whoever else holds memory that can be spared puts a function into `ask_others` that gives some back, if any.
        """
        self._settings = settings
        self._loader = loader
        self._loaded: dict[str, LoadedTensorModel] = {}
        self.short_names = ShortNames(registry)
        self.versions = TensorVersions(
            self.short_names,
            self._loaded,
            settings.max_loaded_tensor_models,
            self._load_version,
            self.unload,
            self._spare,
        )
        self._switch = VersionSwitch(self.versions, wishes)
        self._died: list[tuple[RegisteredModel, EngineError]] = []
        self._look = asyncio.Event()
        self._loads: dict[str, Load] = {}
        self._reserved: dict[str, int] = {}
        self._rests: dict[str, _Rest] = {}
        self._problems: dict[str, str] = {}
        self._room = asyncio.Lock()
        self._wake = asyncio.Event()
        self._draining = False
        self.ask_others: Callable[[], Awaitable[bool]] = nothing_to_spare

    @property
    def names(self) -> frozenset[str]:
        """Return the full names of the models that are loaded."""
        return frozenset(self._loaded)

    @property
    def loading(self) -> bool:
        """Return True while something may be coming or going."""
        return any(each.begun for each in self._loads.values())

    def find(self, name: str) -> LoadedTensorModel | None:
        """Return the model of that full name if it is loaded; it may be gone as soon as the caller awaits anything."""
        return self._loaded.get(name)

    def state(self, name: str) -> tuple[State, str]:
        """Return how the model of that full name is, and why it is not ready."""
        model = self._loaded.get(name)
        if name in self._loads:
            return "LOADING", ""
        if model is None:
            rest = self._rest(name)
            return "UNAVAILABLE", rest.reason if rest else self._problems.get(name, "not loaded")
        if model.leaving:
            return "UNLOADING", ""
        if model.engine.circuit_open:
            return "UNAVAILABLE", "It failed too often of late."
        return "READY", ""

    @asynccontextmanager
    async def lease(self, registered: RegisteredModel) -> AsyncIterator[LoadedTensorModel]:
        """Yield the model, loading it first if need be; it stays until the end.

        Args:
            registered: A model of the kind `onnx`.

        Raises:
            UnavailableError: It cannot be loaded now.
            ModelFileError: Its files are damaged or will not do.
            NotFoundError: It has been removed meanwhile.
        """
        model = await self._take(registered)
        try:
            with recorded(model.record, asyncio.get_running_loop().time):
                yield model
        finally:
            model.give_back()

    async def unload(self, name: str) -> None:
        """Unload the model of that full name, if it is loaded, once those who use it or wait for it are done."""
        if (load := self._loads.get(name)) is not None:
            await asyncio.wait({load.done})
        if (model := self._loaded.get(name)) is not None:
            self._let_go(model)
            await model.gone.wait()

    async def spare(self) -> bool:
        """Unload the idle model that was unused for longest; return False if there is none."""
        return await self._spare("")

    async def _spare(self, beside: str) -> bool:
        idle = [each for name, each in self._loaded.items() if each.leases == 0 and name != beside]
        if not idle:
            return beside != "" and await self.ask_others()
        kept = self._switch.kept
        model = min(idle, key=lambda each: (each.leaving, each.registered.full_name not in kept, each.last_used))
        self._let_go(model)
        try:
            async with asyncio.timeout(UNLOAD_WAIT_S):
                await model.gone.wait()
        except TimeoutError:
            return False
        return True

    async def run(self) -> None:
        """Bring the facts to the wishes, until cancelled."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._follow_wishes(), name="versions of tensor models")
            while True:
                self._bury_dead()
                for name, load in self._loads.items():
                    if not load.begun:
                        load.begun = True
                        tasks.create_task(self._load(load), name=f"load {name}")
                for name, model in self._loaded.items():
                    if model.leaving and not model.ending:
                        model.ending = True
                        tasks.create_task(self._unload(model), name=f"unload {name}")
                await self._wake.wait()
                self._wake.clear()

    async def _follow_wishes(self) -> None:
        """Switch to the versions that are wished for, until cancelled."""
        while True:
            while self._died:
                await self._switch.load_failed(*self._died.pop())
            if not self._draining:
                await self._switch.follow()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(LOOK_S):
                    await self._look.wait()
            self._look.clear()

    def wake(self) -> None:
        """Compare wish and fact at once."""
        self._look.set()

    def drain(self) -> None:
        """Load nothing any more: the process is about to stop."""
        self._draining = True

    async def close(self) -> None:
        """Unload everything; open requests end with an error.

        Raises:
            EngineError: A thread did not end in time; the others have been ended.
        """
        self.drain()
        for load in self._loads.values():
            load.fail(_stopping())
        errors: list[EngineError] = []
        for model in list(self._loaded.values()):
            model.leaving = model.ending = True
            try:
                await model.engine.close()
            except EngineError as error:
                errors.append(error)
            self._forget(model)
        if errors:
            raise errors[0]

    # State

    def health(self) -> Health:
        """Return readiness as of the sessions' last heartbeats; nothing needs to be loaded for it."""
        if stalled := self.stalled:
            return Health(ready=False, reason=f"The session of {', '.join(stalled)} does not answer.")
        if full := [name for name, model in self._loaded.items() if model.engine.queue_full]:
            return Health(ready=False, reason=f"The queue of {', '.join(full)} is full.")
        return Health(ready=True)

    @property
    def stalled(self) -> list[str]:
        """Return the models whose thread has not gone round for too long; one that has ended is not among them."""
        limit = self._settings.stalled_engine_s
        return [
            name
            for name, model in self._loaded.items()
            if not model.engine.ended.done() and model.engine.heartbeat_age_s > limit
        ]

    # Wish

    async def _take(self, registered: RegisteredModel) -> LoadedTensorModel:
        name = registered.full_name
        while (model := self._loaded.get(name)) is not None:
            if not model.leaving:
                model.take()
                return model
            await model.gone.wait()
        load = self._loads.get(name)
        if load is None:
            self._check_may_load(name)
            load = self._loads[name] = Load(registered)
            self._wake.set()
        return await waited_for(load)

    async def _load_version(self, registered: RegisteredModel) -> None:
        """Load one more version while another answers."""
        load = self._loads.get(registered.full_name)
        if load is None:
            self._check_may_load(registered.full_name)
            load = self._loads[registered.full_name] = Load(registered, beside=True)
            self._wake.set()
        (await waited_for(load)).give_back()

    def _check_may_load(self, name: str) -> None:
        if self._draining:
            raise _stopping()
        if (rest := self._rest(name)) is not None:
            raise UnavailableError(
                rest.reason,
                advice="Try again later; the log says what happened.",
                code="circuit_open",
                retry_after_s=max(1.0, rest.until - asyncio.get_running_loop().time()),
            )

    def _rest(self, name: str) -> _Rest | None:
        rest = self._rests.get(name)
        if rest is not None and asyncio.get_running_loop().time() >= rest.until:
            del self._rests[name]
            return None
        return rest

    def _let_go(self, model: LoadedTensorModel) -> None:
        model.leaving = True
        self._wake.set()

    # Fact

    async def _load(self, load: Load) -> None:
        registered, name = load.registered, load.registered.full_name
        try:
            async with self._room:
                if not load.beside:
                    await self._make_room(registered)
                self._reserved[name] = registered.minimum_memory
            model = await self._loader.load(registered)
        except ApplianceError as error:
            LOGGER.warning("%s is not loaded: %s", name, error)
            self._problems[name] = str(error)
            if not load.beside:
                await self._switch.load_failed(registered, error)
            load.fail(error)
        else:
            self._problems.pop(name, None)
            self._loaded[name] = model
            self.short_names.loaded(registered)
            model.engine.ended.add_done_callback(lambda _: self._wake.set())
            load.succeed(model)
        finally:
            load.fail(_stopping())  # for one that was cancelled
            self._reserved.pop(name, None)
            del self._loads[name]

    async def _make_room(self, registered: RegisteredModel) -> None:
        """Unload idle models until the number and the memory allow one more.

        Raises:
            UnavailableError: Those that are loaded are busy, or the memory does not suffice even without them.
        """
        while (full := self._is_full()) or self._lacks_memory(registered):
            if await self.spare() or (not full and await self.ask_others()):
                continue
            if full:
                raise UnavailableError(
                    f"{registered.full_name} cannot be loaded now: {', '.join([*self._loaded, *self._reserved])} "
                    "are busy.",
                    advice="Try again later, or raise `max_loaded_tensor_models` if the memory allows.",
                    retry_after_s=RETRY_AFTER_S,
                )
            raise UnavailableError(
                f"{registered.full_name} needs {registered.minimum_memory / 2**20:.0f} MiB of memory; "
                f"{self._free_memory() / 2**20:.0f} MiB are free.",
                advice="Stop other programs, or choose a smaller model.",
                code="not_enough_memory",
                retry_after_s=RETRY_AFTER_S,
            )

    def _is_full(self) -> bool:
        return len(self._loaded) + len(self._reserved) >= self._settings.max_loaded_tensor_models

    def _lacks_memory(self, registered: RegisteredModel) -> bool:
        return self._free_memory() < registered.minimum_memory

    def _free_memory(self) -> int:
        """Return the bytes that no load has spoken for."""
        return max(0, memory().available - sum(self._reserved.values()))

    async def _unload(self, model: LoadedTensorModel) -> None:
        """End a session once it is free; one whose thread does not end stays, so that its stall is seen."""
        await model.free.wait()
        try:
            await model.engine.close()
        except EngineError as error:
            LOGGER.error("%s", error)  # noqa: TRY400  (what happened is all in the message)
            await asyncio.wait({model.engine.ended})
        self._forget(model)

    def _forget(self, model: LoadedTensorModel) -> None:
        name = model.registered.full_name
        if self._loaded.get(name) is model:
            del self._loaded[name]
            self.short_names.unloaded(model.registered)
            self._switch.forget(name)
            model.hold.close()
            model.gone.set()
            LOGGER.info("unloaded %s", name)

    def _bury_dead(self) -> None:
        """Let a model whose thread died be loaded afresh, but not at once: the same request may kill it again."""
        now, rest_s = asyncio.get_running_loop().time(), self._settings.circuit_open_s
        for name, model in list(self._loaded.items()):
            if model.engine.ended.done() and not model.leaving:
                error = model.engine.ended.result()
                LOGGER.error("the session of %s ended: %s", name, error)
                self._rests[name] = _Rest(f"The session of {name} ended: {error}", now + rest_s)
                self._died.append((model.registered, EngineError(self._rests[name].reason, code="engine_died")))
                self.wake()
                model.leaving = model.ending = True
                self._forget(model)


def _stopping() -> UnavailableError:
    return UnavailableError("The server is stopping.", retry_after_s=RETRY_AFTER_S)
