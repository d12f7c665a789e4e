"""A request to rerank or to classify becomes engine work: route → tokens → queue → scores.

A cross-encoder reads query and document together. Where a model only embeds, the embeddings of both are compared,
which is less exact; the answer says so.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from typing import TypeVar

from appliance.core.encoders import ClassificationRequest, Classifications, Ranking, RerankRequest
from appliance.core.errors import DeadlineExceededError, InvalidRequestError
from appliance.core.settings import Settings
from appliance.engine.similarity import cosines
from appliance.registry.known import RegisteredModel
from appliance.serving.embedder_routes import EmbedderRoutes
from appliance.serving.purposes import check_classifies, check_reranks, is_cross_encoder

T = TypeVar("T")


class TextClassification:
    """The serving floor's answer to `core.encoders.TextClassifiers`."""

    def __init__(self, settings: Settings, routes: EmbedderRoutes) -> None:
        """Classify with the models that are loaded, or with those that a request wants."""
        self._settings = settings
        self._routes = routes

    async def rerank(self, request: RerankRequest) -> Ranking:
        """Return a score for each document; see `core.encoders.TextClassifiers.rerank`."""
        registered = self._routes.resolve(request.model or self._settings.embedding_model)
        check_reranks(registered)
        work = self._read_together if is_cross_encoder(registered) else self._compare
        return await self._in_time(work(registered, request), request.deadline_s, "documents")

    async def classify(self, request: ClassificationRequest) -> Classifications:
        """Return probabilities for each input; see `core.encoders.TextClassifiers.classify`."""
        registered = self._routes.resolve(request.model)
        check_classifies(registered)
        return await self._in_time(self._classify(registered, request), request.deadline_s, "inputs")

    async def _in_time(self, work: Awaitable[T], deadline_s: float | None, what: str) -> T:
        limit = self._settings.request_timeout_s
        deadline_s = limit if deadline_s is None else min(deadline_s, limit)
        try:
            async with asyncio.timeout(deadline_s):
                return await work
        except TimeoutError as error:
            raise DeadlineExceededError(
                f"Not all {what} were evaluated after {deadline_s:g} s.",
                advice=f"Send fewer {what}, or raise `request_timeout_s`.",
            ) from error

    async def _read_together(self, registered: RegisteredModel, request: RerankRequest) -> Ranking:
        async with self._routes.encoder(registered) as encoder:
            scores, counts, truncated = await encoder.score(request.query, request.documents, truncate=request.truncate)
            return Ranking(encoder.name, "cross-encoder", scores, counts, truncated)

    async def _compare(self, registered: RegisteredModel, request: RerankRequest) -> Ranking:
        async with self._routes.embedder(registered, request.tenant) as route:
            model = route.model
            try:
                [query], _ = await model.tokenize([request.query], truncate=False)
            except InvalidRequestError as error:
                raise _renamed(error, "input[0]", "query") from error
            try:
                documents, truncated = await model.tokenize(request.documents, truncate=request.truncate)
            except InvalidRequestError as error:
                raise _renamed(error, "input", "documents") from error
            of_query, *of_documents = await route.embed([query, *documents])
            scores = cosines(of_query, of_documents)
            return Ranking(model.name, "embedding", scores, [len(each) for each in documents], truncated)

    async def _classify(self, registered: RegisteredModel, request: ClassificationRequest) -> Classifications:
        async with self._routes.encoder(registered) as encoder:
            probabilities, counts, truncated = await encoder.classify(request.inputs, truncate=request.truncate)
            return Classifications(encoder.name, encoder.labels, encoder.exclusive, probabilities, counts, truncated)


def _renamed(error: InvalidRequestError, old: str, new: str) -> InvalidRequestError:
    """Return the error of an input as one of what the caller sent."""
    return InvalidRequestError(
        error.message.replace(old, new, 1),
        advice=error.advice,
        code=error.code,
        param=new if error.param == "input" else error.param,
    )
