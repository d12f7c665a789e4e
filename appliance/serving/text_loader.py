"""A model that writes text is loaded: its file is held, its engine runs, and its chat template can be rendered."""

from __future__ import annotations

import asyncio
import logging

from appliance.core.errors import ModelFileError, StorageError, UnavailableError
from appliance.core.settings import Settings
from appliance.engine.cpu_budget import CpuBudget
from appliance.engine.llama.engine import LlamaEngine
from appliance.engine.llama.state_files import remove_foreign
from appliance.observe.metrics import Metrics
from appliance.registry.known import RegisteredModel
from appliance.registry.versions import Registry
from appliance.serving.adapters import ModelAdapters
from appliance.serving.engine_config import engine_config, model_tools, renderer
from appliance.serving.route import LoadedModel

LOGGER = logging.getLogger("appliance.serving")


class TextModelLoader:
    """Starts engines as the settings say."""

    def __init__(self, settings: Settings, registry: Registry, metrics: Metrics, cpu: CpuBudget) -> None:
        """Start engines whose threads take their turns on the cores from `cpu`."""
        self._settings = settings
        self._registry = registry
        self._metrics = metrics
        self._cpu = cpu

    async def load(self, registered: RegisteredModel) -> LoadedModel:
        """Load a GGUF model that writes text, and return it once it is warmed up.

        Raises:
            NotFoundError: It has been removed meanwhile.
            ConflictError: It is being removed just now.
            ModelFileError: llama.cpp refuses its file.
            EngineError: There is not enough memory, or it cannot be evaluated.
        """
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
        adapters = ModelAdapters(engine, self._registry, self._metrics, self._settings.max_loaded_adapters)
        tools = await model_tools(registered, engine)
        model = LoadedModel(registered, engine, renderer(self._settings, registered, engine), tools, hold, adapters)
        if model.renderer is not None:
            try:
                await model.renderer.start()
            except (ModelFileError, UnavailableError) as error:  # it is raised again at the first chat request
                LOGGER.warning("%s serves completions only: %s", registered.full_name, error)
        model.last_used = asyncio.get_running_loop().time()
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
