"""`/v1/responses` on the wire: the request with OpenAI's fields, each acted on, ignored or refused, and the answers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, Literal

import msgspec
from msgspec import UNSET, Meta, UnsetType

from appliance.api.openai.items import AnyItem
from appliance.api.openai.sampling import (
    CountOrZero,
    ModelName,
    Penalty,
    PositiveShare,
    RepeatPenalty,
    Seed,
    ServiceTier,
    Share,
    Temperature,
    TimeLimit,
    TokenCount,
    TopLogprobs,
)
from appliance.api.openai.vector_store_wire import Pairs
from appliance.web.wire import Text, ignored, meaning, refused

Name = Annotated[str, Meta(min_length=1, max_length=64, pattern=r"^[A-Za-z0-9_-]+$")]
Id = Annotated[Text, Meta(min_length=1, max_length=64)]
Schema = dict[str, Any]

INCLUDED = ("file_search_call.results", "message.output_text.logprobs")
"""What `include` may ask for that a box has; OpenAI's other values ask for what there is none of here."""


class ConversationName(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The conversation that a response belongs to."""

    id: Id
    fork: Annotated[
        bool | None, meaning("Extension: where another is quicker, go on in a fork instead of answering 409")
    ] = None


class StreamOptions(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Options of a stream."""

    include_obfuscation: Annotated[bool | None, ignored("events are never padded")] = None


class PlainText(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag_field="type", tag="text"):
    """Any text."""


class JsonObject(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag_field="type", tag="json_object"):
    """A JSON object."""


class JsonSchema(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag_field="type", tag="json_schema"):
    """JSON of a schema."""

    name: Name
    schema: Schema
    description: Text | None = None
    strict: bool | None = None


class TextConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What the answer looks like."""

    format: PlainText | JsonObject | JsonSchema | None = None
    verbosity: Annotated[Literal["medium"] | None, refused("the models here have one verbosity.")] = None


class FunctionTool(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A function that the client runs."""

    type: Literal["function"]
    name: Name
    description: Text | None = None
    parameters: Schema | None = None
    strict: bool | None = None
    allowed_callers: Annotated[list[Literal["direct"]] | None, ignored("functions are called directly")] = None
    async_: Annotated[bool | None, ignored("it says how the client runs it")] = msgspec.field(
        default=None, name="async"
    )
    defer_loading: Literal[False] | None = None
    output_schema: Annotated[Schema | None, ignored("what a function returns is not checked")] = None


class ReasoningConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Options of reasoning models, of which there are none."""

    effort: Literal["none"] | None = None
    summary: Annotated[Literal["auto", "concise", "detailed"] | None, ignored("there is nothing to sum up")] = None
    generate_summary: Annotated[Literal["auto", "concise", "detailed"] | None, ignored("as `summary`")] = None


ToolChoiceField = Literal["auto", "required", "none"] | dict[str, Any]


class CreateResponseRequest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A request for a response. Null means the default."""

    model: Annotated[ModelName, meaning("A registered model, `name` or `name:version`, or an adapter, `name:adapter`")]
    input: Annotated[
        Text | list[AnyItem] | None, meaning("A text, or items: messages, calls and their outputs; what is new")
    ] = None
    instructions: Annotated[Text | None, meaning("A system message for this response alone")] = None
    previous_response_id: Annotated[Id | None, meaning("The response that this one follows")] = None
    conversation: Annotated[
        Id | ConversationName | None, meaning("The conversation whose items come first and which this turn joins")
    ] = None
    store: Annotated[bool | None, meaning("Keep the response; true unless given. false keeps nothing")] = None
    stream: Annotated[bool | None, meaning("Send the response as events while it grows")] = None
    stream_options: Annotated[StreamOptions | None, meaning("Only with `stream`")] = None
    background: Annotated[bool | None, meaning("Go on without the client; needs `store`")] = None
    background_options: Annotated[dict[str, Any] | None, ignored("work begins as soon as it can")] = None
    max_output_tokens: Annotated[TokenCount | None, meaning("Most tokens that the model writes, calls included")] = None
    max_tool_calls: Annotated[
        Annotated[int, Meta(ge=1, le=2**31 - 1)] | None,
        meaning("Most calls of built-in tools, if fewer than the box's"),
    ] = None
    temperature: Annotated[Temperature | None, meaning("0 is greedy; 1 unless given")] = None
    top_p: Annotated[Share | None, meaning("Nucleus mass; 1 unless given")] = None
    top_logprobs: Annotated[
        TopLogprobs | None, meaning("Likeliest tokens at each place; with `include: message.output_text.logprobs`")
    ] = None
    tools: Annotated[
        list[dict[str, Any]] | None, meaning("Functions of the client, and built-in tools of the box, by `type`")
    ] = None
    tool_choice: Annotated[ToolChoiceField | None, meaning("auto, required, none, one tool, or some allowed ones")] = (
        None
    )
    parallel_tool_calls: Annotated[bool | None, meaning("Let the model call several at once; true unless given")] = None
    text: Annotated[TextConfig | None, meaning("Text, a JSON object, or JSON of a schema")] = None
    truncation: Annotated[
        Literal["auto", "disabled"] | None,
        meaning("What does not fit is refused, which is the default, or left out behind the instructions: `auto`"),
    ] = None
    metadata: Annotated[Pairs | None, meaning("Up to 16 pairs of texts, kept with the response")] = None
    include: Annotated[list[Text] | None, meaning(f"What beside the usual to show: {' or '.join(INCLUDED)}")] = None
    service_tier: Annotated[ServiceTier | None, meaning("Priority in the queue; the answer says which it was")] = None
    prompt_cache_retention: Annotated[
        Literal["in_memory", "in-memory", "24h"] | None,
        meaning("`24h` keeps the KV state of prompt and answer for a day, even if others need the room"),
    ] = None
    prompt_cache_key: Annotated[Text | None, ignored("every prefix is cached")] = None
    prompt_cache_options: Annotated[dict[str, Any] | None, ignored("every prefix is cached")] = None
    safety_identifier: Annotated[Text | None, ignored("names the end user")] = None
    user: Annotated[Text | None, ignored("names the end user")] = None
    reasoning: Annotated[ReasoningConfig | None, refused("the models here do not reason by degrees.")] = None
    prompt: Annotated[None, refused("there are no prompt templates here.")] = None
    moderation: Annotated[None, refused("there is no moderation model.")] = None
    context_management: Annotated[
        Annotated[list[Any], Meta(max_length=0)] | None, refused("the input is never compacted.")
    ] = None
    image: Annotated[None, refused("the models here read text.")] = None
    access_programs: Annotated[None, refused("there are none here.")] = None
    seed: Annotated[Seed | None, meaning("Extension: makes the draw repeatable")] = None
    top_k: Annotated[CountOrZero | None, meaning("Extension: keep the k likeliest tokens; 0 is off")] = None
    min_p: Annotated[Share | None, meaning("Extension: least share of the likeliest one's probability")] = None
    typical_p: Annotated[PositiveShare | None, meaning("Extension: locally typical mass; 1 is off")] = None
    repeat_penalty: Annotated[RepeatPenalty | None, meaning("Extension: against repetition; 1 is off")] = None
    frequency_penalty: Annotated[Penalty | None, meaning("Extension: against tokens by how often they came")] = None
    presence_penalty: Annotated[Penalty | None, meaning("Extension: against tokens that came at all")] = None
    timeout_s: Annotated[
        TimeLimit | None, meaning("Extension: seconds after which a step is given up, if sooner than the server's")
    ] = None

    schema_conditions: ClassVar[Sequence[dict[str, Any]]] = ()


class ResponseUsage(msgspec.Struct, frozen=True):
    """Tokens of all steps together."""

    input_tokens: int
    input_tokens_details: dict[str, int]
    output_tokens: int
    output_tokens_details: dict[str, int]
    total_tokens: int


class ResponseObject(msgspec.Struct, frozen=True, kw_only=True):
    """A response."""

    id: str
    object: Literal["response"]
    created_at: int
    status: Literal["queued", "in_progress", "completed", "incomplete", "failed", "cancelled"]
    model: str
    output: list[dict[str, Any]]
    usage: ResponseUsage | None
    error: dict[str, Any] | None
    incomplete_details: dict[str, Any] | None
    completed_at: int | None
    previous_response_id: str | None
    conversation: dict[str, str] | None
    background: bool
    context: Annotated[
        dict[str, Any] | None, meaning("Extension, with `truncation: auto`: what of the history was left out")
    ]
    store: bool
    instructions: str | None
    max_output_tokens: int | None
    max_tool_calls: int | None
    parallel_tool_calls: bool
    temperature: float
    top_p: float
    top_logprobs: int
    text: dict[str, Any]
    tool_choice: Any
    tools: list[dict[str, Any]]
    truncation: str
    metadata: dict[str, str]
    service_tier: str
    reasoning: dict[str, Any]


class ResponseEvent(msgspec.Struct, frozen=True, kw_only=True):
    """An event of a response's stream; the fields beside these are those of its type."""

    type: str
    sequence_number: int
    response: ResponseObject | UnsetType = UNSET
    output_index: int | UnsetType = UNSET
    content_index: int | UnsetType = UNSET
    item_id: str | UnsetType = UNSET
    item: dict[str, Any] | UnsetType = UNSET
    part: dict[str, Any] | UnsetType = UNSET
    delta: str | UnsetType = UNSET


class ResponseItemList(msgspec.Struct, frozen=True, kw_only=True):
    """A page of a response's input items."""

    object: Literal["list"] = "list"
    data: list[dict[str, Any]]
    first_id: str | None
    last_id: str | None
    has_more: bool


class DeletedResponse(msgspec.Struct, frozen=True, kw_only=True):
    """A response that is no more."""

    id: str
    object: Literal["response"] = "response"
    deleted: bool = True
