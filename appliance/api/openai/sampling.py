"""What chat and text completions have in common: sampling parameters, usage, timings, priority, fingerprint."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal

import msgspec
from msgspec import Meta
from starlette.requests import Request

from appliance import __version__
from appliance.api.openai.formats import StructuredOutputs, extension_grammar
from appliance.core.errors import InvalidRequestError
from appliance.core.settings import Settings
from appliance.core.types import GenerationRequest, Priority, Prompt, SamplingParams, Timings, Usage
from appliance.web.wire import Text, ignored, meaning, requires

ModelName = Annotated[Text, Meta(min_length=1, max_length=256)]
TokenId = Annotated[int, Meta(ge=0, le=2**31 - 1)]
StopString = Annotated[Text, Meta(min_length=1, max_length=1024)]
TokenCount = Annotated[int, Meta(ge=1, le=2**31 - 1)]
TopLogprobs = Annotated[int, Meta(ge=0, le=20)]
Bias = Annotated[float, Meta(ge=-100, le=100)]
LogitBias = Annotated[
    dict[str, Bias], Meta(max_length=1024, extra_json_schema={"propertyNames": {"pattern": "^[0-9]{1,9}$"}})
]
ChoiceCount = Annotated[int, Meta(ge=1, le=64)]
Temperature = Annotated[float, Meta(ge=0, le=2)]
Share = Annotated[float, Meta(ge=0, le=1)]
PositiveShare = Annotated[float, Meta(gt=0, le=1)]
Penalty = Annotated[float, Meta(ge=-2, le=2)]
RepeatPenalty = Annotated[float, Meta(gt=0, le=10)]
Seed = Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)]
CountOrZero = Annotated[int, Meta(ge=0, le=2**31 - 1)]
StopStrings = Annotated[list[StopString], Meta(max_length=16)]
StopTokens = Annotated[list[TokenId], Meta(max_length=64)]
TimeLimit = Annotated[float, Meta(gt=0, le=86_400 * 366)]
ServiceTier = Literal["auto", "default", "flex", "priority", "fast", "scale"]

SMALLEST_TOP_P = 1e-6
"""What a `top_p` of 0 means: the nucleus is the likeliest token alone."""

_PRIORITIES: dict[ServiceTier, Priority] = {
    "auto": Priority.DEFAULT,
    "default": Priority.DEFAULT,
    "scale": Priority.DEFAULT,
    "flex": Priority.FLEX,
    "priority": Priority.PRIORITY,
    "fast": Priority.PRIORITY,
}


class StreamOptions(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Options of a stream."""

    include_usage: Annotated[bool | None, meaning("End with a chunk that has the usage")] = None
    include_obfuscation: Annotated[bool | None, ignored("chunks are never padded")] = None


