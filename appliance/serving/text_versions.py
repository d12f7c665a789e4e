"""The models that write text as `switching` sees them: versions that are loaded, used, loaded and unloaded."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass

from appliance.registry.known import RegisteredModel
from appliance.serving.route import LoadedModel
from appliance.serving.short_names import ShortNames
from appliance.serving.soak import Record


@dataclass(frozen=True, slots=True)
class TextVersions:
    """A `switching.Loader`; what it does is done by `LoadedModels`.

    Attributes:
        loaded: What is loaded, as it changes.
        most: How many may be loaded at once.
        load: Loads one more; which of them answers alone says whether the box is ready.
        unload: Unloads one.
        spare: Unloads something idle other than the model of that name, or returns False.
    """

    short_names: ShortNames
    loaded: Mapping[str, LoadedModel]
    most: int
    load: Callable[[RegisteredModel], Awaitable[object]]
    unload: Callable[[LoadedModel], Awaitable[None]]
    spare: Callable[[str], Awaitable[bool]]

    def takes(self, registered: RegisteredModel) -> bool:
        """Return True if it writes text."""
        return registered.kind == "gguf" and registered.task != "embedding"

    def is_home_of(self, registered: RegisteredModel) -> bool:
        """Return True if it writes text."""
        return self.takes(registered)

    def find_loaded(self, full_name: str) -> RegisteredModel | None:
        """Return the model if it is loaded."""
        model = self.loaded.get(full_name)
        return None if model is None else model.registered

    def record(self, full_name: str) -> Record | None:
        """Return what became of its requests, or None if it is not loaded."""
        model = self.loaded.get(full_name)
        return None if model is None else model.record

    def has_place(self) -> bool:
        """Return True if one more may be loaded without another making room."""
        return len(self.loaded) < self.most

    def is_unused(self, full_name: str, since: float) -> bool:
        """Return True if unloading it hurts nobody, and no request has come for it since that time of the loop."""
        model = self.loaded[full_name]
        return model.idle and model.last_used <= since

    async def spare_beside(self, full_name: str) -> bool:
        """Unload something idle, but not this model; return False if there is nothing."""
        return await self.spare(full_name)

    async def load_version(self, registered: RegisteredModel) -> None:
        """Load it beside what is loaded; nothing is unloaded for it."""
        await self.load(registered)

    async def unload_version(self, full_name: str) -> None:
        """Unload it."""
        await self.unload(self.loaded[full_name])
