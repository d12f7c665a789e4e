"""The journey of one search.

    store, filters ─► allowed chunks ─┬─► keyword leg ───────────┐
                                      └─► embed ─► semantic leg ─┴─► passages from the truth ─► fused ─► reranked

The legs run at the same time, each in a thread. One that cannot run, or is late, is left out and is missing in what
the answer says took part; so is the reranker. A passage that is gone from the truth is found no more.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, Protocol

import numpy as np

from appliance.core.encoders import RerankRequest, TextClassifiers
from appliance.core.errors import ApplianceError, DeadlineExceededError, InvalidRequestError
from appliance.core.retrieval import Explanation, Hit, SearchRequest, SearchResult
from appliance.core.types import EmbeddingModels, EmbeddingRequest
from appliance.core.words import passage_terms, query_terms
from appliance.retrieval.filters import Condition, condition
from appliance.retrieval.fuse import (
    CANDIDATES,
    LEAST_COSINE,
    Answer,
    Confidence,
    Found,
    confidence,
    fuse,
    joined,
    places,
    relevant,
    reordered,
    semantic_weight,
    within_budget,
    without_duplicates,
)
from appliance.retrieval.parts import Ids, Vectors
from appliance.retrieval.passages import Passages, Reading, Source, Target

LOGGER = logging.getLogger("appliance.retrieval")

MOST_QUERIES = 8
LONGEST_QUERY = 8192
"""Characters."""

MOST_HITS = 50
"""Of one page, as in OpenAI's API."""

SEMANTIC_TIMEOUT_S = 10.0
"""How long a hybrid search waits for its semantic leg, in which a model may have to be loaded."""

SEMANTIC_SHARE = 0.6
"""Of a search's own deadline: the same."""

_READ_TO_JUDGE = 3
"""The best passages of the keyword leg, whose words tell whether it found anything."""

LegName = Literal["keyword", "semantic", "rerank"]


class KeywordSearch(Protocol):
    """The keyword index, as far as it is searched."""

    def search(self, store: int, query: str, k: int, allowed: Ids | None = None) -> list[tuple[int, float]]:
        """Return chunk ids and BM25 scores, best first."""
        ...


class VectorSearch(Protocol):
    """The vector indexes, as far as they are searched."""

    def search(
        self, store: int, queries: Vectors, k: int, allowed: Ids | None = None
    ) -> Sequence[Sequence[tuple[int, float]]]:
        """Return chunk ids and cosines of each query, best first."""
        ...


@dataclass(frozen=True, slots=True)
class Reranking:
    """How the best hits are read again.

    Attributes:
        model: A cross-encoder; "" is none, and then nothing is reranked unless a request asks for it, which is refused.
        candidates: So many of the best are read.
        timeout_s: After so long the answer goes out as it is.
    """

    model: str = ""
    candidates: int = 24
    timeout_s: float = 1.0


@dataclass(frozen=True, slots=True)
class _Legs:
    """What each leg found for each query; None is a leg that took no part."""

    keyword: Sequence[Answer] | None
    semantic: Sequence[Answer] | None

    @property
    def names(self) -> list[LegName]:
        names: list[LegName] = []
        names += ["keyword"] if self.keyword is not None else []
        names += ["semantic"] if self.semantic is not None else []
        return names


