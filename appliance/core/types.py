"""Plain data and protocols that more than one room needs.

Rooms on one floor never import each other: what one needs of another it receives, typed by a protocol here.
All durations are seconds, all sizes bytes, all token ids are of the model that the request names.

Over 400 lines because every room reads one list of terms rather than looking for them in several.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from enum import IntEnum, StrEnum
from typing import Any, Literal, Protocol, TypeAlias

from appliance.core.structured import Grammar
from appliance.core.tools import Tool, ToolCallDelta, ToolChoice

Vector: TypeAlias = "array[float]"
"""An embedding: 32-bit floats (`array("f")`) in the machine's byte order, of length 1."""

KvCacheType = Literal["f16", "q8_0", "q4_0"]
"""How the KV cache stores keys and values: 16-bit floats, or blocks of 32 numbers of 8 or 4 bits with a scale each."""


class Priority(IntEnum):
    """Order of admission; OpenAI's `service_tier` names it. Lower runs first."""

    PRIORITY = 0
    DEFAULT = 1
    FLEX = 2


class FinishReason(StrEnum):
    """Why a choice ended, in OpenAI's words."""

    STOP = "stop"
    LENGTH = "length"
    TOOL_CALLS = "tool_calls"


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How tokens are drawn and when a choice ends.

    Attributes:
        temperature: 0 is greedy; otherwise logits are divided by it.
        top_p: Nucleus mass in (0, 1]; 1 is off.
        top_k: Keep the k likeliest tokens; 0 is off.
        min_p: Drop tokens below this share of the likeliest one's probability; 0 is off.
        typical_p: Locally typical mass in (0, 1]; 1 is off.
        repeat_penalty: Divides or multiplies logits of recent tokens; 1 is off.
        frequency_penalty: OpenAI's, in [-2, 2], over the generated text.
        presence_penalty: OpenAI's, in [-2, 2], over the generated text.
        repeat_last_n: How many last tokens the penalties look at.
        logit_bias: Token id to a value added to its logit.
        seed: Makes the draw repeatable; None draws a fresh one.
        stop: Strings that end the text; they are not part of it.
        stop_token_ids: Tokens that end the text; they are not part of it.
        max_tokens: Most tokens of one choice; None is up to the end of the context.
        top_logprobs: None gives no log probabilities; k >= 0 gives the chosen token's and the k likeliest.
        ignore_eos: Do not end at the model's end-of-generation tokens.
        grammar: What the text must look like, or None.
        shown_tokens: Control tokens whose name is part of the text, as the marks of tool calls; others stand for none.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    typical_p: float = 1.0
    repeat_penalty: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    repeat_last_n: int = 64
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    max_tokens: int | None = None
    top_logprobs: int | None = None
    ignore_eos: bool = False
    grammar: Grammar | None = None
    shown_tokens: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """One generated token's natural log probability, before any sampling setting.

    Attributes:
        piece: The token's bytes, which need not be whole UTF-8 characters.
        top: The likeliest tokens as (id, piece, logprob), most likely first.
    """

    token_id: int
    piece: bytes
    logprob: float
    top: tuple[tuple[int, bytes, float], ...] = ()


@dataclass(frozen=True, slots=True)
class Delta:
    """What one choice gained; the last one of a choice has a finish reason.

    Attributes:
        index: The choice, 0 to n - 1.
        text: Whole characters only; may be empty.
        token_count: Generated tokens that this delta accounts for.
        tool_calls: What its tool calls gained; their text is not in `text`.
    """

    index: int
    text: str
    token_count: int
    logprobs: tuple[TokenLogprob, ...] = ()
    finish_reason: FinishReason | None = None
    tool_calls: tuple[ToolCallDelta, ...] = ()


