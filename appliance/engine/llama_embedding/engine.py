"""An embedding context as the event loop sees it: hand in inputs, await vectors, know how it is doing.

Everything here runs on the loop. The thread is reached by its queue of commands, and reaches back by one
`call_soon_threadsafe` a batch.
"""

from __future__ import annotations

import asyncio
import math
import time
from array import array
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from appliance.core.errors import ApplianceError, EngineError, InvalidRequestError, OverloadedError
from appliance.core.types import FinishReason, Vector
from appliance.engine.cpu_budget import CpuBudget
from appliance.engine.llama.engine import INLINE_TOKENIZE_CHARACTERS, LONGEST_RETRY_AFTER_S, STOP_TIMEOUT_S
from appliance.engine.llama.model import LlamaModel
from appliance.engine.llama.native import computes_on_gpu
from appliance.engine.llama.posting import post
from appliance.engine.llama_embedding.pooling import shortened
from appliance.engine.llama_embedding.worker import Cancel, Embed, EmbeddingConfig, Job, Report, Worker
from appliance.observe.metrics import ModelMetrics

WEIGHT = 0.2
"""Share of the newest batch in the seconds a token takes."""

TEXT_CHARACTERS = 32
"""As many characters take the time that a text takes by itself."""

Input = str | Sequence[int]


