"""The tool `file_search`: passages of vector stores, with OpenAI's parameters.

{"type": "file_search", "vector_store_ids": ["vs_1"], "max_num_results": 5,
 "filters": {"type": "eq", "key": "lang", "value": "en"}, "ranking_options": {"score_threshold": 0.2}}
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Annotated, Any, Literal, Protocol

import msgspec
from msgspec import Meta

from appliance.agents.citations import noted, written
from appliance.agents.definitions import bad_definition, read_definition
from appliance.core.errors import DeadlineExceededError, NotFoundError
from appliance.core.retrieval import Comparison, Compound, Filter, Hit, SearchRequest, SearchResult, VectorStore
from appliance.core.tools import Tool, ToolResult

LABEL = "file_search"
DEFAULT_RESULTS = 5
"""OpenAI's is 20; the models here read thousands of tokens, not hundreds of thousands."""
MOST_DEPTH = 8
MOST_QUERY_CHARACTERS = 4096
MOST_STORES = 8

_PARAMETERS = {
    "type": "object",
    "properties": {"query": {"type": "string", "description": "What to look for, in a few words"}},
    "required": ["query"],
    "additionalProperties": False,
}
_DESCRIPTION = "Searches the user's files and returns numbered passages."


class Stores(Protocol):
    """What is searched; part of `core.retrieval.VectorStores`."""

    def get(self, store: str, *, tenant: str) -> VectorStore:
        """Return one store. Raises NotFoundError."""
        ...

    async def search(self, request: SearchRequest) -> SearchResult:
        """Return passages, best first."""
        ...


class HybridSearch(msgspec.Struct, frozen=True):
    """OpenAI's weights of the two legs; here both always count the same."""

    embedding_weight: float | None = None
    text_weight: float | None = None


class RankingOptions(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How hits are ranked; any ranker's name stands for the one that the box has."""

    ranker: str | None = None
    score_threshold: Annotated[float, Meta(ge=0, le=1)] = 0.0
    hybrid_search: HybridSearch | None = None


class FileSearchDefinition(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The tool as a request describes it."""

    type: Literal["file_search"]
    vector_store_ids: Annotated[list[str], Meta(min_length=1, max_length=MOST_STORES)]
    max_num_results: Annotated[int, Meta(ge=1, le=50)] = DEFAULT_RESULTS
    filters: dict[str, Any] | None = None
    ranking_options: RankingOptions | None = None


class FileSearchTools:
    """Makes the tool; an `agents.registry.ToolFactory`."""

    def __init__(self, stores: Stores) -> None:
        self._stores = stores

    async def __call__(self, definition: Mapping[str, Any], *, tenant: str, request_id: str) -> FileSearch:
        """Return the tool for a request."""
        wanted = read_definition(definition, FileSearchDefinition)
        names = tuple(dict.fromkeys(wanted.vector_store_ids))
        for name in names:
            try:
                self._stores.get(name, tenant=tenant)
            except NotFoundError as error:
                error.param = "tools"
                raise
        options = wanted.ranking_options or RankingOptions()
        search = SearchRequest(
            store=names[0],
            queries=(),
            tenant=tenant,
            limit=wanted.max_num_results,
            filters=None if wanted.filters is None else read_filter(wanted.filters),
            rerank=False if options.ranker == "none" else None,
            threshold=options.score_threshold,
            request_id=request_id,
        )
        return FileSearch(self._stores, names, search)


class FileSearch:
    """Searches for one response; a `core.tools.BuiltInTool`."""

    def __init__(self, stores: Stores, names: Sequence[str], search: SearchRequest) -> None:
        self._stores = stores
        self._names = names
        self._search = search
        self._next = 1

    @property
    def label(self) -> str:
        """Return `file_search`."""
        return LABEL

    @property
    def tools(self) -> Sequence[Tool]:
        """Return the one tool."""
        return (Tool(LABEL, _DESCRIPTION, _PARAMETERS),)

    def needs_approval(self, name: str) -> bool:
        """Return False: what belongs to a tenant it may read."""
        del name
        return False

    def number_from(self, number: int) -> None:
        """Give the next passage that number; those below it have been given."""
        self._next = number

    async def call(
        self, name: str, arguments: Mapping[str, Any], *, tenant: str, deadline_s: float, request_id: str
    ) -> ToolResult:
        """Search every store; see `core.tools.BuiltInTool.call`."""
        del name, tenant, request_id
        query = arguments.get("query")
        if not isinstance(query, str) or not query.strip() or len(query) > MOST_QUERY_CHARACTERS:
            return ToolResult("bad_arguments", f"query is a text of 1 to {MOST_QUERY_CHARACTERS} characters.")
        try:
            hits = await self._hits(query, deadline_s)
        except DeadlineExceededError as error:
            return ToolResult("timeout", str(error))
        first = self._next
        self._next += len(hits)
        details = {"citations": noted(hits, first), "results": [_shown(each) for each in hits]}
        return ToolResult("ok", written(hits, first), details)

    async def _hits(self, query: str, deadline_s: float) -> Sequence[Hit]:
        wanted = replace(self._search, queries=(query,), deadline_s=deadline_s)
        hits: list[Hit] = []
        for name in self._names:
            hits += (await self._stores.search(replace(wanted, store=name))).hits
        return sorted(hits, key=lambda hit: -hit.score)[: self._search.limit]


def read_filter(document: Mapping[str, Any], depth: int = 1) -> Filter:
    """Return a filter of OpenAI's; how many comparisons there may be is the room of retrieval's business.

    Raises:
        InvalidRequestError: It is none.
    """
    match document:
        case {"type": "and" | "or" as kind, "filters": [_, *_] as inner} if depth < MOST_DEPTH and len(document) == 2:
            return Compound(kind, tuple(read_filter(each, depth + 1) for each in inner if _is_filter(each)))
        case {"type": "in" | "nin" as kind, "key": str(key), "value": [*values]} if all(map(_is_value, values)):
            return Comparison(kind, key, tuple(values))
        case {"type": "eq" | "ne" | "gt" | "gte" | "lt" | "lte" as kind, "key": str(key), "value": value} if _is_value(
            value
        ):
            return Comparison(kind, key, value)
    raise bad_definition(LABEL, "`filters` has a part that is no comparison and no compound of some.")


def _is_filter(value: Any) -> bool:
    if not isinstance(value, dict):
        raise bad_definition(LABEL, "`filters` has a part that is no object.")
    return True


def _is_value(value: Any) -> bool:
    return isinstance(value, str | int | float)


def _shown(hit: Hit) -> dict[str, Any]:
    return {
        "file_id": hit.file,
        "filename": hit.filename,
        "score": hit.score,
        "text": hit.text,
        "attributes": dict(hit.attributes),
    }
