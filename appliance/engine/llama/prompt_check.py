"""What a prompt must be before it is queued."""

from __future__ import annotations

from collections.abc import Sequence

from appliance.core.errors import InvalidRequestError


def check_prompt(model: str, prompt: Sequence[int], context_length: int, vocabulary_size: int) -> None:
    """Check a prompt's tokens.

    Args:
        model: Whose prompt it is, for the message.
        prompt: Token ids.
        context_length: Most tokens of prompt and answer.
        vocabulary_size: Number of token ids that there are.

    Raises:
        InvalidRequestError: It is empty, leaves no room for an answer, or has unknown ids.
    """
    if not prompt:
        raise InvalidRequestError("The prompt has no tokens.", param="prompt", code="empty_prompt")
    if len(prompt) >= context_length:
        raise InvalidRequestError(
            f"The prompt has {len(prompt)} tokens; the context of {model} has {context_length}, "
            "of which the answer needs at least one.",
            advice="Shorten the prompt, or raise `context_cells` if the model was trained on more.",
            param="prompt",
            code="context_length_exceeded",
        )
    if not (min(prompt) >= 0 and max(prompt) < vocabulary_size):
        raise InvalidRequestError(f"The prompt has token ids outside 0 to {vocabulary_size - 1}.", param="prompt")
