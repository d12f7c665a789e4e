"""What models for reranking and classification are asked and answer. Durations are seconds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol


@dataclass(frozen=True, slots=True)
class RerankRequest:
    """Documents to be ordered by how well they answer a query.

    Attributes:
        model: `name` or `name:version` of a cross-encoder, or of any model that embeds; "" is the one of the settings.
        truncate: Cut documents that are too long instead of refusing them.
        tenant: The API key's id, or "" on an open loopback server.
        deadline_s: Seconds from now after which the work is given up, or None.
        request_id: As in `X-Request-Id`, for the log.
    """

    model: str
    query: str
    documents: Sequence[str]
    truncate: bool = False
    tenant: str = ""
    deadline_s: float | None = None
    request_id: str = ""


@dataclass(frozen=True, slots=True)
class Ranking:
    """The answer to a `RerankRequest`.

    Attributes:
        model: The full `name:version` that answers.
        method: Whether query and document were read together, or their embeddings compared (cosine).
        scores: One for each document, in order; the higher the better, 0 to 1 from a cross-encoder, -1 to 1 else.
        token_counts: Tokens evaluated for each document, those of the query with a cross-encoder included.
        truncated: Indices of the documents that were cut.
    """

    model: str
    method: Literal["cross-encoder", "embedding"]
    scores: Sequence[float]
    token_counts: Sequence[int]
    truncated: Sequence[int] = ()


@dataclass(frozen=True, slots=True)
class ClassificationRequest:
    """Texts to classify; the fields are those of `RerankRequest`."""

    model: str
    inputs: Sequence[str]
    truncate: bool = False
    tenant: str = ""
    deadline_s: float | None = None
    request_id: str = ""


@dataclass(frozen=True, slots=True)
class Classifications:
    """The answer to a `ClassificationRequest`.

    Attributes:
        model: The full `name:version` that answers.
        labels: The model's labels, in its order.
        exclusive: The probabilities of an input add up to 1 (softmax); otherwise each label stands alone (sigmoid).
        probabilities: For each input one probability for each label.
        token_counts: Tokens evaluated for each input.
        truncated: Indices of the inputs that were cut.
    """

    model: str
    labels: Sequence[str]
    exclusive: bool
    probabilities: Sequence[Sequence[float]]
    token_counts: Sequence[int]
    truncated: Sequence[int] = ()


class TextClassifiers(Protocol):
    """Whatever reranks and classifies, as the doors see it. Cancelling ends the work and disturbs nobody else's."""

    async def rerank(self, request: RerankRequest) -> Ranking:
        """Return a score for each document; raises as `core.types.EmbeddingModels.embed`."""
        ...

    async def classify(self, request: ClassificationRequest) -> Classifications:
        """Return probabilities for each input; raises as `core.types.EmbeddingModels.embed`."""
        ...
