"""`POST /v1/vector_stores/{id}/search`: passages that answer a query, best first."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Annotated, Any, Literal

import msgspec
from msgspec import UNSET, Meta, UnsetType
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp

from appliance.api.openai.files import tenant_of
from appliance.api.openai.sampling import Share, TimeLimit, TokenCount
from appliance.api.openai.vector_store_wire import Integer, Key, TextPart
from appliance.core.errors import InvalidRequestError
from appliance.core.retrieval import (
    AttributeValue,
    Comparison,
    Compound,
    Explanation,
    Filter,
    Hit,
    SearchRequest,
    SearchResult,
    VectorStores,
)
from appliance.core.settings import Settings
from appliance.web.body import read_json
from appliance.web.disconnect import until_disconnected
from appliance.web.wire import Text, convert, meaning, refused

MOST_DEPTH = 8
MOST_FILTERS = 64
MOST_VALUES = 1000
FURTHEST = 1000
"""Hits that pages may skip."""

Query = Annotated[Text, Meta(min_length=1, max_length=8192)]
FilterText = Annotated[Text, Meta(max_length=512)]
FilterValue = FilterText | bool | Integer | float


class SearchFilter(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A condition on one attribute (`key` and `value`), or `and` and `or` of several (`filters`), which are like it.

    Those are checked one by one, so that a hostile filter is not walked to its end.
    """

    type: Literal["eq", "ne", "gt", "gte", "lt", "lte", "in", "nin", "and", "or"]
    key: Key | UnsetType = UNSET
    value: FilterValue | Annotated[list[FilterValue], Meta(min_length=1, max_length=MOST_VALUES)] | UnsetType = UNSET
    filters: Annotated[list[dict[str, Any]], Meta(min_length=1, max_length=MOST_FILTERS)] | UnsetType = UNSET


