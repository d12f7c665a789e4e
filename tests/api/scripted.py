"""A serving floor that answers as a test says: the same promises as the real one, kept without an engine."""

from __future__ import annotations

import asyncio
from array import array
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Literal

from appliance.core.encoders import ClassificationRequest, Classifications, Ranking, RerankRequest
from appliance.core.errors import ApplianceError, InvalidRequestError, NotFoundError
from appliance.core.releases import Criteria
from appliance.core.types import (
    ChatMessage,
    Delta,
    EmbeddingRequest,
    Embeddings,
    FinishReason,
    GenerationRequest,
    Health,
    ModelCard,
    ModelRuntime,
    Prompt,
    PromptSize,
    RuntimeChange,
    Timings,
    Tokenization,
    Usage,
)
from appliance.core.wishes import SelfTestReport, Soak, Wish, WishState

CONTEXT_LENGTH = 4096

LONGEST_INPUT = 10_000
"""Tokens that are read of a text to embed or to classify."""

Step = Delta | ApplianceError | Exception | asyncio.Event
"""What a generation does next: deliver a delta, fail, or wait until the test sets the event."""

Script = Callable[[GenerationRequest], Iterable[Step]]

TIMINGS = Timings(queue_s=0.25, prefill_s=0.5, decode_s=1.5)


def say(*texts: str, index: int = 0, reason: FinishReason = FinishReason.STOP) -> list[Delta]:
    """Return deltas of one token each and the end of the choice."""
    return [
        *(Delta(index=index, text=text, token_count=1) for text in texts),
        Delta(index=index, text="", token_count=0, finish_reason=reason),
    ]


def greet(request: GenerationRequest) -> Iterable[Step]:
    """Say the same to everyone, each choice in turn, as far as `max_tokens` allows."""
    words = ("Hello", ", ", "世界", "!")
    allowed = len(words) if request.sampling.max_tokens is None else request.sampling.max_tokens
    reason = FinishReason.LENGTH if allowed < len(words) else FinishReason.STOP
    for index in range(request.n):
        yield from say(*words[:allowed], index=index, reason=reason)


