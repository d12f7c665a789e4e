"""`POST /v1/completions`: text completions, OpenAI's older form."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, Literal

import msgspec
from msgspec import UNSET, Meta, UnsetType
from starlette.requests import Request
from starlette.types import ASGIApp

from appliance.api.choices import Choices
from appliance.api.openai.answers import Heading, ending, heading, includes_usage, send_stream, send_whole
from appliance.api.openai.logprobs import TextLogprobs, TextOffsets, text_logprobs
from appliance.api.openai.sampling import (
    SamplingFields,
    TimingsResponse,
    TokenCount,
    TokenId,
    TopLogprobs,
    UsageResponse,
    check_common,
    check_prompt_length,
    generation_request,
    sampling_params,
)
from appliance.api.openai.stream import ChunkPattern
from appliance.core.errors import InvalidRequestError
from appliance.core.settings import Settings
from appliance.core.types import Delta, FinishReason, TextModels
from appliance.web.body import read_json
from appliance.web.disconnect import until_disconnected
from appliance.web.wire import Text, convert, meaning, refused

DEFAULT_MAX_TOKENS = 16
"""OpenAI's default for this resource."""

TextPrompt = Annotated[Text, Meta(min_length=1)]
TokenPrompt = Annotated[list[TokenId], Meta(min_length=1)]
Texts = Annotated[list[TextPrompt], Meta(min_length=1)]
TokenLists = Annotated[list[TokenPrompt], Meta(min_length=1)]
OnePrompt = str | tuple[int, ...]


