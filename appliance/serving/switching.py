"""From one version to another without a failed request: the facts follow the wishes.

    beside        the new one is loaded while the old one answers; then new requests go to the new one, and those that
                  run finish on the old one, which stays loaded for the way back while the trial goes on
    one by one    where the memory cannot hold both, new requests wait while those on the old one finish; it is dropped,
                  and the new one loaded

A version that cannot be loaded costs nobody his request: its wish is rolled back, and the old one answers on, or is
loaded again where it had to be dropped.
"""

from __future__ import annotations

import asyncio
import logging
from typing import Protocol

from appliance.core.errors import ApplianceError, ModelFileError, NotFoundError, UnavailableError
from appliance.observe.resources import memory
from appliance.registry.known import RegisteredModel
from appliance.registry.trial import CRASHED
from appliance.registry.wishes import Wishes
from appliance.serving.short_names import ShortNames
from appliance.serving.soak import Record

LOGGER = logging.getLogger("appliance.serving")
DRAIN_S = 30.0
"""How long new requests wait for those on a version that must be dropped first; then they go to it after all."""
REST_S = 30.0
"""How long a switch that did not come about is left alone."""
LOOK_S = 0.02
NO_MEMORY = "not_enough_memory"


class Loader(Protocol):
    """One kind of loaded models, as far as their versions are concerned."""

    @property
    def short_names(self) -> ShortNames:
        """Return which version answers for each short name."""
        ...

    def takes(self, registered: RegisteredModel) -> bool:
        """Return True if it can be loaded here at all."""
        ...

    def is_home_of(self, registered: RegisteredModel) -> bool:
        """Return True if it is loaded here for its own use."""
        ...

    def find_loaded(self, full_name: str) -> RegisteredModel | None:
        """Return the model if it is loaded."""
        ...

    def has_place(self) -> bool:
        """Return True if one more may be loaded without another making room."""
        ...

    def is_unused(self, full_name: str, since: float) -> bool:
        """Return True if unloading it hurts nobody, and no request has come for it since that time of the loop."""
        ...

    def record(self, full_name: str) -> Record | None:
        """Return what became of its requests, or None if it is not loaded."""
        ...

    async def spare_beside(self, full_name: str) -> bool:
        """Unload something idle, but not this model; return False if there is nothing."""
        ...

    async def load_version(self, registered: RegisteredModel) -> None:
        """Load it beside what is loaded; nothing is unloaded for it."""
        ...

    async def unload_version(self, full_name: str) -> None:
        """Unload it."""
        ...


