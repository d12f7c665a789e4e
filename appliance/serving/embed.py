"""A request for embeddings becomes engine work: route → tokens → cache, or queue → vectors."""

from __future__ import annotations

import asyncio
import math
from array import array
from collections.abc import Sequence

from appliance.core.errors import DeadlineExceededError, InvalidRequestError
from appliance.core.types import EmbeddingRequest, Embeddings, Vector
from appliance.serving.embedder_routes import Embedder, EmbedderRoutes


class TextEmbedding:
    """The serving floor's answer to `core.types.EmbeddingModels`."""

    def __init__(self, routes: EmbedderRoutes) -> None:
        """Embed with the models that are loaded, or with those that a request wants, what is not in the cache."""
        self._routes = routes

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
        async with self._routes.embedder_named(request.model, request.tenant) as route:
            model = route.model
            _check_dimensions(model, request.dimensions)
            tokens, truncated = await model.tokenize(request.inputs, truncate=request.truncate)
            vectors = await route.embed(tokens, request.priority, keep=request.keep)
            if request.dimensions not in (None, model.dimensions):
                vectors = [_cut(each, request.dimensions or 0) for each in vectors]
            return Embeddings(model.name, vectors, [len(each) for each in tokens], truncated)


def _check_dimensions(model: Embedder, wanted: int | None) -> None:
    if wanted is None or wanted == model.dimensions or (wanted < model.dimensions and model.is_matryoshka):
        return
    raise InvalidRequestError(
        f"The vectors of {model.name} have {model.dimensions} numbers, not {wanted}.",
        advice="Leave `dimensions` out: only models that were trained for it can have their vectors cut.",
        param="dimensions",
        code="invalid_value",
    )


def _cut(vector: Vector, dimensions: int) -> Vector:
    """Return the start of a vector at length 1, as models with Matryoshka representations are used."""
    start: Sequence[float] = vector[:dimensions]
    length = math.hypot(*start)
    return array("f", [number / length for number in start] if length else start)
