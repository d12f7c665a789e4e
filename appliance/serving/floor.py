"""The serving floor as a whole: what holds models in memory, what answers with them, and how both are wired."""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Mapping
from contextlib import AsyncExitStack
from typing import Any

from appliance.core.settings import Settings
from appliance.engine.cpu_budget import CpuBudget
from appliance.observe.metrics import Metrics
from appliance.registry.versions import Registry
from appliance.registry.wishes import Wishes
from appliance.serving.classifiers import TextClassification
from appliance.serving.embed import TextEmbedding
from appliance.serving.embedder_routes import EmbedderRoutes
from appliance.serving.embedders import LoadedEmbedders
from appliance.serving.embedding_cache import EmbeddingCache
from appliance.serving.forget import SessionMemory
from appliance.serving.generate import TextGeneration
from appliance.serving.infer import TensorInference
from appliance.serving.loaded import LoadedModels
from appliance.serving.readiness import Readiness
from appliance.serving.room import share_memory
from appliance.serving.tensor_loader import TensorModelLoader
from appliance.serving.tensor_models import LoadedTensorModels
from appliance.serving.token_counts import TokenCounts
from appliance.serving.trials import Trials
from appliance.serving.tuning import ModelTuning
from appliance.serving.versions import WishedVersions


class ServingFloor:
    """Everything between the doors and the engines.

    Attributes:
        models: GGUF models that write text, loaded.
        embedders: GGUF models that embed, loaded.
        tensor_models: ONNX models, loaded.
        cache: Embeddings that were computed before.
        text: Answers `core.types.TextModels`.
        embedding: Answers `core.types.EmbeddingModels`.
        token_counts: Answers `core.types.TokenCounter`.
        classifiers: Answers `core.encoders.TextClassifiers`.
        tensors: Answers `core.tensors.TensorModels`.
        tuning: Answers `core.types.TunableModels`.
        readiness: Whether all that is loaded is well.
        versions: Answers `core.wishes.ModelVersions`.
        metrics: Where all of them count.
    """

    def __init__(
        self, settings: Settings, registry: Registry, wishes: Wishes, metrics: Metrics, cpu: CpuBudget
    ) -> None:
        """Build and wire the parts; nothing is loaded until they run.

        Args:
            settings: Limits and options of all models.
            registry: What there is to serve.
            wishes: Which versions are meant.
            metrics: Where to count.
            cpu: The cores that all engines share.
        """
        self.metrics = metrics
        self.models = LoadedModels(settings, registry, wishes, metrics, cpu)
        self.embedders = LoadedEmbedders(settings, registry, wishes, metrics, self.models, cpu)
        loader = TensorModelLoader(settings, registry, metrics, cpu)
        self.tensor_models = LoadedTensorModels(settings, registry, wishes, loader)
        share_memory(self.embedders, self.tensor_models, self.models)
        self.cache = EmbeddingCache(settings.cache_path, settings.embedding_cache_bytes, metrics)
        routes = EmbedderRoutes(registry, self.embedders, self.tensor_models, self.cache)
        self.text = TextGeneration(registry, self.models, SessionMemory(settings, self.models), self.tensor_models)
        self.embedding = TextEmbedding(routes)
        self.token_counts = TokenCounts(routes)
        self.classifiers = TextClassification(settings, routes)
        self.tensors = TensorInference(settings, registry, self.tensor_models)
        self.tuning = ModelTuning(self.models)
        self.readiness = Readiness(self.models, self.embedders, self.tensor_models)
        kinds = (self.models, self.embedders, self.tensor_models)
        loaders = (self.models.versions, self.embedders, self.tensor_models.versions)
        self._trials = Trials(wishes, loaders, kinds, metrics.versions)
        self.versions = WishedVersions(settings, wishes, self._trials)

    @property
    def runs(self) -> Mapping[str, Callable[[], Coroutine[Any, Any, None]]]:
        """Return by name what must run for as long as the floor serves; one that raises has lost an engine."""
        return {
            "models": self.models.run,
            "embedders": self.embedders.run,
            "tensor models": self.tensor_models.run,
            "trials": self._trials.run,
        }

    def drain(self) -> None:
        """Load nothing any more: the process is about to stop."""
        self.models.drain()
        self.embedders.drain()
        self.tensor_models.drain()

    async def close(self) -> None:
        """Unload everything; open requests end with an error.

        Raises:
            EngineError: A thread did not end in time; the others have been ended.
        """
        async with AsyncExitStack() as stack:
            stack.callback(self.cache.close)
            stack.push_async_callback(self.models.close)
            stack.push_async_callback(self.embedders.close)
            stack.push_async_callback(self.tensor_models.close)