class Search:
    """Searches vector stores: `VectorStores.search`, without what that notes of the store."""

    def __init__(
        self,
        passages: Passages,
        *,
        keywords: KeywordSearch,
        vectors: VectorSearch,
        embedders: EmbeddingModels,
        rerankers: TextClassifiers,
        reranking: Reranking = Reranking(),
    ) -> None:
        """Search with these parts; nothing is loaded yet."""
        self._passages = passages
        self._keywords = keywords
        self._vectors = vectors
        self._embedders = embedders
        self._rerankers = rerankers
        self._reranking = reranking

    async def search(self, request: SearchRequest) -> SearchResult:
        """Return passages, best first; see `core.retrieval.VectorStores.search`."""
        _check(request, self._reranking)
        try:
            async with asyncio.timeout(request.deadline_s):
                return await self._search(request)
        except TimeoutError as error:
            raise DeadlineExceededError(
                f"The search took longer than {request.deadline_s:g} s.",
                advice="Give it more time, search with fewer queries, or use the mode `keyword`.",
            ) from error

    async def _search(self, request: SearchRequest) -> SearchResult:
        where = None if request.filters is None else condition(request.filters)
        target = await asyncio.to_thread(self._passages.target, request.store, request.tenant)
        legs = await self._run_legs(request, target, where)
        reading, found = await asyncio.to_thread(self._look_up, request, target, legs, where)
        names = legs.names
        reranked = await self._rerank(request, found)
        if reranked is not None:
            found, names = reranked, [*names, "rerank"]
        found = [each for each in found if each.score >= request.threshold]
        found = joined(within_budget(found, request.most_tokens))
        page = found[request.after : request.after + request.limit]
        hits = [_hit(each, reading.sources[each.passage.file], explain=request.explain) for each in page]
        return SearchResult(hits, more=len(found) > request.after + request.limit, legs=names)

    # The legs

    async def _run_legs(self, request: SearchRequest, target: Target, where: Condition | None) -> _Legs:
        allowed: Ids | None = None
        if where is not None:
            allowed = await asyncio.to_thread(self._passages.allowed, target.key, where)
        async with asyncio.TaskGroup() as tasks:
            keyword = tasks.create_task(self._keyword_leg(request, target, allowed), name="keyword leg")
            semantic = tasks.create_task(self._semantic_leg(request, target, allowed), name="semantic leg")
        answers, meanings = keyword.result(), semantic.result()
        errors = [each for each in (answers, meanings) if isinstance(each, ApplianceError)]
        if errors and not any(isinstance(each, list) for each in (answers, meanings)):
            raise errors[0]
        for error in errors:
            LOGGER.warning("store %s is searched with one leg: %s", request.store, error)
        return _Legs(answers if isinstance(answers, list) else None, meanings if isinstance(meanings, list) else None)

    async def _keyword_leg(
        self, request: SearchRequest, target: Target, allowed: Ids | None
    ) -> list[Answer] | ApplianceError | None:
        if request.mode == "semantic":
            return None

        def search() -> list[Answer]:
            return [self._keywords.search(target.key, each, CANDIDATES, allowed) for each in request.queries]

        try:
            return await asyncio.to_thread(search)
        except ApplianceError as error:
            return error

    async def _semantic_leg(
        self, request: SearchRequest, target: Target, allowed: Ids | None
    ) -> list[Answer] | ApplianceError | None:
        if request.mode == "keyword" or not target.model:
            return None
        timeout_s = None if request.mode == "semantic" else SEMANTIC_TIMEOUT_S
        if timeout_s is not None and request.deadline_s is not None:
            timeout_s = min(timeout_s, SEMANTIC_SHARE * request.deadline_s)
        try:
            async with asyncio.timeout(timeout_s):
                queries = await self._embed(request, target.model)
                found = await asyncio.to_thread(self._vectors.search, target.key, queries, CANDIDATES, allowed)
        except TimeoutError:
            return DeadlineExceededError(f"The semantic leg took longer than {timeout_s:g} s.")
        except ApplianceError as error:
            return error
        return list(found) if any(found) else None  # a leg without any vector is not ready

    async def _embed(self, request: SearchRequest, model: str) -> Vectors:
        answer = await self._embedders.embed(
            EmbeddingRequest(
                model=model,
                inputs=list(request.queries),
                truncate=True,
                tenant=request.tenant,
                request_id=request.request_id,
            )
        )
        return np.array([np.frombuffer(each, np.float32) for each in answer.vectors])

    # What they found

    def _look_up(
        self, request: SearchRequest, target: Target, legs: _Legs, where: Condition | None
    ) -> tuple[Reading, list[Found]]:
        """Return the passages behind what was found, and their ranking; an empty one if nothing is relevant."""
        answers = [*(legs.keyword or ()), *(legs.semantic or ())]
        chunks = list(dict.fromkeys(chunk for answer in answers for chunk, _ in answer))
        reading = self._passages.read(target.key, chunks, where)
        legs = _kept(legs, reading)
        sure = _confidence(legs.keyword or (), reading, request.queries)
        complete = target.embedded and legs.semantic is not None
        found = places(legs.keyword or ()), places(legs.semantic or (), LEAST_COSINE)
        words, meanings = relevant(*found, sure, complete=complete)
        candidates = fuse(words, meanings, weight=semantic_weight(sure))
        return reading, without_duplicates(Found(reading.passages[each.chunk], each, each.score) for each in candidates)

    # Reranking

    async def _rerank(self, request: SearchRequest, found: list[Found]) -> list[Found] | None:
        """Return the ranking with the best ones in the reranker's order, or None if it is left out or late."""
        wanted = bool(self._reranking.model) if request.rerank is None else request.rerank
        best = found[: self._reranking.candidates]
        if not wanted or not best:
            return None
        try:
            async with asyncio.timeout(self._reranking.timeout_s):
                ranking = await self._rerankers.rerank(
                    RerankRequest(
                        model=self._reranking.model,
                        query=request.queries[0],
                        documents=[each.passage.text for each in best],
                        truncate=True,
                        tenant=request.tenant,
                        deadline_s=self._reranking.timeout_s,
                        request_id=request.request_id,
                    )
                )
        except TimeoutError:
            LOGGER.warning("reranking took longer than %g s and was left out", self._reranking.timeout_s)
            return None
        except ApplianceError as error:
            LOGGER.warning("reranking was left out: %s", error)
            return None
        return reordered(found, ranking.scores)


