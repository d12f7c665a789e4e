"""Loading and unloading a model by name, whatever its kind, for those who look after the box."""

from __future__ import annotations

import math

from appliance.core.errors import ConflictError
from appliance.core.settings import Settings
from appliance.core.tensors import TensorModels
from appliance.registry.known import RegisteredModel
from appliance.registry.versions import Registry
from appliance.serving.loaded import LoadedModels


class ModelResidency:
    """The models in memory, of every kind."""

    def __init__(self, settings: Settings, registry: Registry, text: LoadedModels, tensors: TensorModels) -> None:
        """Load as a request would."""
        self._settings = settings
        self._registry = registry
        self._text = text
        self._tensors = tensors

    async def load(self, name: str) -> None:
        """Load a registered model, and wait until it is ready.

        Raises:
            NotFoundError: There is no such model.
            UnavailableError: It cannot be loaded now.
            ModelFileError: Its file is damaged.
        """
        registered = self._registry.resolve(name)
        if registered.kind == "onnx":
            await self._tensors.load(registered.name)
            return
        async with self._text.lease(name):
            pass

    async def unload(self, name: str) -> None:
        """Unload a model that nobody uses; one that is not loaded stays so.

        Raises:
            NotFoundError: There is no such model.
            ConflictError: It is in use, or the settings want it loaded.
        """
        registered = self._registry.resolve(name)
        if registered.kind == "onnx":
            await self._tensors.unload(registered.name)
            return
        await self._unload_text(registered)

    async def _unload_text(self, registered: RegisteredModel) -> None:
        name, versions = registered.base_name, self._text.versions
        if versions.find_loaded(name) is None:
            return
        if self._settings.model in registered.names:
            raise ConflictError(f"{name} is the model of the setting `model`, which stays loaded.")
        if not versions.is_unused(name, math.inf):
            raise ConflictError(f"{name} is in use.", advice="Try again when its requests have ended.")
        await versions.unload_version(name)