class HybridWeights(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How much each leg counts: both alike, or one not at all."""

    embedding_weight: Annotated[float, Meta(ge=0, le=1_000)]
    text_weight: Annotated[float, Meta(ge=0, le=1_000)]


class RankingOptions(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How hits are ordered and which are left out."""

    ranker: Annotated[
        Literal["auto", "none", "default-2024-11-15"] | None,
        meaning("`none` reads no candidate again; the others do where a reranker is set"),
    ] = None
    score_threshold: Annotated[Share | None, meaning("Least score of a hit")] = None
    hybrid_search: Annotated[HybridWeights | None, meaning("Equal weights, or 0 to leave a leg out")] = None


class VectorStoreSearchRequest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A search: OpenAI's fields, and our extensions `after`, `mode`, `max_tokens`, `explain` and `timeout_s`."""

    query: Annotated[
        Query | Annotated[list[Query], Meta(min_length=1, max_length=8)],
        meaning("What to look for; several phrasings of one question count by their best"),
    ]
    max_num_results: Annotated[Annotated[int, Meta(ge=1, le=50)] | None, meaning("Most hits; 10 unless given")] = None
    filters: Annotated[SearchFilter | None, meaning("Only files whose attributes fit")] = None
    ranking_options: Annotated[RankingOptions | None, meaning("How hits are ordered")] = None
    rewrite_query: Annotated[Literal[False] | None, refused("queries are searched as they are.")] = None
    after: Annotated[
        Annotated[str, Meta(pattern="^[0-9]{1,4}$")] | None, meaning("Extension: `next_page` of the page before")
    ] = None
    mode: Annotated[
        Literal["hybrid", "keyword", "semantic"] | None, meaning("Extension: which legs search; `hybrid` unless given")
    ] = None
    max_tokens: Annotated[TokenCount | None, meaning("Extension: most tokens of all hits together")] = None
    explain: Annotated[bool | None, meaning("Extension: say how each hit was found")] = None
    timeout_s: Annotated[TimeLimit | None, meaning("Extension: give up after so many seconds")] = None


class HitExplanation(msgspec.Struct, frozen=True, kw_only=True):
    """How a hit was found: its rank from 1 and its score in each leg, null where a leg did not find it."""

    keyword_rank: int | None
    keyword_score: float | None
    semantic_rank: int | None
    semantic_score: float | None
    fused_score: float
    rerank_score: float | None


class SearchHit(msgspec.Struct, frozen=True, kw_only=True):
    """A passage that was found; the fields behind `content` are extensions.

    Attributes:
        score: 0 to 1, comparable within one answer only.
        page: From 1, null where the format has none.
        heading: The headings above it, outermost first.
        start: Where it begins in the text taken from the file, in characters; `end` is behind its last.
        explanation: If the request asks for it.
    """

    file_id: str
    filename: str
    score: float
    attributes: dict[str, str | bool | int | float]
    content: list[TextPart]
    page: int | None
    heading: list[str]
    start: int
    end: int
    explanation: HitExplanation | UnsetType = UNSET


class SearchPage(msgspec.Struct, frozen=True, kw_only=True):
    """The hits, best first; nothing relevant is an empty list.

    Attributes:
        next_page: Extension of meaning: what `after` takes.
        legs: Extension: what took part; one that is not ready, or missed its deadline, is missing here.
    """

    object: Literal["vector_store.search_results.page"] = "vector_store.search_results.page"
    search_query: list[str]
    data: list[SearchHit]
    has_more: bool
    next_page: str | None
    legs: list[Literal["keyword", "semantic", "rerank"]]


class VectorStoreSearchResource:
    """The resource."""

    def __init__(self, stores: VectorStores, settings: Settings) -> None:
        self._stores = stores
        self._settings = settings

    async def create(self, request: Request) -> ASGIApp:
        """Answer with passages; the client's leaving ends the search.

        Raises:
            ApplianceError: The request will not do, or as `VectorStores.search`.
        """
        fields = await read_json(request, lambda document: convert(document, VectorStoreSearchRequest))
        wanted = self._search(fields, request)
        result = await until_disconnected(request.receive, self._stores.search(wanted))
        return Response(msgspec.json.encode(_page(wanted, result)), media_type="application/json")

    def _search(self, fields: VectorStoreSearchRequest, request: Request) -> SearchRequest:
        ranking = fields.ranking_options or RankingOptions()
        return SearchRequest(
            store=request.path_params["vector_store_id"],
            queries=[fields.query] if isinstance(fields.query, str) else fields.query,
            tenant=tenant_of(request),
            limit=fields.max_num_results or 10,
            after=_skipped(fields.after),
            filters=None if fields.filters is None else checked_filter(fields.filters),
            mode=fields.mode or _mode(ranking.hybrid_search),
            rerank=False if ranking.ranker == "none" else None,
            threshold=ranking.score_threshold or 0.0,
            most_tokens=fields.max_tokens,
            explain=bool(fields.explain),
            deadline_s=min(fields.timeout_s or self._settings.request_timeout_s, self._settings.request_timeout_s),
            request_id=request.scope["state"]["request_id"],
        )


def _skipped(after: str | None) -> int:
    skipped = int(after or "0")
    if skipped > FURTHEST:
        raise InvalidRequestError(
            f"`after` skips {skipped} hits; {FURTHEST} is the most.", param="after", code="invalid_value"
        )
    return skipped


def _mode(weights: HybridWeights | None) -> Literal["hybrid", "keyword", "semantic"]:
    """Return the legs that weights ask for.

    Raises:
        InvalidRequestError: They are neither equal nor is one of them 0.
    """
    if weights is None:
        return "hybrid"
    meaning_weight, word_weight = weights.embedding_weight, weights.text_weight
    if meaning_weight == word_weight and meaning_weight > 0:
        return "hybrid"
    if (meaning_weight == 0) == (word_weight == 0):
        raise InvalidRequestError(
            f"The weights {meaning_weight:g} and {word_weight:g} are not supported: the legs count alike.",
            advice="Give equal weights, or 0 to the leg that is to be left out.",
            param="ranking_options.hybrid_search",
            code="unsupported_parameter",
        )
    return "keyword" if meaning_weight == 0 else "semantic"


def checked_filter(wanted: SearchFilter) -> Filter:
    """Return a filter as searches know it.

    Raises:
        InvalidRequestError: It is too deep, has too many conditions, or one of them is not whole.
    """
    return _converted(wanted, 1, itertools.count(1))


def _converted(wanted: SearchFilter, depth: int, seen: Iterator[int]) -> Filter:
    """Check one condition and what is in it; nothing is walked beyond the bounds."""
    if depth > MOST_DEPTH:
        raise _bad(f"has conditions in each other more than {MOST_DEPTH} deep")
    if next(seen) > MOST_FILTERS:
        raise _bad(f"has more than {MOST_FILTERS} conditions")
    if wanted.type == "and" or wanted.type == "or":  # noqa: PLR1714  (the type checker narrows by each)
        if isinstance(wanted.filters, UnsetType) or wanted.key is not UNSET or wanted.value is not UNSET:
            raise _bad(f"of the type {wanted.type!r} has `filters` and nothing else")
        inner = (_converted(convert(each, SearchFilter), depth + 1, seen) for each in wanted.filters)
        return Compound(wanted.type, tuple(inner))
    return _comparison(wanted)


def _comparison(wanted: SearchFilter) -> Comparison:
    key, value = wanted.key, wanted.value
    if isinstance(key, UnsetType) or isinstance(value, UnsetType) or wanted.filters is not UNSET:
        raise _bad(f"of the type {wanted.type!r} has `key` and `value` and nothing else")
    compared: AttributeValue | tuple[AttributeValue, ...] = tuple(value) if isinstance(value, list) else value
    if isinstance(compared, tuple) != (wanted.type in ("in", "nin")):
        raise _bad(f"of the type {wanted.type!r} takes {'one value' if isinstance(compared, tuple) else 'a list'}")
    if isinstance(compared, bool) and wanted.type not in ("eq", "ne"):
        raise _bad(f"of the type {wanted.type!r} compares {key!r} with a truth value, which has no order")
    assert wanted.type != "and"
    assert wanted.type != "or"
    return Comparison(wanted.type, key, compared)


def _bad(problem: str) -> InvalidRequestError:
    return InvalidRequestError(f"A filter {problem}.", param="filters", code="invalid_value")


def _page(wanted: SearchRequest, result: SearchResult) -> SearchPage:
    behind = wanted.after + len(result.hits)
    more = result.more and behind <= FURTHEST
    return SearchPage(
        search_query=list(wanted.queries),
        data=[_hit(each) for each in result.hits],
        has_more=more,
        next_page=str(behind) if more else None,
        legs=list(result.legs),
    )


def _hit(hit: Hit) -> SearchHit:
    return SearchHit(
        file_id=hit.file,
        filename=hit.filename,
        score=hit.score,
        attributes=dict(hit.attributes),
        content=[TextPart(text=hit.text)],
        page=hit.page,
        heading=list(hit.heading),
        start=hit.start,
        end=hit.end,
        explanation=UNSET if hit.explanation is None else _explanation(hit.explanation),
    )


def _explanation(found: Explanation) -> HitExplanation:
    return HitExplanation(
        keyword_rank=found.keyword_rank,
        keyword_score=found.keyword_score,
        semantic_rank=found.semantic_rank,
        semantic_score=found.semantic_score,
        fused_score=found.fused_score,
        rerank_score=found.rerank_score,
    )