def _kept(legs: _Legs, reading: Reading) -> _Legs:
    """Leave out what is gone from the truth."""

    def kept(answers: Sequence[Answer] | None) -> Sequence[Answer] | None:
        if answers is None:
            return None
        return [[each for each in answer if each[0] in reading.passages] for answer in answers]

    return replace(legs, keyword=kept(legs.keyword), semantic=kept(legs.semantic))


def _confidence(answers: Sequence[Answer], reading: Reading, queries: Sequence[str]) -> Confidence:
    """Return how sure the keyword leg is, of the phrasing that it is surest of."""
    each_query = []
    for answer, query in zip(answers, queries, strict=False):
        texts = [reading.passages[chunk].text for chunk, _ in answer[:_READ_TO_JUDGE]]
        each_query.append(confidence(answer, query_terms(query), [passage_terms(each) for each in texts]))
    return max(each_query, default=Confidence(0.0, 1.0))


def _hit(found: Found, source: Source, *, explain: bool) -> Hit:
    passage, candidate = found.passage, found.candidate
    words, meaning = candidate.keyword, candidate.semantic
    explanation = Explanation(
        keyword_rank=words.rank if words else None,
        keyword_score=words.score if words else None,
        semantic_rank=meaning.rank if meaning else None,
        semantic_score=meaning.score if meaning else None,
        fused_score=candidate.score,
        rerank_score=found.rerank_score,
    )
    return Hit(
        file=source.file,
        filename=source.filename,
        score=found.score,
        text=passage.text,
        start=passage.start,
        end=passage.end,
        page=passage.page,
        heading=passage.heading,
        attributes=source.attributes,
        explanation=explanation if explain else None,
    )


def _check(request: SearchRequest, reranking: Reranking) -> None:
    count = len(request.queries)
    if not 1 <= count <= MOST_QUERIES:
        raise _bad("query", f"A search has {count} queries.", f"Give 1 to {MOST_QUERIES} phrasings of one question.")
    for query in request.queries:
        if not query.strip() or len(query) > LONGEST_QUERY:
            raise _bad(
                "query", f"A query has {len(query):,} characters.", f"Give 1 to {LONGEST_QUERY:,}, not all blank."
            )
    if not 1 <= request.limit <= MOST_HITS or request.after < 0:
        raise _bad(
            "max_num_results",
            f"{request.limit} hits after {request.after} are asked for.",
            f"Ask for 1 to {MOST_HITS}.",
        )
    if not 0 <= request.threshold <= 1:
        raise _bad("score_threshold", f"The least score is {request.threshold:g}.", "Scores are from 0 to 1.")
    if request.rerank and not reranking.model:
        raise _bad("ranker", "This appliance has no model to rerank with.", "Search without.")


def _bad(param: str, message: str, advice: str) -> InvalidRequestError:
    return InvalidRequestError(message, advice=advice, param=param)