class VersionSwitch:
    """Brings the versions of one kind of models to what is wished for."""

    def __init__(self, loader: Loader, wishes: Wishes) -> None:
        """Nothing happens until `follow`."""
        self._loader = loader
        self._wishes = wishes
        self._kept: dict[str, float] = {}
        self._rests: dict[str, tuple[float, ApplianceError]] = {}

    @property
    def kept(self) -> frozenset[str]:
        """Return the full names of the versions that are loaded for the way back only."""
        return frozenset(self._kept)

    async def follow(self) -> None:
        """Compare what is wished for with what answers, and switch where they differ."""
        for name, answering in list(self._loader.short_names.answering.items()):
            if self._wishes.find(name) is None:
                continue
            meant = self._loader.short_names.meant(name)
            if meant is None or not self._loader.takes(meant):
                self._loader.short_names.answering.pop(name, None)
                self._kept[answering] = _now()
            elif meant.full_name != answering and self.refusal(meant.full_name) is None:
                await self._switch(name, answering, meant)
        await self._load_trials()
        await self._retire()

    def refusal(self, full_name: str) -> ApplianceError | None:
        """Return why a version could not be loaded of late, or None if it may be tried."""
        until, error = self._rests.get(full_name, (0.0, None))
        return error if until > _now() else None

    async def load_failed(self, registered: RegisteredModel, error: ApplianceError) -> None:
        """Go back where a version that nobody answers beside cannot be loaded, if it may be the version's fault."""
        wish = self._wishes.find(registered.name)
        if wish is None or wish.version != registered.version or isinstance(error, UnavailableError | NotFoundError):
            return
        if wish.state == "trial" or (isinstance(error, ModelFileError) and wish.previous is not None):
            await self._roll_back(registered, error)

    def forget(self, full_name: str) -> None:
        """Note that a version has been unloaded."""
        self._kept.pop(full_name, None)

    # The switch

    async def _switch(self, name: str, old: str, new: RegisteredModel) -> None:
        baseline = self._record(old)
        told = f"{new.full_name} answers; {old} stays loaded for the way back while the memory allows."
        try:
            if self._loader.find_loaded(new.full_name) is None:
                if await self._has_room_beside(new, old):
                    LOGGER.info("%s is wished for: loading it beside %s", new.full_name, old)
                    await self._loader.load_version(new)
                else:
                    told = await self._replace(name, old, new)
        except ApplianceError as error:
            if self.refusal(new.full_name) is not error:
                await self._failed(new, error)
            return
        self._loader.short_names.answering[name] = new.full_name
        self._kept.pop(new.full_name, None)
        if self._loader.find_loaded(old) is not None:
            self._kept[old] = _now()
        LOGGER.info("%s", told)
        await self._note(new, new.version, told, baseline.slowest if baseline is not None else None)

    async def _has_room_beside(self, new: RegisteredModel, old: str) -> bool:
        while _lacks_memory(new):
            if not await self._loader.spare_beside(old):
                return False
        return True

    async def _replace(self, name: str, old: str, new: RegisteredModel) -> str:
        """Drop the old version once it is idle, then load the new one; return what to tell of it."""
        before = self._loader.find_loaded(old)
        assert before is not None, "what answers is loaded"
        free = memory().available
        if free + before.minimum_memory < new.minimum_memory:
            raise _no_memory(
                new, f"{free / 2**20:.0f} MiB are free, and {old} holds about {before.minimum_memory / 2**20:.0f} MiB"
            )
        told = (
            f"{new.full_name} answers; {old} was dropped first: the new one needs "
            f"{new.minimum_memory / 2**20:.0f} MiB, and {free / 2**20:.0f} MiB were free beside the old one."
        )
        LOGGER.warning("%s is dropped before %s is loaded: %.0f MiB are free", old, new.full_name, free / 2**20)
        since = _now()
        names = self._loader.short_names
        names.answering.pop(name, None)
        names.held.add(name)
        try:
            await self._drain(old, since)
            await self._loader.unload_version(old)
            if _lacks_memory(new):
                raise _no_memory(new, f"{memory().available / 2**20:.0f} MiB are free without {old}")
            await self._loader.load_version(new)
        except ApplianceError as error:
            await self._failed(new, error)  # first of all: a crash from here on must not try it again
            if self._loader.find_loaded(old) is None:
                await self._loader.load_version(before)
            names.answering[name] = old
            raise
        finally:
            names.held.discard(name)
        return told

    async def _drain(self, old: str, since: float) -> None:
        while not self._loader.is_unused(old, _now()):
            if _now() > since + DRAIN_S:
                raise UnavailableError(
                    f"{old} was still answering after {DRAIN_S:g} s, and must be dropped first; it answers on.",
                    advice="It is tried again; free some memory, so that both versions can be loaded at once.",
                    code="version_busy",
                    retry_after_s=REST_S,
                )
            await asyncio.sleep(LOOK_S)

    async def _failed(self, new: RegisteredModel, error: ApplianceError) -> None:
        self._rests[new.full_name] = _now() + REST_S, error
        wish = self._wishes.find(new.name)
        if wish is not None and wish.version == new.version and wish.state != "rolled_back" and not _is_for_now(error):
            await self._roll_back(new, error)
            return
        LOGGER.warning("%s does not answer yet: %s", new.full_name, error)
        answering = self._loader.short_names.answering.get(new.name, "")
        await self._note(new, answering.rpartition(":")[2], str(error))

    async def _roll_back(self, registered: RegisteredModel, error: ApplianceError) -> None:
        code = {NO_MEMORY: NO_MEMORY, "engine_died": CRASHED}.get(error.code, "not_loadable")
        LOGGER.error("%s is rolled back: %s", registered.full_name, error)
        await asyncio.to_thread(
            self._wishes.roll_back, registered.name, code=code, reason=str(error), version=registered.version
        )
        await self._note(registered, self._answering(registered.name), f"{registered.full_name} was given up: {error}")

    # What comes before and after

    async def _load_trials(self) -> None:
        """Load what is on trial and answers nobody yet, so that its trial is one; but nothing makes room for it."""
        for name, wish in self._wishes.all().items():
            names = self._loader.short_names
            meant = names.meant(name) if wish.state == "trial" and name not in names.answering else None
            if meant is None or meant.version != wish.version or not self._loader.is_home_of(meant):
                continue
            if self.refusal(meant.full_name) is not None:
                continue
            if self._loader.find_loaded(meant.full_name) is None:
                if not self._loader.has_place() or _lacks_memory(meant):
                    continue
                try:
                    await self._loader.load_version(meant)
                except ApplianceError as error:
                    await self._failed(meant, error)
                    continue
            names.answering[name] = meant.full_name
            await self._note(meant, meant.version, f"{meant.full_name} answers.")

    async def _retire(self) -> None:
        """Unload what was kept for the way back once that is over, unless somebody asks for it by its full name."""
        for full_name, since in list(self._kept.items()):
            registered = self._loader.find_loaded(full_name)
            if registered is None:
                del self._kept[full_name]
                continue
            wish = self._wishes.find(registered.name)
            if wish is not None and wish.state == "trial" and wish.previous == registered.version:
                continue
            if self._loader.is_unused(full_name, since):
                del self._kept[full_name]
                await self._loader.unload_version(full_name)

    def _answering(self, name: str) -> str:
        return self._loader.short_names.answering.get(name, "").rpartition(":")[2]

    def _record(self, full_name: str) -> Record | None:
        return self._loader.record(full_name)

    async def _note(self, model: RegisteredModel, serving: str, fact: str, baseline: float | None = None) -> None:
        await asyncio.to_thread(self._wishes.note, model.name, serving, fact, baseline)


def _now() -> float:
    return asyncio.get_running_loop().time()


def _lacks_memory(registered: RegisteredModel) -> bool:
    return memory().available < registered.minimum_memory


def _is_for_now(error: ApplianceError) -> bool:
    """Return True for what says nothing of the version: others are busy, or the server stops."""
    return isinstance(error, UnavailableError) and error.code != NO_MEMORY


def _no_memory(new: RegisteredModel, what: str) -> UnavailableError:
    return UnavailableError(
        f"{new.full_name} needs {new.minimum_memory / 2**20:.0f} MiB of memory; {what}.",
        advice="Stop other programs, or choose a smaller model.",
        code=NO_MEMORY,
        retry_after_s=REST_S,
    )
