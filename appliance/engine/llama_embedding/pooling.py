"""How a model's states become one vector, and how its inputs are cut (pure)."""

from __future__ import annotations

from collections.abc import Sequence
from enum import IntEnum

from appliance.core.errors import ModelFileError


class Pooling(IntEnum):
    """Numbers of llama.cpp's `enum llama_pooling_type`, as GGUF files have them under `{arch}.pooling_type`."""

    NONE = 0
    MEAN = 1
    CLS = 2
    LAST = 3


def pooling_of(declared: str | None) -> Pooling:
    """Return how a model is pooled: as its file says, or else by the mean of its states.

    Raises:
        ModelFileError: The file asks for another kind, such as a reranker's.
    """
    try:
        pooling = Pooling(int(declared or Pooling.NONE))
    except ValueError as error:
        raise ModelFileError(
            f"The model pools its states in a way that makes no embedding (pooling type {declared}).",
            advice="Use a model for embeddings; rerankers are none.",
        ) from error
    return pooling or Pooling.MEAN


def shortened(tokens: Sequence[int], plain: Sequence[int], longest: int) -> list[int]:
    """Cut a text's tokens in front of what the model wants at the end of every text, such as `[SEP]`.

    Args:
        tokens: The text's, with the tokens that the model wants around it.
        plain: The same without those.
        longest: Tokens to keep, with those around.
    """
    added = len(tokens) - len(plain)
    before = next((n for n in range(added + 1) if list(tokens[n : n + len(plain)]) == list(plain)), added)
    start, end = tokens[: before + len(plain)], tokens[before + len(plain) :]
    return [*start[: max(0, longest - len(end))], *end][:longest]