@dataclass(frozen=True, slots=True)
class Usage:
    """Token counts over all choices; `cached_tokens` were reused from the KV cache, not computed."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int


@dataclass(frozen=True, slots=True)
class Timings:
    """Seconds from acceptance to first prefill, of prefill to first token, and from there to the end."""

    queue_s: float
    prefill_s: float
    decode_s: float


@dataclass(frozen=True, slots=True)
class ChatMessage:
    """One message for the chat template.

    Attributes:
        role: system, developer, user, assistant or tool.
        content: The text; parts are joined at the door.
        extra: Further fields the template may read (name, tool_calls, tool_call_id).
    """

    role: str
    content: str
    extra: Mapping[str, Any] = field(default_factory=dict)


Prompt = str | tuple[int, ...] | tuple[ChatMessage, ...]
"""Text to complete, token ids to complete, or messages for the chat template. An empty tuple is refused at the door."""


@dataclass(frozen=True, slots=True)
class Session:
    """Whose stored text a prompt is made of, so that deleting it can reach what the models keep of it.

    Attributes:
        id: A conversation's, or that of the first of the responses that follow each other.
        as_of: Monotonic time before which the text was not yet read from the store, in seconds.
    """

    id: str
    as_of: float


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """One accepted HTTP request's worth of work.

    Attributes:
        model: `name`, `name:version`, `name:adapter` or `name:version:adapter`.
        n: How many choices; they share the prompt's KV cells.
        tenant: The API key's id, or "" on an open loopback server.
        weight: The tenant's share of the engine when several want it, relative to theirs.
        pinned: Keep the state of prompt and answer for a day, even if others need the room.
        deadline_s: Seconds from now after which the work is given up, or None.
        request_id: As in `X-Request-Id`, for the log.
        tools: What the model may call, where the prompt is messages.
        parallel_tool_calls: Whether it may call several at once.
        session: Whose text the prompt is, or None if nobody will ever delete it.
    """

    model: str
    prompt: Prompt
    sampling: SamplingParams
    n: int = 1
    tenant: str = ""
    weight: float = 1.0
    pinned: bool = False
    priority: Priority = Priority.DEFAULT
    deadline_s: float | None = None
    request_id: str = ""
    tools: tuple[Tool, ...] = ()
    tool_choice: ToolChoice = field(default_factory=ToolChoice)
    parallel_tool_calls: bool = True
    session: Session | None = None


class Generation(Protocol):
    """Accepted work of one request. Its one owner takes what comes, to the end or until `cancel`.

    Everything happens on the event loop and returns at once. The owner looks with `take`, and is told by `notify` when
    to look again. The work goes on unless it is cancelled: call `cancel` in a `finally`.
    """

    @property
    def model(self) -> str:
        """The full `name:version` or `name:version:adapter` that answers."""
        ...

    @property
    def usage(self) -> Usage:
        """Counts so far; complete once the work has ended."""
        ...

    @property
    def timings(self) -> Timings:
        """Times so far; complete once the work has ended."""
        ...

    @property
    def ended(self) -> bool:
        """True once nothing more will come; what has come may still wait to be taken."""
        ...

    def notify(self, wake: Callable[[], None]) -> None:
        """Have `wake` called after each arrival from now on, and after the end."""
        ...

    def take(self) -> list[Delta]:
        """Return the deltas of all choices that came since the last call, in their order; none is an empty list.

        Raises:
            ApplianceError: What ended the work; only when all that came before it has been taken.
        """
        ...

    def cancel(self) -> None:
        """Free the work's sequences within one engine step. Idempotent."""
        ...


@dataclass(frozen=True, slots=True)
class Tokenization:
    """A text as token ids, each token's bytes, and the context length of the model."""

    tokens: tuple[int, ...]
    pieces: tuple[bytes, ...]
    context_length: int


@dataclass(frozen=True, slots=True)
class PromptSize:
    """The tokens of a prompt, and the context length of the model that reads it, by its full name."""

    tokens: int
    context_length: int
    model: str


@dataclass(frozen=True, slots=True)
class ModelCard:
    """What a client may know of a registered model.

    Attributes:
        name: Without the version; of an adapter, its base's.
        version: Of an adapter, its base's.
        adapter: An adapter's own name, or "" for a model.
        created: Unix seconds of registration.
        context_length: Tokens a request may use, 0 when unknown.
        loaded: True while an engine holds it.
        meant: True for the one that its short name means.
    """

    name: str
    version: str
    kind: str
    task: str
    created: int
    size: int
    licence: str
    context_length: int
    loaded: bool
    adapter: str = ""
    meant: bool = False


class TextModels(Protocol):
    """The serving floor as the doors see it."""

    def cards(self) -> Sequence[ModelCard]:
        """Return every registered model and adapter, from the registry as it is now; oldest versions first."""
        ...

    async def generate(self, request: GenerationRequest) -> Generation:
        """Accept the request: find and if need be load the model, render, tokenize, queue.

        Raises:
            NotFoundError: No such model; the message names those that exist.
            InvalidRequestError: The prompt does not fit, or a parameter is out of range.
            OverloadedError: The queue is full.
            UnavailableError: The model cannot be loaded now.
        """
        ...

    async def tokenize(
        self, model: str, prompt: Prompt, *, add_special: bool = True, parse_special: bool = False
    ) -> Tokenization:
        """Return the prompt as the engine would read it. Raises as `generate` does."""
        ...

    async def forget(self, sessions: Collection[str]) -> None:
        """Forget what is kept of sessions, whose text has been deleted: KV states in memory and in files.

        No model, loaded or not, has a state of theirs when this returns, nor will a request whose text was read before.
        It can be repeated.

        Args:
            sessions: Ids of `Session`.

        Raises:
            StorageError: Not all files could be deleted.
        """
        ...

    async def prompt_size(self, request: GenerationRequest) -> PromptSize:
        """Return how long the prompt of a request is, its tools included, however long. Raises as `generate` does."""
        ...


