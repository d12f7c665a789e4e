"""A request becomes engine work: route → prompt → tokens → queue."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Protocol

from appliance.core.errors import InvalidRequestError
from appliance.core.types import ChatMessage, Generation, GenerationRequest, ModelCard, Prompt, Tokenization
from appliance.registry.versions import RegisteredModel, Registry
from appliance.serving.loaded import LoadedModels
from appliance.serving.route import LoadedModel
from appliance.serving.structured import prepared


class Named(Protocol):
    """Whatever keeps models in memory."""

    @property
    def names(self) -> frozenset[str]:
        """Return the full names of the models that are loaded."""
        ...


class TextGeneration:
    """The serving floor's answer to `core.types.TextModels`."""

    def __init__(self, registry: Registry, models: LoadedModels, *others: Named) -> None:
        """Serve the registered models with those that are loaded; `others` are loaded for other uses."""
        self._registry = registry
        self._models = models
        self._others = others

    def cards(self) -> Sequence[ModelCard]:
        """Return every registered model, from the registry as it is now."""
        loaded = self._models.names.union(*(each.names for each in self._others))
        return [_card(each, loaded=each.full_name in loaded) for each in self._registry.list()]

    async def generate(self, request: GenerationRequest) -> Generation:
        """Accept a request; see `core.types.TextModels.generate`."""
        began = time.monotonic()
        async with self._models.lease(request.model) as route:
            tokens = await prompt_tokens(route.model, request.prompt)
            sampling = request.sampling
            if isinstance(request.prompt, tuple):
                sampling = replace(sampling, stop=(*sampling.stop, *route.model.registered.stop))
            if sampling.grammar is not None:
                sampling = replace(sampling, grammar=prepared(sampling.grammar))
            constraints = await route.model.engine.grammars.constrain(sampling.grammar, request.n)
            left_s = None if request.deadline_s is None else max(0.0, request.deadline_s - (time.monotonic() - began))
            return route.submit(
                tokens,
                sampling,
                constraints=constraints,
                n=request.n,
                priority=request.priority,
                tenant=request.tenant,
                weight=request.weight,
                pinned=request.pinned,
                deadline_s=left_s,
            )

    async def tokenize(
        self, model: str, prompt: Prompt, *, add_special: bool = True, parse_special: bool = False
    ) -> Tokenization:
        """Return the prompt as the engine would read it; see `core.types.TextModels.tokenize`."""
        async with self._models.lease(model) as route:
            loaded = route.model
            tokens = await prompt_tokens(loaded, prompt, add_special=add_special, parse_special=parse_special)
            pieces = tuple(loaded.engine.piece(token) for token in tokens)
            return Tokenization(tuple(tokens), pieces, loaded.engine.context_length)


async def prompt_tokens(
    model: LoadedModel, prompt: Prompt, *, add_special: bool = True, parse_special: bool = True
) -> Sequence[int]:
    """Return a prompt's token ids.

    Text to complete is the caller's own prompt as a whole, so control tokens in it count by default; messages are parts
    of a prompt that the chat template writes, and cannot bring any in.

    Raises:
        InvalidRequestError: Messages for a model without a chat template, or the template refuses them.
        ModelFileError: The template fails.
    """
    if isinstance(prompt, str):
        return await model.engine.tokenize(prompt, add_special=add_special, parse_special=parse_special)
    if prompt and isinstance(prompt[0], ChatMessage):
        return await _chat_tokens(model, [each for each in prompt if isinstance(each, ChatMessage)])
    return [each for each in prompt if isinstance(each, int)]


async def _chat_tokens(model: LoadedModel, messages: Sequence[ChatMessage]) -> list[int]:
    if model.renderer is None:
        raise InvalidRequestError(
            f"{model.registered.full_name} has no chat template.",
            advice="Use /v1/completions, or give the model's manifest a template.",
            code="no_chat_template",
            param="model",
        )
    engine = model.engine
    tokens: list[int] = []
    for index, (text, may_hold_control_tokens) in enumerate(await model.renderer.render_segments(messages)):
        begins = index == 0 and not (engine.begin_text and text.startswith(engine.begin_text))
        tokens += await engine.tokenize(text, add_special=begins, parse_special=may_hold_control_tokens)
    return tokens


def _card(model: RegisteredModel, *, loaded: bool) -> ModelCard:
    return ModelCard(
        name=model.name,
        version=model.version,
        kind=model.kind,
        task=model.task,
        created=model.created,
        size=model.size,
        licence=model.licence,
        context_length=model.context_length,
        loaded=loaded,
        adapter=model.adapter,
    )
