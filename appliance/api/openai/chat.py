"""`POST /v1/chat/completions`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Annotated, Any, ClassVar, Literal

import msgspec
from msgspec import UNSET, Meta, UnsetType
from starlette.requests import Request
from starlette.types import ASGIApp

from appliance.api.choices import Choices
from appliance.api.openai.answers import Heading, ending, heading, includes_usage, send_stream, send_whole
from appliance.api.openai.formats import AnswerFormat, format_grammar
from appliance.api.openai.logprobs import ChatLogprobs, chat_logprobs
from appliance.api.openai.messages import Messages, Nothing, chat_messages
from appliance.api.openai.sampling import (
    SamplingFields,
    TimingsResponse,
    TokenCount,
    TopLogprobs,
    UsageResponse,
    check_common,
    generation_request,
    sampling_params,
)
from appliance.api.openai.stream import ChunkPattern
from appliance.api.openai.tools import (
    AnyToolChoice,
    CallDelta,
    FunctionCall,
    Tools,
    call_deltas,
    function_calls,
    offered_tools,
    tool_choice,
)
from appliance.core.errors import InvalidRequestError
from appliance.core.settings import Settings
from appliance.core.types import Delta, FinishReason, GenerationRequest, SamplingParams, TextModels
from appliance.web.body import read_json
from appliance.web.disconnect import until_disconnected
from appliance.web.wire import Text, convert, ignored, meaning, refused, requires

NO_FUNCTIONS = "it is the older form of `tools`; send those."


class ChatCompletionRequest(SamplingFields, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A chat completion request: OpenAI's fields, each acted on, ignored or refused, and our extensions."""

    messages: Messages
    max_completion_tokens: Annotated[TokenCount | None, meaning("Most tokens of one choice")] = None
    max_tokens: Annotated[TokenCount | None, meaning("Older name of `max_completion_tokens`")] = None
    logprobs: Annotated[bool | None, meaning("Return the log probabilities of the answer's tokens")] = None
    top_logprobs: Annotated[TopLogprobs | None, meaning("Likeliest tokens at each place; needs `logprobs`")] = None
    metadata: Annotated[dict[Text, Text] | None, ignored("labels of the caller")] = None
    safety_identifier: Annotated[Text | None, ignored("names the end user")] = None
    prompt_cache_key: Annotated[Text | None, ignored("every prefix is cached")] = None
    prompt_cache_options: Annotated[dict[str, Any] | None, ignored("every prefix is cached")] = None
    prediction: Annotated[dict[str, Any] | None, ignored("it would change the speed alone")] = None
    tools: Annotated[Tools | None, meaning("What the model may call; arguments satisfy their schemas")] = None
    tool_choice: Annotated[AnyToolChoice | None, meaning("Whether the model may, must or must not call, or what")] = (
        None
    )
    parallel_tool_calls: Annotated[bool | None, meaning("Whether it may call several at once; so unless false")] = None
    functions: Annotated[Nothing | None, refused(NO_FUNCTIONS)] = None
    function_call: Annotated[Literal["none", "auto"] | None, refused(NO_FUNCTIONS)] = None
    response_format: Annotated[AnswerFormat | None, meaning("What the answer must look like")] = None
    modalities: Annotated[list[Literal["text"]] | None, refused("answers are plain text.")] = None
    audio: Annotated[None, refused("answers are plain text.")] = None
    web_search_options: Annotated[None, refused("the appliance searches no web.")] = None
    moderation: Annotated[None, refused("there is no moderation model.")] = None
    reasoning_effort: Annotated[Literal["none"] | None, refused("the models here do not reason by degrees.")] = None
    verbosity: Annotated[Literal["medium"] | None, refused("the models here have one verbosity.")] = None
    store: Annotated[
        Annotated[bool, Meta(extra_json_schema={"const": False})] | None,
        meaning("Nothing is stored, so only false is accepted"),
    ] = None

    schema_conditions: ClassVar[Sequence[dict[str, Any]]] = (
        *SamplingFields.schema_conditions,
        requires("top_logprobs", "integer", "logprobs"),
        {
            "not": {
                "properties": {"response_format": {"type": "object"}, "structured_outputs": {"type": "object"}},
                "required": ["response_format", "structured_outputs"],
            }
        },
        {
            "not": {
                "properties": {"max_tokens": {"type": "integer"}, "max_completion_tokens": {"type": "integer"}},
                "required": ["max_tokens", "max_completion_tokens"],
            }
        },
    )
    """JSON Schema for what is checked by hand; of the two limits it allows one, though both may be sent if equal."""