class SamplingFields(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Fields of both completion requests. Null means the default."""

    model: Annotated[ModelName, meaning("A registered model, `name` or `name:version`, or an adapter, `name:adapter`")]
    n: Annotated[ChoiceCount | None, meaning("Choices for each prompt; 1 unless given")] = None
    stream: Annotated[bool | None, meaning("Send the answer in chunks as it grows")] = None
    stream_options: Annotated[StreamOptions | None, meaning("Only with `stream`")] = None
    temperature: Annotated[Temperature | None, meaning("0 is greedy; 1 unless given")] = None
    top_p: Annotated[Share | None, meaning("Nucleus mass; 1 unless given")] = None
    frequency_penalty: Annotated[Penalty | None, meaning("Against tokens by how often they came")] = None
    presence_penalty: Annotated[Penalty | None, meaning("Against tokens that came at all")] = None
    logit_bias: Annotated[LogitBias | None, meaning("Token id to a value added to its logit")] = None
    seed: Annotated[Seed | None, meaning("Makes the draw repeatable")] = None
    stop: Annotated[StopString | StopStrings | None, meaning("Strings that end the answer, not part of it")] = None
    service_tier: Annotated[
        ServiceTier | None,
        meaning("Priority in the queue; the answer says which it was, at most the API key's highest tier"),
    ] = None
    prompt_cache_retention: Annotated[
        Literal["in_memory", "in-memory", "24h"] | None,
        meaning("`24h` keeps the KV state of prompt and answer for a day, even if others need the room"),
    ] = None
    user: Annotated[Text | None, ignored("names the end user")] = None
    top_k: Annotated[CountOrZero | None, meaning("Extension: keep the k likeliest tokens; 0 is off")] = None
    min_p: Annotated[Share | None, meaning("Extension: least share of the likeliest one's probability")] = None
    typical_p: Annotated[PositiveShare | None, meaning("Extension: locally typical mass; 1 is off")] = None
    repeat_penalty: Annotated[RepeatPenalty | None, meaning("Extension: against repetition; 1 is off")] = None
    repeat_last_n: Annotated[CountOrZero | None, meaning("Extension: tokens the penalties look at")] = None
    ignore_eos: Annotated[bool | None, meaning("Extension: go on at the model's end tokens")] = None
    stop_token_ids: Annotated[StopTokens | None, meaning("Extension: tokens that end the answer")] = None
    structured_outputs: Annotated[
        StructuredOutputs | None, meaning("Extension: what the answer must look like, under vLLM's names")
    ] = None
    timeout_s: Annotated[
        TimeLimit | None, meaning("Extension: seconds after which the answer is given up, if sooner than the server's")
    ] = None

    schema_conditions: ClassVar[Sequence[dict[str, Any]]] = (
        requires("stream_options", "object", "stream"),
        {"properties": {"structured_outputs": {"minProperties": 1, "maxProperties": 1}}},
    )
    """JSON Schema for what `check_common` checks."""


class PromptTokensDetails(msgspec.Struct, frozen=True):
    """Of the prompt's tokens, how many were reused from the KV cache."""

    cached_tokens: int


class UsageResponse(msgspec.Struct, frozen=True):
    """Token counts over all choices."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails


class TimingsResponse(msgspec.Struct, frozen=True):
    """Extension: seconds in the queue, until the first token, and from there to the end.

    With several prompts each is the longest.
    """

    queue_s: float
    prefill_s: float
    decode_s: float


def usage_response(usage: Usage) -> UsageResponse:
    """Return the counts as they go on the wire."""
    return UsageResponse(
        prompt_tokens=usage.prompt_tokens,
        completion_tokens=usage.completion_tokens,
        total_tokens=usage.prompt_tokens + usage.completion_tokens,
        prompt_tokens_details=PromptTokensDetails(usage.cached_tokens),
    )


def timings_response(timings: Timings) -> TimingsResponse:
    """Return the times as they go on the wire, to the microsecond."""
    return TimingsResponse(
        queue_s=round(timings.queue_s, 6), prefill_s=round(timings.prefill_s, 6), decode_s=round(timings.decode_s, 6)
    )


def sampling_params(fields: SamplingFields, *, max_tokens: int | None, top_logprobs: int | None) -> SamplingParams:
    """Return what the engine needs to know; fields not given get OpenAI's defaults.

    Raises:
        InvalidRequestError: `logit_bias` has a key that is no token id.
    """
    stop = fields.stop or ()
    given = {
        "temperature": fields.temperature,
        "top_p": fields.top_p if fields.top_p is None else max(fields.top_p, SMALLEST_TOP_P),
        "top_k": fields.top_k,
        "min_p": fields.min_p,
        "typical_p": fields.typical_p,
        "repeat_penalty": fields.repeat_penalty,
        "frequency_penalty": fields.frequency_penalty,
        "presence_penalty": fields.presence_penalty,
        "repeat_last_n": fields.repeat_last_n,
        "ignore_eos": fields.ignore_eos,
    }
    return SamplingParams(
        **{name: value for name, value in given.items() if value is not None},  # type: ignore[arg-type]
        logit_bias=_logit_bias(fields.logit_bias or {}),
        seed=fields.seed,
        stop=(stop,) if isinstance(stop, str) else tuple(stop),
        stop_token_ids=tuple(fields.stop_token_ids or ()),
        max_tokens=max_tokens,
        top_logprobs=top_logprobs,
        grammar=extension_grammar(fields.structured_outputs),
    )


def generation_request(
    request: Request, fields: SamplingFields, prompt: Prompt, sampling: SamplingParams, settings: Settings
) -> GenerationRequest:
    """Return one prompt's worth of work for the serving floor."""
    state = request.scope["state"]
    return GenerationRequest(
        model=fields.model,
        prompt=prompt,
        sampling=sampling,
        n=fields.n or 1,
        tenant=state.get("tenant", ""),
        weight=state.get("weight", 1.0),
        pinned=fields.prompt_cache_retention == "24h",
        priority=priority_of(fields.service_tier, state),
        deadline_s=min(fields.timeout_s or settings.request_timeout_s, settings.request_timeout_s),
        request_id=state["request_id"],
    )


def priority_of(tier: ServiceTier | None, state: Mapping[str, Any]) -> Priority:
    """Return the priority of a tier, at most the one that the API key may have."""
    highest: Priority = state.get("highest_tier", Priority.PRIORITY)
    return max(_PRIORITIES[tier or "auto"], highest)


def check_common(fields: SamplingFields, settings: Settings) -> None:
    """Check what one field says against another or against a setting.

    Raises:
        InvalidRequestError: `n` is over the limit, or `stream_options` stands without `stream`.
    """
    if (fields.n or 1) > settings.max_choices:
        raise InvalidRequestError(
            f"n is {fields.n}; at most {settings.max_choices} choices are allowed.",
            advice="Ask several times, or raise max_choices.",
            param="n",
            code="invalid_value",
        )
    if fields.stream_options is not None and not fields.stream:
        raise InvalidRequestError(
            "stream_options needs `stream` to be true.", param="stream_options", code="invalid_value"
        )


def check_prompt_length(characters: int, settings: Settings, param: str) -> None:
    """Refuse a prompt that is too long to be worth tokenizing.

    Raises:
        InvalidRequestError: With both figures.
    """
    if characters > settings.max_prompt_characters:
        raise InvalidRequestError(
            f"The prompt has {characters} characters; {settings.max_prompt_characters} are allowed.",
            advice="Shorten it, or raise max_prompt_characters.",
            param=param,
            code="prompt_too_long",
        )


def service_tier(used: Priority) -> str:
    """Return the name of the tier that was used: priority, default or flex."""
    return used.name.lower()


def system_fingerprint(model: str) -> str:
    """Return what changes when the same seed may give another answer: the program's version or the model's."""
    return f"fp_{hashlib.sha256(f'{__version__} {model}'.encode()).hexdigest()[:12]}"


def _logit_bias(given: dict[str, float]) -> dict[int, float]:
    for key in given:
        if not (key.isascii() and key.isdecimal() and len(key) <= 9):
            raise InvalidRequestError(
                f"logit_bias has the key {key[:50]!r}, which is no token id.",
                advice='Keys are token ids as text, such as "42"; /v1/tokenize returns them.',
                param="logit_bias",
                code="invalid_value",
            )
    return {int(key): value for key, value in given.items()}
