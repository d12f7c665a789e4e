"""Where a request goes: a loaded model, and perhaps an adapter beside it."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from appliance.core.errors import ApplianceError, EngineError
from appliance.core.types import SamplingParams
from appliance.engine.llama.engine import LlamaEngine
from appliance.engine.llama.generation import LlamaGeneration
from appliance.registry.known import RegisteredModel
from appliance.serving.adapters import LoadedAdapter, ModelAdapters
from appliance.serving.prompts import PromptRenderer
from appliance.serving.soak import Record
from appliance.serving.tools.offer import ModelTools
from appliance.store.locks import Hold

UNLOADED = "model_unloaded"
"""Code of the error of requests whose engine was closed."""


@dataclass(eq=False, slots=True)
class LoadedModel:
    """One model that runs.

    Attributes:
        renderer: Renders its chat template; None if it has none.
        tools: How it is told of tools.
        adapters: Those that are loaded beside it.
        leases: Requests between being routed here and being queued in the engine.
        record: What became of its requests.
    """

    registered: RegisteredModel
    engine: LlamaEngine
    renderer: PromptRenderer | None
    tools: ModelTools
    hold: Hold
    adapters: ModelAdapters
    last_used: float = 0.0
    leases: int = 0
    record: Record = field(default_factory=Record)

    @property
    def idle(self) -> bool:
        """Return True if unloading it would hurt nobody."""
        return self.leases == 0 and self.engine.open_requests == 0


@dataclass(frozen=True, slots=True)
class Route:
    """A loaded model, and an adapter beside it or None. Between `take` and `give_back` both stay loaded."""

    model: LoadedModel
    adapter: LoadedAdapter | None

    def take(self) -> None:
        """Keep both loaded.

        Raises:
            NotFoundError: The adapter has been removed meanwhile.
            ConflictError: It is being removed just now.
        """
        now = asyncio.get_running_loop().time()
        if self.adapter is not None:
            self.model.adapters.take(self.adapter, now)
        self.model.leases += 1
        self.model.last_used = now

    def give_back(self) -> None:
        """Let both be unloaded, once no request uses them any more."""
        self.model.leases -= 1
        if self.adapter is not None:
            self.model.adapters.release(self.adapter, asyncio.get_running_loop().time())

    def submit(self, tokens: Sequence[int], sampling: SamplingParams, **options: Any) -> LlamaGeneration:
        """Queue a request in the engine; see `LlamaEngine.submit`. The adapter stays loaded until its end."""
        engine, loaded, adapters = self.model.engine, self.adapter, self.model.adapters
        now = asyncio.get_running_loop().time
        if loaded is not None:
            adapters.take(loaded, now())

        def end() -> None:
            note(self.model.record, generation)
            if loaded is not None:
                adapters.release(loaded, now())

        try:
            generation = engine.submit(
                tokens, sampling, adapter=None if loaded is None else loaded.adapter, on_end=end, **options
            )
        except ApplianceError:
            if loaded is not None:
                adapters.release(loaded, now())
            raise
        return generation


def note(record: Record, generation: LlamaGeneration) -> None:
    """Note how a request ended; one that its client gave up, or that ran out of the client's time, says nothing."""
    if isinstance(generation.error, EngineError):
        if generation.error.code != UNLOADED:
            record.failed()
    elif generation.error is None and not generation.open_choices:
        steps = generation.usage.completion_tokens - 1
        record.served(generation.timings.decode_s / steps if steps > 0 else None)
