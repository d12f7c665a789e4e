"""What a registered model is for: each kind of request asks here whether the model can answer it.

A refusal says where the model can be used instead.
"""

from __future__ import annotations

from appliance.core.errors import InvalidRequestError
from appliance.registry.known import RegisteredModel

ONNX = "onnx"
"""The kind of the models that onnxruntime evaluates, whatever their task."""

_EMBEDDING_GGUF = ("embedding", "chat", "completion")
_USES = {
    "chat": ("text", "Send it to /v1/chat/completions"),
    "completion": ("text", "Send it to /v1/completions"),
    "embedding": ("embeddings", "Send it to /v1/embeddings"),
    "rerank": ("reranking", "Send it to /v1/rerank"),
    "classification": ("classification", "Send it to /v1/classify"),
    "tensor": ("tensors", "Send it tensors under /v2/models"),
}


def check_writes(registered: RegisteredModel) -> None:
    """Check that a model or adapter writes text.

    Raises:
        InvalidRequestError: It does not.
    """
    if registered.kind == ONNX or registered.task == "embedding":
        raise _refusal(registered, "writes no text", "choose a model for chat or completion")


def check_embeds(registered: RegisteredModel) -> None:
    """Check that a model embeds: one made for it, or one that writes text.

    Raises:
        InvalidRequestError: It does not.
    """
    if registered.adapter:
        raise InvalidRequestError(
            f"{registered.full_name} is an adapter, and cannot embed.",
            advice=f"Send the request to its base, {registered.base_name}.",
            param="model",
        )
    if registered.task not in (("embedding",) if registered.kind == ONNX else _EMBEDDING_GGUF):
        raise _refusal(registered, "cannot embed", "choose a model for embeddings")


def check_reranks(registered: RegisteredModel) -> None:
    """Check that a model reranks: a cross-encoder, or one that embeds.

    Raises:
        InvalidRequestError: It does neither.
    """
    if not is_cross_encoder(registered):
        try:
            check_embeds(registered)
        except InvalidRequestError as error:
            if registered.adapter:
                raise
            raise _refusal(registered, "cannot rerank", "choose a model for reranking or embeddings") from error


def check_classifies(registered: RegisteredModel) -> None:
    """Check that a model classifies texts.

    Raises:
        InvalidRequestError: It does not.
    """
    if registered.kind != ONNX or registered.task != "classification":
        raise _refusal(registered, "cannot classify texts", "choose a model for classification")


def is_cross_encoder(registered: RegisteredModel) -> bool:
    """Return True if the model reads query and document together."""
    return registered.kind == ONNX and registered.task == "rerank"


def _refusal(registered: RegisteredModel, cannot: str, instead: str) -> InvalidRequestError:
    use, door = _USES.get(registered.task, (registered.task, ""))
    return InvalidRequestError(
        f"{registered.full_name} is for {use}, and {cannot}.",
        advice=f"{door}, or {instead}." if door else f"{instead.capitalize()}.",
        param="model",
    )
