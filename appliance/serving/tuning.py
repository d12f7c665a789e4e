"""What loaded models run with, shown and changed while they run. Nothing here outlives the loaded model."""

from __future__ import annotations

import logging

from appliance.core.types import ModelRuntime, RuntimeChange
from appliance.engine.llama.commands import Runtime
from appliance.engine.llama.engine import LlamaEngine
from appliance.observe.resources import physical_cores
from appliance.serving.loaded import LoadedModels

LOGGER = logging.getLogger("appliance.serving")


class ModelTuning:
    """The serving floor's answer to `core.types.TunableModels`."""

    def __init__(self, models: LoadedModels) -> None:
        """Runtime the models that are loaded."""
        self._models = models

    def runtime(self, model: str) -> ModelRuntime:
        """Return what a loaded model runs with; see `core.types.TunableModels.runtime`."""
        return _runtime(self._models.find(model).engine)

    def tune(self, model: str, change: RuntimeChange) -> ModelRuntime:
        """Change what a loaded model runs with; see `core.types.TunableModels.tune`."""
        engine = self._models.find(model).engine
        now, latency_s = engine.runtime, change.target_inter_token_latency_s
        engine.tune(
            Runtime(
                threads=now.threads if change.threads is None else change.threads or physical_cores(),
                batch_tokens=now.batch_tokens if change.batch_tokens is None else change.batch_tokens,
                target_inter_token_latency_s=now.target_inter_token_latency_s if latency_s is None else latency_s,
            )
        )
        LOGGER.info("%s now runs with %s", engine.name, engine.runtime)
        return _runtime(engine)


def _runtime(engine: LlamaEngine) -> ModelRuntime:
    now = engine.runtime
    return ModelRuntime(
        model=engine.name,
        threads=now.threads,
        batch_tokens=now.batch_tokens,
        most_batch_tokens=engine.config.batch_tokens,
        target_inter_token_latency_s=now.target_inter_token_latency_s,
    )
