"""`GET /v1/models` and `GET /v1/models/{model}`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Literal

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp

from appliance.core.errors import NotFoundError
from appliance.core.types import ModelCard, TextModels


class ModelResponse(msgspec.Struct, frozen=True, kw_only=True):
    """One registered model; the fields behind `owned_by` are extensions.

    Attributes:
        id: What to send as `model`: the name, or `name:version` where the name has several versions; of an adapter
            `name:adapter`, or `name:version:adapter` where several versions have one of that name.
        base: Of an adapter, the `name:version` that it is loaded beside; null for a model.
        context_length: Tokens that a prompt and its answer may have together, 0 when unknown.
        loaded: Whether it is in memory; another is loaded by the first request for it.
    """

    id: str
    created: int
    object: Literal["model"] = "model"
    owned_by: str = "appliance"
    version: str
    kind: str
    task: str
    license: str
    size: int
    context_length: int
    loaded: bool
    base: str | None = None


class ModelList(msgspec.Struct, frozen=True):
    """All registered models."""

    data: list[ModelResponse]
    object: Literal["list"] = "list"


class Models:
    """The resource."""

    def __init__(self, models: TextModels) -> None:
        self._models = models

    async def list(self, _: Request) -> ASGIApp:
        """Answer with every registered model."""
        return _json(ModelList(model_responses(self._models.cards())))

    async def retrieve(self, request: Request) -> ASGIApp:
        """Answer with one model or adapter, by its full name or by a short one (the version that it means then).

        Raises:
            NotFoundError: There is none; the message names those that exist.
        """
        wanted = request.path_params["model"]
        cards = self._models.cards()
        fitting = [each for each in cards if wanted in _names(each)]
        if not fitting:
            known = ", ".join(each.id for each in model_responses(cards)) or "none"
            raise NotFoundError(
                f"There is no model {wanted[:200]!r}; there is {known}.",
                advice="`appliance models pull` fetches more.",
                param="model",
                code="model_not_found",
            )
        meant = [each for each in fitting if each.meant]
        return _json(_model_response((meant or fitting)[-1], wanted))


def model_responses(cards: Sequence[ModelCard]) -> list[ModelResponse]:
    """Return the models as they go on the wire."""
    names = [_names(each) for each in cards]
    of_short_name = Counter(short for short, _ in names)
    return [
        _model_response(card, full if of_short_name[short] > 1 else short)
        for card, (short, full) in zip(cards, names, strict=True)
    ]


def _names(card: ModelCard) -> tuple[str, str]:
    """Return the short name and the full one."""
    own = f":{card.adapter}" if card.adapter else ""
    return f"{card.name}{own}", f"{card.name}:{card.version}{own}"


def _model_response(card: ModelCard, model_id: str) -> ModelResponse:
    return ModelResponse(
        id=model_id,
        created=card.created,
        version=card.version,
        kind=card.kind,
        task=card.task,
        license=card.licence,
        size=card.size,
        context_length=card.context_length,
        loaded=card.loaded,
        base=f"{card.name}:{card.version}" if card.adapter else None,
    )


def _json(value: msgspec.Struct) -> Response:
    return Response(msgspec.json.encode(value), media_type="application/json")