class ChatAnswerMessage(msgspec.Struct, frozen=True):
    """What the model said, or called."""

    content: str | None
    role: Literal["assistant"] = "assistant"
    refusal: None = None
    tool_calls: list[FunctionCall] | UnsetType = UNSET


class ChatChoice(msgspec.Struct, frozen=True):
    """One answer."""

    index: int
    message: ChatAnswerMessage
    finish_reason: FinishReason | None
    logprobs: ChatLogprobs | None = None


class ChatCompletion(Heading, frozen=True, kw_only=True):
    """A whole chat completion."""

    choices: list[ChatChoice]
    usage: UsageResponse
    timings: TimingsResponse
    object: Literal["chat.completion"] = "chat.completion"


class ChatDelta(msgspec.Struct, frozen=True):
    """What a choice gained: its role at first, then text, then calls piece by piece, then nothing."""

    role: Literal["assistant"] | UnsetType = UNSET
    content: str | UnsetType | None = UNSET
    tool_calls: list[CallDelta] | UnsetType = UNSET


class ChatChunkChoice(msgspec.Struct, frozen=True):
    """One choice in a chunk; the last one of each choice has the finish reason."""

    index: int
    delta: ChatDelta
    logprobs: ChatLogprobs | None = None
    finish_reason: FinishReason | None = None


class ChatChunk(Heading, frozen=True, kw_only=True):
    """One event of a chat completion's stream.

    With `include_usage` every chunk has `usage`, null but for the last one, whose `choices` are empty.
    """

    choices: list[ChatChunkChoice]
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    usage: UsageResponse | UnsetType | None = UNSET
    timings: TimingsResponse | UnsetType = UNSET


