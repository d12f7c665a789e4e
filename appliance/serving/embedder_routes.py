"""Where texts go to be embedded: GGUF models to llama.cpp, ONNX models to onnxruntime, both with one face."""

from __future__ import annotations

from array import array
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from functools import partial
from typing import Protocol

from appliance.core.errors import ApplianceError
from appliance.core.types import EmbeddingInput, Priority, Vector
from appliance.engine.onnx.encoder import OnnxEncoder
from appliance.registry.known import RegisteredModel
from appliance.registry.versions import Registry
from appliance.serving.embedders import LoadedEmbedders
from appliance.serving.embedding_cache import EmbeddingCache
from appliance.serving.purposes import ONNX, check_embeds
from appliance.serving.tensor_models import LoadedTensorModels


class Embedder(Protocol):
    """A loaded model that embeds, whatever evaluates it."""

    @property
    def name(self) -> str:
        """The full `name:version`."""
        ...

    @property
    def dimensions(self) -> int:
        """Numbers of a vector."""
        ...

    @property
    def longest_input(self) -> int:
        """Tokens that an input may have, those that the model wants around it included."""
        ...

    @property
    def pooling(self) -> str:
        """How the states of an input's tokens become one vector."""
        ...

    @property
    def is_matryoshka(self) -> bool:
        """True if the start of a vector is known to be one itself."""
        ...

    async def tokenize(self, inputs: Sequence[EmbeddingInput], *, truncate: bool) -> tuple[list[array[int]], list[int]]:
        """Return each input's token ids, and the indices of the inputs that were cut.

        `InvalidRequestError` names an input that will not do as `input[i]`.
        """
        ...

    async def count_tokens(self, texts: Sequence[str]) -> list[int]:
        """Return how many tokens each text has, uncut, those that the model wants around it included."""
        ...

    async def embed(self, inputs: Sequence[array[int]]) -> Sequence[Vector]:
        """Return a vector of length 1 for each input. Leaving cancels, and nobody else notices."""
        ...


@dataclass(frozen=True, slots=True)
class EmbedderRoute:
    """A model that embeds, and the cache in front of it."""

    model: Embedder
    space: bytes
    cache: EmbeddingCache

    async def embed(
        self, inputs: Sequence[array[int]], priority: Priority = Priority.DEFAULT, *, keep: bool = True
    ) -> Sequence[Vector]:
        """Return a vector for each input, from the cache where it is there; `keep` what is computed."""
        model = self.model
        compute = partial(model.embed, priority=priority) if isinstance(model, OnnxEncoder) else model.embed
        return await self.cache.embed(model.name, self.space, inputs, compute, keep=keep)


class EmbedderRoutes:
    """Finds and loads what embeds or reads texts."""

    def __init__(
        self,
        registry: Registry,
        embedders: LoadedEmbedders,
        tensor_models: LoadedTensorModels,
        cache: EmbeddingCache,
    ) -> None:
        """Route to the models that are loaded, or have those loaded that a request wants."""
        self._registry = registry
        self._embedders = embedders
        self._tensor_models = tensor_models
        self._cache = cache

    def resolve(self, name: str) -> RegisteredModel:
        """Return the registered model that is to answer for a name now.

        Raises:
            NotFoundError: No such model; the message names those that exist.
        """
        for short_names in (self._embedders.short_names, self._tensor_models.short_names):
            if (current := short_names.current(name)) is not None:
                return current
        if name in self._embedders.short_names.held | self._tensor_models.short_names.held:
            return self._registry.resolve(name)
        return self._embedders.short_names.without_waiting(name)

    @asynccontextmanager
    async def embedder_named(self, name: str, tenant: str) -> AsyncIterator[EmbedderRoute]:
        """Yield what embeds under a name; one that cannot be loaded makes way for the version that the name means then.

        Raises as `embedder`, and NotFoundError if there is no such model.
        """
        async with AsyncExitStack() as stack:
            while True:
                registered = self.resolve(name)
                try:
                    route = await stack.enter_async_context(self.embedder(registered, tenant))
                    break
                except ApplianceError:
                    if self.resolve(name).full_name == registered.full_name:
                        raise
            yield route

    @asynccontextmanager
    async def embedder(self, registered: RegisteredModel, tenant: str) -> AsyncIterator[EmbedderRoute]:
        """Yield the model as one that embeds, loading it first if need be; it stays until the end.

        Args:
            registered: A model of any kind.
            tenant: Whose embeddings are looked up and kept: the API key's id, or "".

        Raises:
            InvalidRequestError: The model is for something else.
            UnavailableError: It cannot be loaded now.
            ModelFileError: Its files are damaged, or make no embeddings.
        """
        check_embeds(registered)
        if registered.kind == ONNX:
            async with self._tensor_models.lease(registered) as loaded:
                how = f"{loaded.encoder.pooling} {sorted(loaded.engine.properties.items())}"
                yield self._route(loaded.encoder, registered, how, tenant)
        else:
            async with self._embedders.lease(registered.full_name) as model:
                yield self._route(model.engine, registered, model.engine.pooling, tenant)

    def _route(self, model: Embedder, registered: RegisteredModel, how: str, tenant: str) -> EmbedderRoute:
        return EmbedderRoute(model, self._cache.space(registered, how, tenant), self._cache)

    @asynccontextmanager
    async def encoder(self, registered: RegisteredModel) -> AsyncIterator[OnnxEncoder]:
        """Yield an ONNX model that reads texts, loading it first if need be; it stays until the end.

        Raises as `embedder`, but does not look what the model is for.
        """
        async with self._tensor_models.lease(registered) as loaded:
            yield loaded.encoder
