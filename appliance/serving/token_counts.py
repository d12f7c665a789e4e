"""How many tokens a model makes of texts, by the tokenizer that it embeds with; no engine evaluates anything."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from appliance.serving.embedder_routes import EmbedderRoutes

BATCH_CHARACTERS = 200_000
"""Texts that are counted in one go, in some 100 ms: others who want the tokenizer take turns in between."""
TEXT_CHARACTERS = 32
"""As many characters take the time that a text takes by itself."""


class TokenCounts:
    """The serving floor's answer to `core.types.TokenCounter`."""

    def __init__(self, routes: EmbedderRoutes) -> None:
        """Count with the models that are loaded, or with those that are asked for."""
        self._routes = routes

    async def count_tokens(self, model: str, texts: Sequence[str]) -> Sequence[int]:
        """Return the tokens of each text; see `core.types.TokenCounter.count_tokens`."""
        async with self._routes.embedder_named(model, "") as route:
            return [count for batch in _batches(texts) for count in await route.model.count_tokens(batch)]

    async def longest_input(self, model: str) -> int:
        """Return how many tokens of a text the model embeds; see `core.types.TokenCounter.longest_input`."""
        async with self._routes.embedder_named(model, "") as route:
            return route.model.longest_input


def _batches(texts: Sequence[str]) -> Iterator[Sequence[str]]:
    start = size = 0
    for at, text in enumerate(texts):
        size += len(text) + TEXT_CHARACTERS
        if size >= BATCH_CHARACTERS:
            yield texts[start : at + 1]
            start, size = at + 1, 0
    if start < len(texts):
        yield texts[start:]
