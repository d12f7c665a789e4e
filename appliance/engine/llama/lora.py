"""A LoRA adapter's weights, loaded beside those of its base model. Used by the worker's thread alone."""

from __future__ import annotations

import ctypes
from array import array
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from appliance.core.errors import ApplianceError, EngineError, ModelFileError
from appliance.engine.llama.model import LlamaModel
from appliance.engine.llama.native import llama
from appliance.engine.llama.step import Run, Sequence
from appliance.observe.metrics import ModelMetrics

if TYPE_CHECKING:
    from appliance.engine.llama.context import LlamaContext

PROBE_TOKENS = 4


@dataclass(frozen=True, slots=True)
class Adapter:
    """An adapter as requests name it.

    Attributes:
        id: The SHA-256 of its file: what it evaluated is reused under this id. Several names may mean the same file.
        name: The full `name:version:adapter`, for answers and metrics.
        path: Its file, needed only while it is loaded.
    """

    id: str
    name: str
    path: Path
    metrics: ModelMetrics


@dataclass(frozen=True, slots=True)
class LoadAdapter:
    """Load an adapter beside those that are loaded; `done` is called in the worker's thread."""

    adapter: Adapter
    done: Callable[[ApplianceError | None], None]


@dataclass(frozen=True, slots=True)
class DropAdapter:
    """Free an adapter that no open request uses; `done` is called in the worker's thread."""

    id: str
    done: Callable[[ApplianceError | None], None]


class LoraAdapter:
    """The native adapter. It must be closed before its model, and no context may have it set then."""

    def __init__(self, model: LlamaModel, path: Path) -> None:
        """Read the whole file into memory; it may be removed afterwards.

        Raises:
            ModelFileError: llama.cpp refuses it; its log lines say why.
        """
        self._model = model
        with model.building:
            self._handle = llama.llama_adapter_lora_init(model.handle, str(path).encode())
        if not self._handle:
            raise ModelFileError(
                f"llama.cpp cannot load the adapter {path.name}.",
                advice="`appliance models verify` checks the file; the log has llama.cpp's own words.",
            )
        self.pointers: Any = (llama.llama_adapter_lora_p_ctypes * 1)(self._handle)
        self.scales: Any = (ctypes.c_float * 1)(1.0)

    def close(self) -> None:
        """Free the memory. Idempotent."""
        if self._handle:
            with self._model.building:
                llama.llama_adapter_lora_free(self._handle)
            self._handle = None


class LoadedAdapters:
    """The adapters that are loaded beside one model, by id."""

    def __init__(self) -> None:
        """Start without any."""
        self._adapters: dict[str, LoraAdapter] = {}

    def get(self, number: str) -> LoraAdapter | None:
        """Return the adapter of that id; "" is the model alone."""
        return self._adapters[number] if number else None

    def load(self, adapter: Adapter, model: LlamaModel, new_context: Callable[[], LlamaContext]) -> None:
        """Load an adapter and try it in a new context.

        Raises:
            ModelFileError: llama.cpp refuses the file.
            EngineError: There is not enough memory, or its answers are not numbers.
        """
        native = LoraAdapter(model, adapter.path)
        try:
            context = new_context()
            try:
                check_adapter(context, native)
            finally:
                context.close()
        except EngineError:
            native.close()
            raise
        self._adapters[adapter.id] = native

    def drop(self, number: str, context: LlamaContext) -> None:
        """Free an adapter that no sequence of the context uses."""
        adapter = self._adapters.pop(number)
        if context.adapter is adapter:
            context.use(None)
        adapter.close()

    def close(self) -> None:
        """Free all; their contexts are closed already, and the model is not yet."""
        for adapter in self._adapters.values():
            adapter.close()
        self._adapters.clear()


def check_adapter(context: LlamaContext, adapter: LoraAdapter) -> None:
    """Evaluate a few tokens in a context of their own, where an adapter that overflows harms nobody.

    Raises:
        EngineError: The adapter cannot be evaluated, or its answers are not numbers.
    """
    sequence = Sequence(0, array("i", range(PROBE_TOKENS)))
    sequence.slot = 0
    context.use(adapter)
    try:
        code = context.decode([Run(sequence, 0, PROBE_TOKENS, sample=True)])
        if code != 0:
            raise EngineError(f"The adapter cannot be evaluated (llama_decode answered {code}).")
        if not np.isfinite(context.logits().max()):
            raise EngineError(
                "The answers with this adapter are not numbers: it is damaged, or far too strong for its base.",
                advice="Remove it with `appliance models remove`.",
                code="not_a_number",
            )
    finally:
        context.use(None)