class ChatCompletions:
    """The resource."""

    def __init__(self, models: TextModels, settings: Settings) -> None:
        self._models = models
        self._settings = settings

    async def create(self, request: Request) -> ASGIApp:
        """Answer a chat completion request.

        Raises:
            ApplianceError: The request will not do, or as `TextModels.generate`.
        """
        settings = self._settings
        fields = await read_json(request, self._check)
        request.scope["state"]["model"] = fields.model
        work = self._work(request, fields)
        try:
            choices = await until_disconnected(
                request.receive, Choices.accept(self._models, [work]), limit_s=work.deadline_s
            )
        except InvalidRequestError as error:
            if error.param == "prompt":  # as the engine calls it
                error.param = "messages"
            raise
        head = heading("chatcmpl", work, choices)
        if not fields.stream:
            with_logprobs = bool(fields.logprobs)
            return await send_whole(
                request, choices, lambda deltas: _completion(head, choices, deltas, with_logprobs=with_logprobs)
            )
        chunks = _Chunks(head, with_usage=includes_usage(fields))
        return send_stream(
            choices, fields, settings.stream_keep_alive_s, chunks.events, lambda: chunks.last(**ending(choices))
        )

    def _work(self, request: Request, fields: ChatCompletionRequest) -> GenerationRequest:
        tools = offered_tools(fields.tools)
        prompt = chat_messages(fields.messages, self._settings, tools)
        return replace(
            generation_request(request, fields, prompt, self._sampling(fields), self._settings),
            tools=tools,
            tool_choice=tool_choice(fields.tool_choice, tools),
            parallel_tool_calls=fields.parallel_tool_calls is not False,
        )

    def _check(self, document: Any) -> ChatCompletionRequest:
        fields = convert(document, ChatCompletionRequest)
        check_common(fields, self._settings)
        if fields.store:
            raise InvalidRequestError(
                "'store' is not supported: nothing is stored.", param="store", code="unsupported_parameter"
            )
        if fields.top_logprobs is not None and not fields.logprobs:
            raise InvalidRequestError(
                "top_logprobs needs `logprobs` to be true.", param="top_logprobs", code="invalid_value"
            )
        if fields.response_format is not None and fields.structured_outputs is not None:
            raise InvalidRequestError(
                "response_format and structured_outputs are both given.",
                advice="Each says what the answer must look like: send one.",
                param="structured_outputs",
                code="invalid_value",
            )
        limits = {fields.max_tokens, fields.max_completion_tokens} - {None}
        if len(limits) > 1:
            raise InvalidRequestError(
                f"max_tokens is {fields.max_tokens} and max_completion_tokens is {fields.max_completion_tokens}.",
                advice="They are two names of one limit: send one.",
                param="max_tokens",
                code="invalid_value",
            )
        return fields

    def _sampling(self, fields: ChatCompletionRequest) -> SamplingParams:
        limit = fields.max_completion_tokens if fields.max_tokens is None else fields.max_tokens
        top_logprobs = (fields.top_logprobs or 0) if fields.logprobs else None
        sampling = sampling_params(fields, max_tokens=limit, top_logprobs=top_logprobs)
        grammar = format_grammar(fields.response_format)
        return sampling if grammar is None else replace(sampling, grammar=grammar)


def _completion(head: Heading, choices: Choices, deltas: Sequence[Delta], *, with_logprobs: bool) -> ChatCompletion:
    return ChatCompletion(
        **head.fields(),
        **ending(choices),
        choices=[
            ChatChoice(
                index=each.index,
                message=_message(each),
                finish_reason=each.finish_reason,
                logprobs=_logprobs(each) if with_logprobs else None,
            )
            for each in deltas
        ],
    )


def _message(delta: Delta) -> ChatAnswerMessage:
    if not delta.tool_calls:
        return ChatAnswerMessage(delta.text)
    return ChatAnswerMessage(delta.text or None, tool_calls=function_calls(delta.tool_calls))


def _logprobs(delta: Delta) -> ChatLogprobs:
    return ChatLogprobs(chat_logprobs(delta.logprobs))


class _Chunks:
    """Makes the chunks of one stream."""

    def __init__(self, head: Heading, *, with_usage: bool) -> None:
        self._head = head
        self._pattern = ChunkPattern(ChatChunk(**head.fields(), choices=[], usage=None if with_usage else UNSET))
        self._begun: set[int] = set()

    def events(self, delta: Delta) -> bytes:
        """Return the role if the choice is new, the text and the calls if there are any, and the end if this is it."""
        events = b""
        if delta.index not in self._begun:
            self._begun.add(delta.index)
            content = None if delta.tool_calls and not delta.text else ""
            events += self._pattern.event(ChatChunkChoice(delta.index, ChatDelta(role="assistant", content=content)))
        if delta.text or delta.logprobs:
            logprobs = _logprobs(delta) if delta.logprobs else None
            events += self._pattern.event(ChatChunkChoice(delta.index, ChatDelta(content=delta.text), logprobs))
        for call in call_deltas(delta.tool_calls):
            events += self._pattern.event(ChatChunkChoice(delta.index, ChatDelta(tool_calls=[call])))
        if delta.finish_reason is not None:
            events += self._pattern.event(ChatChunkChoice(delta.index, ChatDelta(), None, delta.finish_reason))
        return events

    def last(self, **totals: Any) -> ChatChunk:
        """Return the chunk with the usage."""
        return ChatChunk(**self._head.fields(), **totals, choices=[])
