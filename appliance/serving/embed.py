"""A request for embeddings becomes engine work: route → tokens → cache, or queue → vectors."""

from __future__ import annotations

import asyncio
import math
from array import array
from collections.abc import Sequence

from appliance.core.errors import DeadlineExceededError, InvalidRequestError
from appliance.core.types import EmbeddingRequest, Embeddings, Vector
from appliance.engine.llama_embedding.engine import LlamaEmbedder
from appliance.serving.embedders import LoadedEmbedders
from appliance.serving.embedding_cache import EmbeddingCache


class TextEmbedding:
    """The serving floor's answer to `core.types.EmbeddingModels`."""

    def __init__(self, embedders: LoadedEmbedders, cache: EmbeddingCache) -> None:
        """Embed with the embedders that are loaded, or with those that a request wants, what is not in the cache."""
        self._embedders = embedders
        self._cache = cache

    async def embed(self, request: EmbeddingRequest) -> Embeddings:
        """Return a vector for each input; see `core.types.EmbeddingModels.embed`."""
        try:
            async with asyncio.timeout(request.deadline_s):
                return await self._embed(request)
        except TimeoutError as error:
            raise DeadlineExceededError(
                f"The embeddings were not complete after {request.deadline_s:g} s.",
                advice="Send fewer inputs, or raise `request_timeout_s`.",
            ) from error

    async def _embed(self, request: EmbeddingRequest) -> Embeddings:
        async with self._embedders.lease(request.model) as model:
            engine = model.engine
            _check_dimensions(engine, request.dimensions)
            tokens, truncated = await engine.tokenize(request.inputs, truncate=request.truncate)
            space = self._cache.space(model.registered, engine.pooling, request.tenant)
            vectors = await self._cache.embed(engine.name, space, tokens, engine.embed)
            if request.dimensions not in (None, engine.dimensions):
                vectors = [_cut(each, request.dimensions or 0) for each in vectors]
            return Embeddings(engine.name, vectors, [len(each) for each in tokens], truncated)


def _check_dimensions(engine: LlamaEmbedder, wanted: int | None) -> None:
    if wanted is None or wanted == engine.dimensions or (wanted < engine.dimensions and engine.is_matryoshka):
        return
    raise InvalidRequestError(
        f"The vectors of {engine.name} have {engine.dimensions} numbers, not {wanted}.",
        advice="Leave `dimensions` out: only models that were trained for it can have their vectors cut.",
        param="dimensions",
        code="invalid_value",
    )


def _cut(vector: Vector, dimensions: int) -> Vector:
    """Return the start of a vector at length 1, as models with Matryoshka representations are used."""
    start: Sequence[float] = vector[:dimensions]
    length = math.hypot(*start)
    return array("f", [number / length for number in start] if length else start)
