"""`POST /v1/embeddings`: texts or token ids become vectors."""

from __future__ import annotations

import base64
import sys
from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, Literal

import anyio.to_thread
import msgspec
from msgspec import Meta
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp

from appliance.api.openai.completions import TextPrompt, Texts, TokenLists, TokenPrompt, one_by_one
from appliance.api.openai.sampling import ModelName, TokenId, check_prompt_length
from appliance.core.errors import InvalidRequestError
from appliance.core.settings import Settings
from appliance.core.types import EmbeddingInput, EmbeddingModels, EmbeddingRequest, Embeddings, Priority, Vector
from appliance.web.body import read_json
from appliance.web.disconnect import until_disconnected
from appliance.web.wire import Text, convert, ignored, meaning

ENCODE_IN_THREAD_NUMBERS = 20_000
"""Answers with more numbers are written in a thread: so many take some milliseconds."""


class EmbeddingsRequest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A request for embeddings: OpenAI's fields, and our extension `truncate`."""

    model: Annotated[ModelName, meaning("`name` or `name:version` of a registered model")]
    input: Annotated[
        TextPrompt | Annotated[list[TokenId | TextPrompt | TokenPrompt], Meta(min_length=1)],
        meaning("A text, texts, a list of token ids, or lists of token ids"),
    ]
    encoding_format: Annotated[
        Literal["float", "base64"] | None,
        meaning("`base64` is of little-endian 32-bit floats; `float` unless given"),
    ] = None
    dimensions: Annotated[
        Annotated[int, Meta(ge=1, le=16_384)] | None,
        meaning("Numbers of a vector; another than the model's own only where the model was trained for it"),
    ] = None
    truncate: Annotated[bool | None, meaning("Extension: cut inputs that are too long instead of refusing them")] = None
    user: Annotated[Text | None, ignored("names the end user")] = None

    schema_alternatives: ClassVar[dict[str, tuple[Any, ...]]] = {
        "input": (TextPrompt, Texts, TokenPrompt, TokenLists),
    }
    """The types of a field where one msgspec type says too little: a list is of one kind throughout."""


class Embedding(msgspec.Struct, frozen=True):
    """One input's vector, of length 1: numbers, or the base64 of little-endian 32-bit floats."""

    index: int
    embedding: list[float] | str
    object: Literal["embedding"] = "embedding"


class InputUsage(msgspec.Struct, frozen=True):
    """Tokens of all inputs as they were evaluated."""

    prompt_tokens: int
    total_tokens: int

    @classmethod
    def of(cls, token_counts: Sequence[int]) -> InputUsage:
        """Return the sums of what each input took."""
        tokens = sum(token_counts)
        return cls(tokens, tokens)


class EmbeddingList(msgspec.Struct, frozen=True):
    """A vector for each input, in order.

    Attributes:
        truncated: Extension: indices of the inputs that were cut.
    """

    data: list[Embedding]
    model: str
    usage: InputUsage
    truncated: list[int]
    object: Literal["list"] = "list"


class EmbeddingResource:
    """The resource."""

    def __init__(self, models: EmbeddingModels, settings: Settings) -> None:
        self._models = models
        self._settings = settings

    async def create(self, request: Request) -> ASGIApp:
        """Answer with a vector for each input; the client's leaving ends the work.

        Raises:
            ApplianceError: The request will not do, or as `EmbeddingModels.embed`.
        """
        fields = await read_json(request, self._check)
        state = request.scope["state"]
        state["model"] = fields.model
        work = EmbeddingRequest(
            model=fields.model,
            inputs=inputs_of(fields, self._settings),
            truncate=bool(fields.truncate),
            dimensions=fields.dimensions,
            priority=max(Priority.DEFAULT, state.get("highest_tier", Priority.DEFAULT)),
            tenant=state.get("tenant", ""),
            deadline_s=self._settings.request_timeout_s,
            request_id=state["request_id"],
        )
        embeddings = await until_disconnected(request.receive, self._models.embed(work))
        as_base64 = fields.encoding_format == "base64"
        if sum(map(len, embeddings.vectors)) > ENCODE_IN_THREAD_NUMBERS:
            body = await anyio.to_thread.run_sync(encoded, embeddings, as_base64)
        else:
            body = encoded(embeddings, as_base64)
        return Response(body, media_type="application/json")

    def _check(self, document: Any) -> EmbeddingsRequest:
        fields = convert(document, EmbeddingsRequest)
        inputs_of(fields, self._settings)
        return fields


def inputs_of(fields: EmbeddingsRequest, settings: Settings) -> list[EmbeddingInput]:
    """Return the inputs one by one.

    Raises:
        InvalidRequestError: The list mixes texts and tokens, or there are too many inputs or characters.
    """
    inputs = one_by_one(fields.input, "input")
    if len(inputs) > settings.max_embedding_inputs:
        raise InvalidRequestError(
            f"There are {len(inputs)} inputs; {settings.max_embedding_inputs} are allowed in one request.",
            advice="Send several requests, or raise max_embedding_inputs.",
            param="input",
            code="invalid_value",
        )
    check_prompt_length(sum(len(each) for each in inputs), settings, "input")
    return inputs


def encoded(embeddings: Embeddings, as_base64: bool) -> bytes:
    """Return the body of the answer."""
    write = _base64 if as_base64 else _numbers
    data = [Embedding(index, write(vector)) for index, vector in enumerate(embeddings.vectors)]
    usage = InputUsage.of(embeddings.token_counts)
    return msgspec.json.encode(EmbeddingList(data, embeddings.model, usage, list(embeddings.truncated)))


def _numbers(vector: Vector) -> list[float]:
    return vector.tolist()


def _base64(vector: Vector) -> str:
    if sys.byteorder == "big":
        vector = vector[:]
        vector.byteswap()
    return base64.b64encode(vector).decode()
