"""The ONNX models as `switching` sees them: versions that are loaded, used, loaded and unloaded."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass

from appliance.registry.known import RegisteredModel
from appliance.serving.purposes import ONNX
from appliance.serving.short_names import ShortNames
from appliance.serving.soak import Record
from appliance.serving.tensor_loader import LoadedTensorModel


@dataclass(frozen=True, slots=True)
class TensorVersions:
    """A `switching.Loader`; what it does is done by `LoadedTensorModels`.

    Attributes:
        loaded: What is loaded, as it changes.
        most: How many may be loaded at once.
        load: Loads one more.
        unload: Unloads the model of that name.
        spare: Unloads something idle other than the model of that name, or returns False.
    """

    short_names: ShortNames
    loaded: Mapping[str, LoadedTensorModel]
    most: int
    load: Callable[[RegisteredModel], Awaitable[None]]
    unload: Callable[[str], Awaitable[None]]
    spare: Callable[[str], Awaitable[bool]]

    def takes(self, registered: RegisteredModel) -> bool:
        """Return True if onnxruntime evaluates it."""
        return registered.kind == ONNX

    def is_home_of(self, registered: RegisteredModel) -> bool:
        """Return True if onnxruntime evaluates it."""
        return self.takes(registered)

    def find_loaded(self, full_name: str) -> RegisteredModel | None:
        """Return the model if it is loaded and stays so."""
        model = self.loaded.get(full_name)
        return None if model is None or model.leaving else model.registered

    def record(self, full_name: str) -> Record | None:
        """Return what became of its requests, or None if it is not loaded."""
        model = self.loaded.get(full_name)
        return None if model is None else model.record

    def has_place(self) -> bool:
        """Return True if one more may be loaded without another making room."""
        return len(self.loaded) < self.most

    def is_unused(self, full_name: str, since: float) -> bool:
        """Return True if unloading it hurts nobody, and no request has come for it since that time of the loop."""
        model = self.loaded.get(full_name)
        return model is not None and model.leases == 0 and model.taken_at <= since

    async def spare_beside(self, full_name: str) -> bool:
        """Unload something idle, but not this model; return False if there is nothing."""
        return await self.spare(full_name)

    async def load_version(self, registered: RegisteredModel) -> None:
        """Load it beside what is loaded; nothing is unloaded for it."""
        await self.load(registered)

    async def unload_version(self, full_name: str) -> None:
        """Unload it."""
        await self.unload(full_name)
