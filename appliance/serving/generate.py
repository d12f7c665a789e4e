"""A request becomes engine work: route → prompt → tokens → queue."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Protocol

from appliance.core.errors import InvalidRequestError
from appliance.core.types import (
    ChatMessage,
    Generation,
    GenerationRequest,
    ModelCard,
    Prompt,
    PromptSize,
    SamplingParams,
    Tokenization,
)
from appliance.registry.known import RegisteredModel, find_meant
from appliance.registry.versions import Registry
from appliance.serving.forget import SessionMemory
from appliance.serving.loaded import LoadedModels
from appliance.serving.prompts import PromptRenderer
from appliance.serving.route import LoadedModel
from appliance.serving.structured import prepared
from appliance.serving.template_protocol import Segment
from appliance.serving.tools.generation import ToolCallGeneration, new_call_id
from appliance.serving.tools.messages import without_system
from appliance.serving.tools.offer import offers_tools


class Named(Protocol):
    """Whatever keeps models in memory."""

    @property
    def names(self) -> frozenset[str]:
        """Return the full names of the models that are loaded."""
        ...


class TextGeneration:
    """The serving floor's answer to `core.types.TextModels`."""

    def __init__(self, registry: Registry, models: LoadedModels, memory: SessionMemory, *others: Named) -> None:
        """Serve the registered models with those that are loaded; `others` are loaded for other uses."""
        self._registry = registry
        self._models = models
        self._memory = memory
        self._others = others
        self._watchers: set[Callable[[GenerationRequest], None]] = set()

    @property
    def idle(self) -> bool:
        """Return True if no request is open."""
        return self._models.idle

    @contextmanager
    def watch(self, told: Callable[[GenerationRequest], None]) -> Iterator[None]:
        """Have every request told as it comes; see `core.types.IdleTime.watch`."""
        self._watchers.add(told)
        try:
            yield
        finally:
            self._watchers.discard(told)

    def cards(self) -> Sequence[ModelCard]:
        """Return every registered model, from the registry as it is now."""
        loaded = self._models.names.union(*(each.names for each in self._others))
        models = self._registry.list()
        known = self._registry.wishes()
        meant = {each.names[0]: find_meant(models, each.names[0], known) for each in models}
        return [
            _card(each, loaded=each.full_name in loaded, meant=each.full_name == meant[each.names[0]])
            for each in models
        ]

    async def generate(self, request: GenerationRequest) -> Generation:
        """Accept a request; see `core.types.TextModels.generate`."""
        began = time.monotonic()
        for each in tuple(self._watchers):
            each(request)
        async with self._models.lease(request.model) as route:
            tools = route.model.tools
            if (given := request.sampling.grammar) is not None:
                request = replace(request, sampling=replace(request.sampling, grammar=prepared(given)))
            sampling = tools.sampling(request)
            tokens = await prompt_tokens(route.model, request.prompt, request=request)
            if isinstance(request.prompt, tuple):
                sampling = replace(sampling, stop=(*sampling.stop, *route.model.registered.stop))
            constraints = await route.model.engine.grammars.constrain(sampling.grammar, request.n)
            left_s = None if request.deadline_s is None else max(0.0, request.deadline_s - (time.monotonic() - began))
            generation = route.submit(
                tokens,
                sampling,
                constraints=constraints,
                n=request.n,
                priority=request.priority,
                tenant=request.tenant,
                weight=request.weight,
                pinned=request.pinned,
                session="" if request.session is None else request.session.id,
                kept=request.session is None or self._memory.keeps(request.session),
                deadline_s=left_s,
            )
            if not offers_tools(request):
                return generation
            return ToolCallGeneration(generation, lambda: tools.reader(request, new_call_id))

    async def forget(self, sessions: Collection[str]) -> None:
        """Forget the text of sessions; see `core.types.TextModels.forget`."""
        await self._memory.forget(sessions)

    async def tokenize(
        self, model: str, prompt: Prompt, *, add_special: bool = True, parse_special: bool = False
    ) -> Tokenization:
        """Return the prompt as the engine would read it; see `core.types.TextModels.tokenize`."""
        async with self._models.lease(model) as route:
            loaded = route.model
            tokens = await prompt_tokens(loaded, prompt, add_special=add_special, parse_special=parse_special)
            pieces = tuple(loaded.engine.piece(token) for token in tokens)
            return Tokenization(tuple(tokens), pieces, loaded.engine.context_length)

    async def prompt_size(self, request: GenerationRequest) -> PromptSize:
        """Return how long the prompt of a request is; see `core.types.TextModels.prompt_size`."""
        async with self._models.lease(request.model) as route:
            loaded = route.model
            tokens = await prompt_tokens(loaded, request.prompt, request=request)
            return PromptSize(len(tokens), loaded.engine.context_length, loaded.registered.full_name)


async def prompt_tokens(
    model: LoadedModel,
    prompt: Prompt,
    *,
    add_special: bool = True,
    parse_special: bool = True,
    request: GenerationRequest | None = None,
) -> Sequence[int]:
    """Return a prompt's token ids; messages are told of the tools that a request offers.

    Text to complete is the caller's own prompt as a whole, so control tokens in it count by default; messages are parts
    of a prompt that the chat template writes, and cannot bring any in.

    Raises:
        InvalidRequestError: Messages for a model without a chat template, or the template refuses them.
        ModelFileError: The template fails.
    """
    if isinstance(prompt, str):
        return await model.engine.tokenize(prompt, add_special=add_special, parse_special=parse_special)
    if prompt and isinstance(prompt[0], ChatMessage):
        offer = request or GenerationRequest(model.registered.full_name, prompt, SamplingParams())
        return await _chat_tokens(model, [each for each in prompt if isinstance(each, ChatMessage)], offer)
    return [each for each in prompt if isinstance(each, int)]


async def _chat_tokens(model: LoadedModel, messages: Sequence[ChatMessage], offer: GenerationRequest) -> list[int]:
    if model.renderer is None:
        raise InvalidRequestError(
            f"{model.registered.full_name} has no chat template.",
            advice="Use /v1/completions, or give the model's manifest a template.",
            code="no_chat_template",
            param="model",
        )
    engine = model.engine
    tokens: list[int] = []
    for index, (text, may_hold_control_tokens) in enumerate(await _segments(model, model.renderer, messages, offer)):
        begins = index == 0 and not (engine.begin_text and text.startswith(engine.begin_text))
        tokens += await engine.tokenize(text, add_special=begins, parse_special=may_hold_control_tokens)
    return tokens


async def _segments(
    model: LoadedModel, renderer: PromptRenderer, messages: Sequence[ChatMessage], offer: GenerationRequest
) -> Sequence[Segment]:
    told, extra = model.tools.conversation(offer, messages)
    try:
        return await renderer.render_segments(told, extra=extra)
    except InvalidRequestError as error:
        was_added = bool(told) and told[0].role == "system" and (not messages or messages[0].role != "system")
        if error.code != "chat_template_refused" or not was_added:
            raise
    return await renderer.render_segments(without_system(told), extra=extra)


def _card(model: RegisteredModel, *, loaded: bool, meant: bool) -> ModelCard:
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
        meant=meant,
    )