class LlamaEmbedder:
    """One GGUF model that embeds.

    Attributes:
        name: The full `name:version`, for answers and metrics.
        ended: Done when the thread has ended; its result is the error that ended it, or None after `close`.
    """

    def __init__(
        self,
        name: str,
        open_model: Callable[[], LlamaModel],
        config: EmbeddingConfig,
        metrics: ModelMetrics,
        cpu: CpuBudget | None = None,
    ) -> None:
        """Prepare an embedder; `load` makes one that runs."""
        self.name = name
        self.config = config
        self._metrics = metrics
        loop = asyncio.get_running_loop()
        self.ended: asyncio.Future[ApplianceError | None] = loop.create_future()
        self._ready: asyncio.Future[None] = loop.create_future()
        self._open: set[Job] = set()
        self._token_s = 0.005
        self._worker = Worker(
            name,
            open_model,
            config,
            on_ready=lambda nothing: post(loop, self._ready.set_result, nothing),
            on_report=lambda report: post(loop, self._take_report, report),
            on_end=lambda error: post(loop, self._take_end, error),
            cpu=cpu,
        )

    @classmethod
    async def load(
        cls,
        name: str,
        path: Path,
        config: EmbeddingConfig,
        metrics: ModelMetrics,
        *,
        gpu_layers: int,
        shared: LlamaModel | None = None,
        cpu: CpuBudget | None = None,
    ) -> LlamaEmbedder:
        """Load the file in a new thread, or take weights that are loaded already, and return what then runs.

        Args:
            name: The full `name:version`.
            path: The GGUF file.
            config: How to run it.
            metrics: Where to count.
            gpu_layers: Layers on the GPU.
            shared: The file's weights, which now have this owner too.
            cpu: Whom to ask before computing on the CPU; None asks nobody.

        Raises:
            ModelFileError: llama.cpp refuses the file, or the model makes no embeddings.
            EngineError: There is not enough memory, or the model cannot be evaluated.
        """
        cpu = None if computes_on_gpu(gpu_layers) else cpu
        embedder = cls(name, lambda: shared or LlamaModel(path, gpu_layers=gpu_layers), config, metrics, cpu)
        embedder._worker.start()
        try:
            outcomes: list[asyncio.Future[Any]] = [embedder._ready, embedder.ended]
            await asyncio.wait(outcomes, return_when=asyncio.FIRST_COMPLETED)
        except asyncio.CancelledError:
            await embedder.close()  # native code that loads must not outlive the interpreter
            raise
        if not embedder._ready.done():
            raise embedder.ended.result() or EngineError("The embedder ended while loading.", code="engine_died")
        return embedder

    # What the model is

    @property
    def dimensions(self) -> int:
        """Return how many numbers a vector has."""
        return self._worker.context.dimensions

    @property
    def longest_input(self) -> int:
        """Return how many tokens an input may have."""
        return self._worker.context.longest_input

    @property
    def pooling(self) -> str:
        """Return how the states of an input's tokens become one vector."""
        return self._worker.context.pooling.name.lower()

    @property
    def is_matryoshka(self) -> bool:
        """Return True if the start of a vector is known to be one itself: the model was trained so.

        No key of a GGUF file tells, so this knows only the architecture all of whose models were.
        """
        return self._worker.model.metadata("general.architecture") == "gemma-embedding"

    # Work

    @property
    def open_requests(self) -> int:
        """Return how many requests have not ended."""
        return len(self._open)

    @property
    def queue_full(self) -> bool:
        """Return True if one more request would be refused."""
        return len(self._open) > self.config.queue_size

    async def tokenize(self, inputs: Sequence[Input], *, truncate: bool) -> tuple[list[array[int]], list[int]]:
        """Return each input's token ids, and the indices of the inputs that were cut.

        A text's ids have those that the model wants around it; given ids are used as they are. Many or long texts do
        not hold up the loop.

        Raises:
            InvalidRequestError: An input is empty, has unknown ids, or is too long and not to be truncated.
        """
        if sum(len(each) for each in inputs if isinstance(each, str)) <= INLINE_TOKENIZE_CHARACTERS:
            return self._tokenize(inputs, truncate)
        return await asyncio.to_thread(self._tokenize, inputs, truncate)

    async def count_tokens(self, texts: Sequence[str]) -> list[int]:
        """Return how many tokens each text has, uncut, those that the model wants around it included.

        Raises:
            InvalidRequestError: A text is over 2 GiB or cannot be tokenized.
        """
        if sum(map(len, texts)) + TEXT_CHARACTERS * len(texts) <= INLINE_TOKENIZE_CHARACTERS:
            return self._count_tokens(texts)
        return await asyncio.to_thread(self._count_tokens, texts)

    def _count_tokens(self, texts: Sequence[str]) -> list[int]:
        model = self._worker.model
        return [len(model.tokenize(each, add_special=True, parse_special=False)) for each in texts]

    def _tokenize(self, inputs: Sequence[Input], truncate: bool) -> tuple[list[array[int]], list[int]]:
        tokenized = [self._tokens(each, f"input[{index}]", truncate) for index, each in enumerate(inputs)]
        return [tokens for tokens, _ in tokenized], [index for index, (_, cut) in enumerate(tokenized) if cut]

    def _tokens(self, given: Input, place: str, truncate: bool) -> tuple[array[int], bool]:
        model = self._worker.model
        tokens: Sequence[int]
        tokens = model.tokenize(given, add_special=True, parse_special=False) if isinstance(given, str) else given
        self._check(tokens, place, truncate)
        is_too_long = len(tokens) > self.longest_input
        if is_too_long:
            plain = model.tokenize(given, add_special=False, parse_special=False) if isinstance(given, str) else tokens
            tokens = shortened(tokens, plain, self.longest_input)
        return array("i", tokens), is_too_long

    def _check(self, tokens: Sequence[int], place: str, truncate: bool) -> None:
        if not tokens:
            raise InvalidRequestError(f"{place} has no tokens.", param="input", code="empty_prompt")
        size = self._worker.model.vocabulary_size
        if not (min(tokens) >= 0 and max(tokens) < size):
            raise InvalidRequestError(f"{place} has token ids outside 0 to {size - 1}.", param="input")
        if len(tokens) > self.longest_input and not truncate:
            raise InvalidRequestError(
                f"{place} has {len(tokens)} tokens; {self.name} embeds up to {self.longest_input}.",
                advice="Split it, set `truncate`, or raise `max_embedding_tokens` if the model was trained on more.",
                param="input",
                code="context_length_exceeded",
            )

    async def embed(self, inputs: Sequence[array[int]]) -> Sequence[Vector]:
        """Return a vector of length 1 for each input. Leaving cancels, and nobody else notices.

        Args:
            inputs: One or more, as `tokenize` returns them.

        Raises:
            OverloadedError: The queue is full.
            EngineError: An input could not be evaluated, or the thread has ended.
        """
        if self.ended.done():
            raise EngineError(f"The embedder of {self.name} has ended.", code="engine_died")
        if self.queue_full:
            raise OverloadedError(
                f"{len(self._open)} requests for embeddings wait; {self.config.queue_size} may wait beside one.",
                advice="Try again later, or raise `queue_size`.",
                retry_after_s=self._retry_after(),
            )
        job = Job(inputs, time.monotonic(), asyncio.get_running_loop().create_future())
        self._open.add(job)
        self._metrics.prompt_tokens(job.tokens)
        self._worker.put(Embed(job))
        self._show_load()
        try:
            return await job.answer
        finally:
            if job in self._open:  # the caller left
                self._worker.put(Cancel(job))
                self._forget(job)

    # State

    @property
    def heartbeat_age_s(self) -> float:
        """Return the seconds since the thread last went round; infinite once it has ended."""
        return math.inf if self.ended.done() else time.monotonic() - self._worker.beat_at

    async def close(self) -> None:
        """End the thread and give the model up; open requests end with an error.

        Raises:
            EngineError: The thread did not end in time; its memory is lost until the process ends.
        """
        self._worker.stop()
        try:
            async with asyncio.timeout(STOP_TIMEOUT_S):
                await asyncio.shield(self.ended)
        except TimeoutError as error:
            raise EngineError(f"The embedder of {self.name} did not stop within {STOP_TIMEOUT_S:g} s.") from error

    def _retry_after(self) -> float:
        """Estimate the seconds until all that is accepted is through."""
        seconds = self._token_s * sum(job.tokens for job in self._open)
        return float(math.ceil(min(LONGEST_RETRY_AFTER_S, max(1.0, seconds))))

    def _forget(self, job: Job) -> None:
        self._open.discard(job)
        self._show_load()

    def _show_load(self) -> None:
        running = sum(1 for job in self._open if job.started is not None)
        self._metrics.set_running(running)
        self._metrics.set_waiting(len(self._open) - running)

    # Called by the worker's thread through the loop

    def _take_report(self, report: Report) -> None:
        if report.tokens:
            self._token_s += WEIGHT * (report.seconds / report.tokens - self._token_s)
        for job, error in report.ended:
            if job in self._open:
                self._deliver(job, error)
        self._show_load()

    def _deliver(self, job: Job, error: ApplianceError | None) -> None:
        self._forget(job)
        if job.answer.done():  # the caller leaves just now
            return
        if error is not None:
            job.answer.set_exception(error)
            return
        now, started = time.monotonic(), job.arrived if job.started is None else job.started
        self._metrics.request_finished(FinishReason.STOP, started - job.arrived, now - started, now - job.arrived)
        job.answer.set_result([each for each in job.vectors if each is not None])

    def _take_end(self, error: ApplianceError | None) -> None:
        reason = error or EngineError(f"{self.name} was unloaded.", advice="Try again.", code="model_unloaded")
        for job in list(self._open):
            self._deliver(job, reason)
        self._show_load()
        self.ended.set_result(error)