class IdleTime(Protocol):
    """Whether anybody wants a text model."""

    @property
    def idle(self) -> bool:
        """Return True if no request is open."""
        ...

    def watch(self, told: Callable[[GenerationRequest], None]) -> AbstractContextManager[None]:
        """Have every request told as it comes, before anything is done for it, until the context is left."""
        ...


EmbeddingInput = str | tuple[int, ...]
"""A text, which gets the tokens that the model wants around it, or token ids, which are used as they are."""


@dataclass(frozen=True, slots=True)
class EmbeddingRequest:
    """Inputs to embed with one model.

    Attributes:
        model: `name` or `name:version`.
        inputs: One or more.
        truncate: Cut inputs that are too long instead of refusing them.
        dimensions: Numbers of a vector, or None for the model's own.
        keep: Whether vectors may be kept for later requests. Whoever has to erase texts keeps their vectors himself.
        priority: Order of admission, where the engine has one; others serve all who wait in turns.
        tenant: The API key's id, or "" on an open loopback server.
        deadline_s: Seconds from now after which the work is given up, or None.
        request_id: As in `X-Request-Id`, for the log.
    """

    model: str
    inputs: Sequence[EmbeddingInput]
    truncate: bool = False
    dimensions: int | None = None
    keep: bool = True
    priority: Priority = Priority.DEFAULT
    tenant: str = ""
    deadline_s: float | None = None
    request_id: str = ""


@dataclass(frozen=True, slots=True)
class Embeddings:
    """The answer to an `EmbeddingRequest`.

    Attributes:
        model: The full `name:version` that answers.
        vectors: One for each input, in order.
        token_counts: Tokens of each input as they were evaluated.
        truncated: Indices of the inputs that were cut.
    """

    model: str
    vectors: Sequence[Vector]
    token_counts: Sequence[int]
    truncated: Sequence[int] = ()


class EmbeddingModels(Protocol):
    """Whatever embeds, as the doors see it."""

    async def embed(self, request: EmbeddingRequest) -> Embeddings:
        """Return a vector for each input: find and if need be load the model, tokenize, queue, evaluate.

        Cancelling it ends the work and disturbs nobody else's.

        Raises:
            NotFoundError: No such model; the message names those that exist.
            InvalidRequestError: An input does not fit, or the model has not these dimensions.
            OverloadedError: The queue is full.
            UnavailableError: The model cannot be loaded now.
            DeadlineExceededError: It took longer than `deadline_s`.
            EngineError: An input could not be evaluated.
        """
        ...


class TokenCounter(Protocol):
    """Whatever knows how many tokens a model makes of a text."""

    async def count_tokens(self, model: str, texts: Sequence[str]) -> Sequence[int]:
        """Return the tokens of each text as the model embeds it, those that it wants around a text included.

        Nothing is cut, however long; a blank text counts too.

        Raises:
            NotFoundError: No such model; the message names those that exist.
            InvalidRequestError: The model is for something else.
            UnavailableError: The model cannot be loaded now.
        """
        ...

    async def longest_input(self, model: str) -> int:
        """Return how many tokens of a text the model embeds, those around it included; raises the same."""
        ...


@dataclass(frozen=True, slots=True)
class ModelRuntime:
    """What of a loaded model can be changed while it runs.

    Attributes:
        model: The full `name:version`.
        threads: CPU threads.
        batch_tokens: Most tokens of one engine step.
        most_batch_tokens: What the model's context was made for; `batch_tokens` cannot be more.
        target_inter_token_latency_s: Engine steps are cut to this length while anyone is streaming.
    """

    model: str
    threads: int
    batch_tokens: int
    most_batch_tokens: int
    target_inter_token_latency_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class RuntimeChange:
    """New values for a loaded model; None leaves one as it is. 0 threads are one per physical core."""

    threads: int | None = None
    batch_tokens: int | None = None
    target_inter_token_latency_s: float | None = None


class TunableModels(Protocol):
    """The loaded models as an administrator sees them."""

    def runtime(self, model: str) -> ModelRuntime:
        """Return what a loaded model runs with now.

        Raises:
            NotFoundError: There is no such model, or it is not loaded.
        """
        ...

    def tune(self, model: str, change: RuntimeChange) -> ModelRuntime:
        """Change what a loaded model runs with from its next step on, until it is unloaded.

        Raises:
            NotFoundError: There is no such model, or it is not loaded.
            InvalidRequestError: A value does not fit the model; nothing was changed.
        """
        ...


@dataclass(frozen=True, slots=True)
class Health:
    """Whether the box can answer now; `reason` says why not, in words for a person."""

    ready: bool
    reason: str = ""


class HealthSource(Protocol):
    """Answers at once from memory; never waits on an engine."""

    def health(self) -> Health:
        """Return readiness as of the last heartbeat."""
        ...
