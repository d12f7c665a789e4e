"""`POST /v1/rerank`: documents in the order of how well they answer a query, in the shape of Jina's and Cohere's."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from typing import Annotated, Any, Literal

import anyio.to_thread
import msgspec
from msgspec import UNSET, Meta, UnsetType
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp

from appliance.api.openai.completions import TextPrompt
from appliance.api.openai.embeddings import InputUsage
from appliance.api.openai.sampling import ModelName, TokenCount, check_prompt_length
from appliance.core.encoders import Ranking, RerankRequest, TextClassifiers
from appliance.core.errors import InvalidRequestError
from appliance.core.settings import Settings
from appliance.web.body import DECODE_IN_THREAD_BYTES, read_json
from appliance.web.disconnect import until_disconnected
from appliance.web.wire import Text, convert, ignored, meaning, refused

WHOLE_DOCUMENTS = "documents are read whole, or cut to what the model reads if `truncate` asks for it."


class TextDocument(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A document as an object."""

    text: TextPrompt


class RerankingRequest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A request to rerank: the fields of Jina's and Cohere's, and our extension `truncate`."""

    query: Annotated[TextPrompt, meaning("What the documents are to answer")]
    documents: Annotated[
        Annotated[list[TextPrompt | TextDocument], Meta(min_length=1)],
        meaning("Texts, or objects with a `text`"),
    ]
    model: Annotated[
        ModelName | None,
        meaning("`name` or `name:version` of a cross-encoder, or of a model that embeds; a setting unless given"),
    ] = None
    top_n: Annotated[TokenCount | None, meaning("Return so many of the best; all unless given")] = None
    return_documents: Annotated[bool | None, meaning("Return each document beside its score")] = None
    truncate: Annotated[bool | None, meaning("Extension: cut documents that are too long instead of refusing them")] = (
        None
    )
    max_tokens_per_doc: Annotated[None, refused(WHOLE_DOCUMENTS)] = None
    max_chunks_per_doc: Annotated[None, refused(WHOLE_DOCUMENTS)] = None
    rank_fields: Annotated[None, refused("documents have one text.")] = None
    user: Annotated[Text | None, ignored("names the end user")] = None


class RerankResult(msgspec.Struct, frozen=True):
    """One document.

    Attributes:
        index: Its place in the request.
        relevance_score: The higher the better: 0 to 1 from a cross-encoder, -1 to 1 from embeddings.
        document: Its text, if the request asks for it.
    """

    index: int
    relevance_score: float
    document: TextDocument | UnsetType = UNSET


class RerankResponse(msgspec.Struct, frozen=True, kw_only=True):
    """The documents, the best first.

    Attributes:
        results: As many as `top_n` allows; equal ones stay in the order of the request.
        method: Extension: whether a cross-encoder read query and document together, or their embeddings were compared.
        truncated: Extension: indices of the documents that were cut.
    """

    id: str
    model: str
    results: list[RerankResult]
    usage: InputUsage
    method: Literal["cross-encoder", "embedding"]
    truncated: list[int]
    object: Literal["list"] = "list"


class RerankResource:
    """The resource."""

    def __init__(self, classifiers: TextClassifiers, settings: Settings) -> None:
        self._classifiers = classifiers
        self._settings = settings

    async def create(self, request: Request) -> ASGIApp:
        """Answer with the documents in order; the client's leaving ends the work.

        Raises:
            ApplianceError: The request will not do, or as `TextClassifiers.rerank`.
        """
        fields = await read_json(request, self._check)
        state = request.scope["state"]
        state["model"] = fields.model or self._settings.embedding_model
        documents = texts_of(fields)
        work = RerankRequest(
            model=fields.model or "",
            query=fields.query,
            documents=documents,
            truncate=bool(fields.truncate),
            tenant=state.get("tenant", ""),
            deadline_s=self._settings.request_timeout_s,
            request_id=state["request_id"],
        )
        ranking = await until_disconnected(request.receive, self._classifiers.rerank(work))
        kept = documents if fields.return_documents else ()
        if sum(map(len, kept)) > DECODE_IN_THREAD_BYTES:
            body = await anyio.to_thread.run_sync(encoded, ranking, kept, fields.top_n)
        else:
            body = encoded(ranking, kept, fields.top_n)
        return Response(body, media_type="application/json")

    def _check(self, document: Any) -> RerankingRequest:
        fields = convert(document, RerankingRequest)
        limit = self._settings.max_rerank_documents
        if len(fields.documents) > limit:
            raise InvalidRequestError(
                f"There are {len(fields.documents)} documents; {limit} are allowed in one request.",
                advice="Send several requests, or raise max_rerank_documents.",
                param="documents",
                code="invalid_value",
            )
        characters = len(fields.query) + sum(map(len, texts_of(fields)))
        check_prompt_length(characters, self._settings, "documents")
        return fields


def texts_of(fields: RerankingRequest) -> list[str]:
    """Return the documents' texts."""
    return [each if isinstance(each, str) else each.text for each in fields.documents]


def best_first(scores: Sequence[float], top_n: int | None) -> list[int]:
    """Return the indices of the best scores, the best first and equal ones in order."""
    return sorted(range(len(scores)), key=lambda index: -scores[index])[:top_n]


def encoded(ranking: Ranking, documents: Sequence[str], top_n: int | None) -> bytes:
    """Return the body of the answer, with the documents that are given."""
    results = [
        RerankResult(index, ranking.scores[index], TextDocument(documents[index]) if documents else UNSET)
        for index in best_first(ranking.scores, top_n)
    ]
    response = RerankResponse(
        id=f"rerank-{secrets.token_hex(12)}",
        model=ranking.model,
        results=results,
        usage=InputUsage.of(ranking.token_counts),
        method=ranking.method,
        truncated=list(ranking.truncated),
    )
    return msgspec.json.encode(response)
