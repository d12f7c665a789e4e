"""`POST /v1/classify`: the labels of texts, and how likely each is. The shape is that of vLLM's `/classify`."""

from __future__ import annotations

import secrets
import time
from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, Literal

import anyio.to_thread
import msgspec
from msgspec import Meta
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp

from appliance.api.openai.completions import TextPrompt, Texts
from appliance.api.openai.embeddings import ENCODE_IN_THREAD_NUMBERS, InputUsage
from appliance.api.openai.sampling import ModelName, check_prompt_length
from appliance.core.encoders import ClassificationRequest, Classifications, TextClassifiers
from appliance.core.errors import InvalidRequestError
from appliance.core.settings import Settings
from appliance.web.body import read_json
from appliance.web.disconnect import until_disconnected
from appliance.web.wire import Text, convert, ignored, meaning


class ClassifyRequest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Texts to classify: vLLM's fields, and our extension `truncate`."""

    model: Annotated[ModelName, meaning("`name` or `name:version` of a model that classifies")]
    input: Annotated[TextPrompt | Annotated[list[TextPrompt], Meta(min_length=1)], meaning("A text, or texts")]
    truncate: Annotated[bool | None, meaning("Extension: cut inputs that are too long instead of refusing them")] = None
    user: Annotated[Text | None, ignored("names the end user")] = None

    schema_alternatives: ClassVar[dict[str, tuple[Any, ...]]] = {"input": (TextPrompt, Texts)}
    """The types of a field where one msgspec type says too little."""


class LabelScore(msgspec.Struct, frozen=True):
    """One label and its probability, 0 to 1."""

    label: str
    score: float


class Classification(msgspec.Struct, frozen=True, kw_only=True):
    """One input's labels.

    Attributes:
        label: The likeliest.
        score: Its probability, 0 to 1.
        scores: Extension: every label with its probability, the likeliest first.
        probs: The same probabilities in the model's order of labels.
        num_classes: How many labels there are.
    """

    index: int
    label: str
    score: float
    scores: list[LabelScore]
    probs: list[float]
    num_classes: int


class ClassificationList(msgspec.Struct, frozen=True, kw_only=True):
    """What was found for each input, in order.

    Attributes:
        exclusive: Extension: an input's probabilities add up to 1; otherwise each label stands alone.
        truncated: Extension: indices of the inputs that were cut.
    """

    id: str
    created: int
    model: str
    data: list[Classification]
    usage: InputUsage
    exclusive: bool
    truncated: list[int]
    object: Literal["list"] = "list"


class ClassifyResource:
    """The resource."""

    def __init__(self, classifiers: TextClassifiers, settings: Settings) -> None:
        self._classifiers = classifiers
        self._settings = settings

    async def create(self, request: Request) -> ASGIApp:
        """Answer with the labels of each input; the client's leaving ends the work.

        Raises:
            ApplianceError: The request will not do, or as `TextClassifiers.classify`.
        """
        fields = await read_json(request, self._check)
        state = request.scope["state"]
        state["model"] = fields.model
        work = ClassificationRequest(
            model=fields.model,
            inputs=texts_of(fields),
            truncate=bool(fields.truncate),
            tenant=state.get("tenant", ""),
            deadline_s=self._settings.request_timeout_s,
            request_id=state["request_id"],
        )
        found = await until_disconnected(request.receive, self._classifiers.classify(work))
        if len(found.probabilities) * len(found.labels) > ENCODE_IN_THREAD_NUMBERS:
            body = await anyio.to_thread.run_sync(encoded, found)
        else:
            body = encoded(found)
        return Response(body, media_type="application/json")

    def _check(self, document: Any) -> ClassifyRequest:
        fields = convert(document, ClassifyRequest)
        texts, limit = texts_of(fields), self._settings.max_rerank_documents
        if len(texts) > limit:
            raise InvalidRequestError(
                f"There are {len(texts)} inputs; {limit} are allowed in one request.",
                advice="Send several requests, or raise max_rerank_documents.",
                param="input",
                code="invalid_value",
            )
        check_prompt_length(sum(map(len, texts)), self._settings, "input")
        return fields


def texts_of(fields: ClassifyRequest) -> list[str]:
    """Return the inputs one by one."""
    return [fields.input] if isinstance(fields.input, str) else fields.input


def encoded(found: Classifications) -> bytes:
    """Return the body of the answer."""
    data = [_classification(index, found.labels, each) for index, each in enumerate(found.probabilities)]
    response = ClassificationList(
        id=f"classify-{secrets.token_hex(12)}",
        created=int(time.time()),
        model=found.model,
        data=data,
        usage=InputUsage.of(found.token_counts),
        exclusive=found.exclusive,
        truncated=list(found.truncated),
    )
    return msgspec.json.encode(response)


def _classification(index: int, labels: Sequence[str], probabilities: Sequence[float]) -> Classification:
    ranked = sorted(map(LabelScore, labels, probabilities), key=lambda each: -each.score)
    return Classification(
        index=index,
        label=ranked[0].label,
        score=ranked[0].score,
        scores=ranked,
        probs=list(probabilities),
        num_classes=len(labels),
    )