class ScriptedGeneration:
    """Accepted work that follows its script, whether somebody takes from it or not, as an engine does.

    Attributes:
        cancelled: Set once it was cancelled before its end.
        delivered: How many deltas have come so far, taken or not.
    """

    def __init__(self, request: GenerationRequest, model: str, steps: Iterable[Step], prompt_tokens: int) -> None:
        self.request = request
        self.model = model
        self.cancelled = asyncio.Event()
        self.ended = False
        self.delivered = 0
        self._waiting: list[Delta] = []
        self._error: Exception | None = None
        self._wake: Callable[[], None] | None = None
        self._usage = Usage(prompt_tokens, 0, prompt_tokens // 2)
        self._play = asyncio.get_running_loop().create_task(self._follow(steps), name="script of a generation")

    @property
    def usage(self) -> Usage:
        return self._usage

    @property
    def timings(self) -> Timings:
        return TIMINGS

    def notify(self, wake: Callable[[], None]) -> None:
        self._wake = wake

    def take(self) -> list[Delta]:
        deltas, self._waiting = self._waiting, []
        if self._error is not None and not deltas:
            raise self._error
        return deltas

    def cancel(self) -> None:
        if not self.ended:
            self.cancelled.set()
            self._play.cancel()
            self._end()

    async def _follow(self, steps: Iterable[Step]) -> None:
        for step in steps:
            if isinstance(step, asyncio.Event):
                await step.wait()
            elif isinstance(step, Exception):
                self._error = step
                break
            else:
                self._deliver(step)
                await asyncio.sleep(0)
        self._end()

    def _deliver(self, delta: Delta) -> None:
        self.delivered += 1
        done = self._usage.completion_tokens + delta.token_count
        self._usage = Usage(self._usage.prompt_tokens, done, self._usage.cached_tokens)
        self._waiting.append(delta)
        self._tell()

    def _end(self) -> None:
        self.ended = True
        self._tell()

    def _tell(self) -> None:
        if self._wake is not None:
            self._wake()


class ScriptedModels:
    """A serving floor with one model, whose tokens are the bytes of the prompt.

    Attributes:
        script: What the next generations do.
        refusals: Raised instead by the next calls of `generate`, one each.
        begin_token: Whether texts get a start token, 256.
        forgotten: Sessions that it was told to forget.
        gate: When set by a test, `generate` waits for it, as for a model that loads.
        context_length: What `prompt_size` says.
    """

    def __init__(self, name: str = "tiny") -> None:
        self.name = name
        self.script: Script = greet
        self.refusals: list[Exception] = []
        self.begin_token = False
        self.context_length = CONTEXT_LENGTH
        self.gate: asyncio.Event | None = None
        self.waiting = asyncio.Event()
        self.generations: list[ScriptedGeneration] = []
        self.accepted = asyncio.Event()
        self.forgotten: set[str] = set()
        self._watchers: set[Callable[[GenerationRequest], None]] = set()

    @property
    def idle(self) -> bool:
        return all(each.ended for each in self.generations)

    @contextmanager
    def watch(self, told: Callable[[GenerationRequest], None]) -> Iterator[None]:
        self._watchers.add(told)
        try:
            yield
        finally:
            self._watchers.discard(told)

    @property
    def requests(self) -> list[GenerationRequest]:
        return [each.request for each in self.generations]

    def cards(self) -> Sequence[ModelCard]:
        return [
            ModelCard(
                name=self.name,
                version="1",
                kind="gguf",
                task="chat",
                created=1_800_000_000,
                size=123,
                licence="Apache-2.0",
                context_length=CONTEXT_LENGTH,
                loaded=True,
            )
        ]

    async def generate(self, request: GenerationRequest) -> ScriptedGeneration:
        self._resolve(request.model)
        for each in tuple(self._watchers):
            each(request)
        if self.gate is not None:
            self.waiting.set()
            await self.gate.wait()
        if self.refusals:
            raise self.refusals.pop(0)
        tokens = _tokens(request.prompt)
        generation = ScriptedGeneration(request, f"{self.name}:1", self.script(request), len(tokens))
        self.generations.append(generation)
        self.accepted.set()
        return generation

    async def forget(self, sessions: Collection[str]) -> None:
        self.forgotten |= set(sessions)

    async def tokenize(
        self, model: str, prompt: Prompt, *, add_special: bool = True, parse_special: bool = False
    ) -> Tokenization:
        self._resolve(model)
        tokens = _tokens(prompt)
        special = (256,) if add_special and self.begin_token and not isinstance(prompt, tuple) else ()
        pieces = tuple(b"" if token == 256 else bytes([token]) for token in (*special, *tokens))
        return Tokenization((*special, *tokens), pieces, CONTEXT_LENGTH)

    async def prompt_size(self, request: GenerationRequest) -> PromptSize:
        self._resolve(request.model)
        return PromptSize(len(_tokens(request.prompt)), self.context_length, f"{self.name}:1")

    def _resolve(self, name: str) -> None:
        if name not in (self.name, f"{self.name}:1"):
            raise NotFoundError(f"There is no model {name!r}; there is {self.name}.", code="model_not_found")


def _tokens(prompt: Prompt) -> tuple[int, ...]:
    if isinstance(prompt, str):
        return tuple(prompt.encode())
    if prompt and isinstance(prompt[0], ChatMessage):
        return tuple("".join(each.content for each in prompt if isinstance(each, ChatMessage)).encode())
    return tuple(each % 256 for each in prompt if isinstance(each, int))


class ScriptedEmbedding:
    """An embedder whose tokens are the bytes of the text, and whose vectors may have any number of dimensions.

    Attributes:
        requests: What was asked for.
        gate: When set by a test, `embed` waits for it.
        cancelled: Set once a request was cancelled.
    """

    def __init__(self, name: str = "tiny", dimensions: int = 4) -> None:
        self.requests: list[EmbeddingRequest] = []
        self.gate: asyncio.Event | None = None
        self.waiting = asyncio.Event()
        self.cancelled = asyncio.Event()
        self._names = (name, f"{name}:1")
        self._dimensions = dimensions

    async def embed(self, request: EmbeddingRequest) -> Embeddings:
        if request.model not in self._names:
            raise NotFoundError(f"There is no model {request.model!r}; there is {self._names[0]}.", param="model")
        self.requests.append(request)
        if self.gate is not None:
            self.waiting.set()
            try:
                await self.gate.wait()
            except asyncio.CancelledError:
                self.cancelled.set()
                raise
        size = request.dimensions or self._dimensions
        vectors = [array("f", [1 / 3 + index] + [0.1] * (size - 1)) for index in range(len(request.inputs))]
        counts = [len(each.encode() if isinstance(each, str) else each) for each in request.inputs]
        truncated = [index for index, count in enumerate(counts) if request.truncate and count > LONGEST_INPUT]
        return Embeddings(self._names[1], vectors, [min(each, LONGEST_INPUT) for each in counts], truncated)


class ScriptedClassifiers:
    """A cross-encoder that counts the query's words in a document, and a classifier that looks for good and bad.

    Attributes:
        rerank_requests: What was to be ordered.
        classification_requests: What was to be classified.
        method: How the next documents are ordered.
        exclusive: Whether the labels are.
        gate: When set by a test, the work waits for it.
        cancelled: Set once a request was cancelled.
    """

    def __init__(self, name: str = "tiny") -> None:
        self.rerank_requests: list[RerankRequest] = []
        self.classification_requests: list[ClassificationRequest] = []
        self.method: Literal["cross-encoder", "embedding"] = "cross-encoder"
        self.exclusive = True
        self.gate: asyncio.Event | None = None
        self.waiting = asyncio.Event()
        self.cancelled = asyncio.Event()
        self._names = (name, f"{name}:1")

    async def rerank(self, request: RerankRequest) -> Ranking:
        await self._begin(request.model or self._names[0])
        self.rerank_requests.append(request)
        words = set(request.query.split())
        scores = [len(words & set(each.split())) / len(words | {""}) for each in request.documents]
        counts, truncated = _counted(request.documents, request.truncate)
        return Ranking(self._names[1], self.method, scores, counts, truncated)

    async def classify(self, request: ClassificationRequest) -> Classifications:
        await self._begin(request.model)
        self.classification_requests.append(request)
        found = [[0.1, 0.7 if "good" in each else 0.2, 0.7 if "bad" in each else 0.2] for each in request.inputs]
        counts, truncated = _counted(request.inputs, request.truncate)
        labels = ("neutral", "good", "bad")
        return Classifications(self._names[1], labels, self.exclusive, found, counts, truncated)

    async def _begin(self, model: str) -> None:
        if model not in self._names:
            raise NotFoundError(f"There is no model {model!r}; there is {self._names[0]}.", param="model")
        if self.gate is not None:
            self.waiting.set()
            try:
                await self.gate.wait()
            except asyncio.CancelledError:
                self.cancelled.set()
                raise


def _counted(texts: Sequence[str], truncate: bool) -> tuple[list[int], list[int]]:
    """Return the tokens of each text, which are its bytes, and which of them were cut."""
    counts = [len(each.encode()) for each in texts]
    truncated = [index for index, count in enumerate(counts) if truncate and count > LONGEST_INPUT]
    return [min(each, LONGEST_INPUT) for each in counts], truncated


class ScriptedTuning:
    """One loaded model, whose context was made for 8 sequences and 512 tokens a step."""

    def __init__(self, name: str = "tiny") -> None:
        self.now = ModelRuntime(f"{name}:1", 2, 512, 512, 0.15)
        self._names = (name, f"{name}:1")

    def runtime(self, model: str) -> ModelRuntime:
        if model not in self._names:
            raise NotFoundError(f"The model {model!r} is not loaded.", code="model_not_loaded", param="model")
        return self.now

    def tune(self, model: str, change: RuntimeChange) -> ModelRuntime:
        given = {name: getattr(change, name) for name in RuntimeChange.__slots__}
        tuned = replace(self.runtime(model), **{name: value for name, value in given.items() if value is not None})
        if not 8 <= tuned.batch_tokens <= tuned.most_batch_tokens:
            raise InvalidRequestError("It can have 8 to 512 tokens.", param="batch_tokens", code="invalid_value")
        self.now = tuned
        return tuned


class ScriptedHealth:
    """A health source that a test sets by hand."""

    def __init__(self) -> None:
        self.now = Health(ready=True)

    def health(self) -> Health:
        return self.now


class ScriptedVersions:
    """A box with every model there is, in versions of any name; a test of the door, not of what is behind it."""

    def __init__(self) -> None:
        self.passes = True
        self._wishes: dict[str, Wish] = {}

    def wishes(self) -> Sequence[Wish]:
        return list(self._wishes.values())

    def wish(self, name: str) -> Wish | None:
        return self._wishes.get(name, Wish(name, "1", None, "confirmed", "", "", 0.0, "a test"))

    async def test(self, full_name: str, criteria: Criteria) -> SelfTestReport:
        return SelfTestReport(passed=self.passes, detail="" if self.passes else f"{full_name} crashed")

    async def activate(self, full_name: str, *, origin: str, soak: Soak | None, criteria: Criteria) -> Wish:
        name, _, version = full_name.partition(":")
        state: WishState = "trial" if soak else "confirmed"
        self._wishes[name] = Wish(name, version, "1", state, "", "", 0.0, origin)
        return self._wishes[name]

    async def rollback(self, name: str, *, origin: str, reason: str, code: str = "requested") -> Wish:
        self._wishes[name] = Wish(name, "2", "1", "rolled_back", reason, "requested", 0.0, origin)
        return self._wishes[name]

    async def settled(self, name: str) -> Wish:
        return self._wishes[name]