class CompletionRequest(SamplingFields, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A text completion request: OpenAI's fields, each acted on, ignored or refused, and our extensions."""

    prompt: Annotated[
        TextPrompt | Annotated[list[TokenId | TextPrompt | TokenPrompt], Meta(min_length=1)],
        meaning("A text, texts, a list of token ids, or lists of token ids"),
    ]
    max_tokens: Annotated[TokenCount | None, meaning("Most tokens of one choice; 16 unless given")] = None
    logprobs: Annotated[TopLogprobs | None, meaning("Log probabilities of this many likeliest tokens")] = None
    echo: Annotated[bool | None, meaning("Begin each choice with its prompt; not with `logprobs`")] = None
    best_of: Annotated[Literal[1] | None, refused("send `n` and choose yourself.")] = None
    suffix: Annotated[Literal[""] | None, refused("the models here do not fill in the middle.")] = None

    schema_alternatives: ClassVar[dict[str, tuple[Any, ...]]] = {
        "prompt": (TextPrompt, Texts, TokenPrompt, TokenLists),
    }
    """The types of a field where one msgspec type says too little: a list is of one kind throughout."""

    schema_conditions: ClassVar[Sequence[dict[str, Any]]] = (
        *SamplingFields.schema_conditions,
        {
            "not": {
                "properties": {"echo": {"const": True}, "logprobs": {"type": "integer"}},
                "required": ["echo", "logprobs"],
            }
        },
    )
    """JSON Schema for what is checked by hand."""


class CompletionChoice(msgspec.Struct, frozen=True):
    """One answer, or in a chunk what it gained."""

    index: int
    text: str
    finish_reason: FinishReason | None = None
    logprobs: TextLogprobs | None = None


class Completion(Heading, frozen=True, kw_only=True):
    """A whole text completion, or one event of its stream.

    With `include_usage` every chunk has `usage`, null but for the last one, whose `choices` are empty.
    """

    choices: list[CompletionChoice]
    object: Literal["text_completion"] = "text_completion"
    usage: UsageResponse | UnsetType | None = UNSET
    timings: TimingsResponse | UnsetType = UNSET


class Completions:
    """The resource."""

    def __init__(self, models: TextModels, settings: Settings) -> None:
        self._models = models
        self._settings = settings

    async def create(self, request: Request) -> ASGIApp:
        """Answer a text completion request.

        Raises:
            ApplianceError: The request will not do, or as `TextModels.generate`.
        """
        settings = self._settings
        fields = await read_json(request, self._check)
        request.scope["state"]["model"] = fields.model
        sampling = sampling_params(
            fields, max_tokens=fields.max_tokens or DEFAULT_MAX_TOKENS, top_logprobs=fields.logprobs
        )
        prompts = prompts_of(fields, settings)
        work = [generation_request(request, fields, each, sampling, settings) for each in prompts]
        limit_s = work[0].deadline_s
        echoes = await until_disconnected(request.receive, self._echoes(fields, prompts), limit_s=limit_s)
        choices = await until_disconnected(request.receive, Choices.accept(self._models, work), limit_s=limit_s)
        answer = _Answer(heading("cmpl", work[0], choices), fields, echoes)
        if not fields.stream:
            return await send_whole(request, choices, lambda deltas: answer.whole(deltas, **ending(choices)))
        return send_stream(
            choices, fields, settings.stream_keep_alive_s, answer.events, lambda: answer.last(**ending(choices))
        )

    def _check(self, document: Any) -> CompletionRequest:
        fields = convert(document, CompletionRequest)
        check_common(fields, self._settings)
        prompts_of(fields, self._settings)
        if fields.echo and fields.logprobs is not None:
            raise InvalidRequestError(
                "echo with logprobs is not supported: the prompt's tokens have none.",
                param="echo",
                code="unsupported_parameter",
            )
        return fields

    async def _echoes(self, fields: CompletionRequest, prompts: Sequence[OnePrompt]) -> list[str]:
        """Return the text that each choice begins with."""
        if not fields.echo:
            return [""] * (len(prompts) * (fields.n or 1))
        texts = [each if isinstance(each, str) else await self._text_of(fields.model, each) for each in prompts]
        return [text for text in texts for _ in range(fields.n or 1)]

    async def _text_of(self, model: str, tokens: tuple[int, ...]) -> str:
        tokenization = await self._models.tokenize(model, tokens)
        return b"".join(tokenization.pieces).decode(errors="replace")


def prompts_of(fields: CompletionRequest, settings: Settings) -> list[OnePrompt]:
    """Return the prompts one by one.

    Raises:
        InvalidRequestError: The list mixes texts and tokens, or there are too many prompts or characters.
    """
    prompts = one_by_one(fields.prompt, "prompt")
    # A request that fills the queue by itself could never be accepted, however often it is sent.
    limit = max(1, min(settings.max_prompts, settings.queue_size))
    if len(prompts) > limit:
        raise InvalidRequestError(
            f"There are {len(prompts)} prompts; {limit} are allowed in one request.",
            advice="Send several requests, or raise max_prompts and queue_size.",
            param="prompt",
            code="invalid_value",
        )
    check_prompt_length(sum(len(each) for each in prompts), settings, "prompt")
    return prompts


def one_by_one(given: str | Sequence[int | str | Sequence[int]], param: str) -> list[OnePrompt]:
    """Return a text, texts, token ids or lists of token ids as a list of texts or of token ids.

    Raises:
        InvalidRequestError: The list mixes texts and tokens; `param` is the field it came in.
    """
    if isinstance(given, str):
        return [given]
    if all(isinstance(each, int) for each in given):
        return [tuple(each for each in given if isinstance(each, int))]
    if len({type(each) for each in given}) > 1:
        raise InvalidRequestError(f"The list {param!r} mixes texts and tokens.", param=param, code="invalid_value")
    return [each if isinstance(each, str) else tuple(each) for each in given if not isinstance(each, int)]


class _Answer:
    """Makes the whole answer, or its chunks."""

    def __init__(self, head: Heading, fields: CompletionRequest, echoes: Sequence[str]) -> None:
        self._head = head
        with_usage = bool(fields.stream) and includes_usage(fields)
        self._pattern = ChunkPattern(Completion(**head.fields(), choices=[], usage=None if with_usage else UNSET))
        self._with_logprobs = fields.logprobs is not None
        self._echoes = echoes
        self._offsets: dict[int, TextOffsets] = {}

    def whole(self, deltas: Sequence[Delta], **totals: Any) -> Completion:
        """Return the answer."""
        choices = [
            CompletionChoice(each.index, self._echoes[each.index] + each.text, each.finish_reason, self._logprobs(each))
            for each in deltas
        ]
        return Completion(**self._head.fields(), **totals, choices=choices)

    def events(self, delta: Delta) -> bytes:
        """Return the text if there is any, behind the echo if the choice is new, and the end if this is it."""
        events = b""
        text = delta.text if delta.index in self._offsets else self._echoes[delta.index] + delta.text
        logprobs = self._logprobs(delta)
        if text or delta.logprobs:
            choice = CompletionChoice(delta.index, text, None, logprobs if delta.logprobs else None)
            events += self._pattern.event(choice)
        if delta.finish_reason is not None:
            events += self._pattern.event(CompletionChoice(delta.index, "", delta.finish_reason))
        return events

    def last(self, **totals: Any) -> Completion:
        """Return the chunk with the usage."""
        return Completion(**self._head.fields(), **totals, choices=[])

    def _logprobs(self, delta: Delta) -> TextLogprobs | None:
        offsets = self._offsets.setdefault(delta.index, TextOffsets(len(self._echoes[delta.index])))
        return text_logprobs(delta.logprobs, offsets) if self._with_logprobs else None
