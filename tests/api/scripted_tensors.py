"""Tensor models that answer as a test says: the same promises as the real ones, kept without an engine."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import replace

from appliance.core.errors import InvalidRequestError, NotFoundError
from appliance.core.tensors import (
    BatchStatistics,
    Datatype,
    Duration,
    ModelSignature,
    ModelState,
    Tensor,
    TensorModelCard,
    TensorRequest,
    TensorResult,
    TensorSpec,
    TensorStatistics,
)


def card_of(*datatypes: Datatype, batched: bool = True) -> TensorModelCard:
    """Return the card of an `echo` with one input and output of each datatype, called after it."""
    specs = tuple(TensorSpec(each.lower(), each, (-1, -1)) for each in datatypes)
    return TensorModelCard(
        name="echo",
        version="2",
        versions=("1", "2"),
        platform="onnxruntime_onnx",
        signature=ModelSignature(specs, specs, batched=batched, opset=17),
        properties={"execution_providers": "CPUExecutionProvider", "threads": "1"},
    )


class ScriptedTensors:
    """One model, `echo`, that gives back what it gets, at first a tensor `fp32`.

    Attributes:
        requests: What was asked for.
        refusals: Raised instead by the next calls of `infer` and `load`, one each.
        answer: Makes the outputs of a request.
        gate: When set by a test, `infer` waits for it.
        cancelled: Set once a request was cancelled.
        is_loaded: What `is_ready` says.
        now: The model's card.
    """

    def __init__(self) -> None:
        self.requests: list[TensorRequest] = []
        self.refusals: list[Exception] = []
        self.answer: Callable[[TensorRequest], Sequence[Tensor]] = _echo
        self.gate: asyncio.Event | None = None
        self.waiting = asyncio.Event()
        self.cancelled = asyncio.Event()
        self.is_loaded = True
        self.now = card_of(Datatype.FP32)

    def index(self) -> Sequence[ModelState]:
        state = (
            ModelState("echo", "2", "READY") if self.is_loaded else ModelState("echo", "2", "UNAVAILABLE", "unloaded")
        )
        return [ModelState("echo", "1", "UNAVAILABLE", "not loaded"), state]

    def card(self, model: str, version: str = "") -> TensorModelCard:
        if model != "echo" or version not in ("", *self.now.versions):
            raise NotFoundError(f"There is no tensor model {model!r}; there is echo.", code="model_not_found")
        return replace(self.now, version=version or self.now.version)

    def is_ready(self, model: str, version: str = "") -> bool:
        return self.card(model, version).version == "2" and self.is_loaded

    def statistics(self, model: str = "", version: str = "") -> Sequence[TensorStatistics]:
        if model:
            self.card(model, version)
        if not self.is_loaded:
            return []
        half = Duration(len(self.requests), 0.5)
        batches = {4: BatchStatistics(4, compute_infer=half), 1: BatchStatistics(1)}
        return [TensorStatistics("echo", "2", 1.5, 8, 2, success=half, queue=Duration(1, 1e-9), batches=batches)]

    async def infer(self, request: TensorRequest) -> TensorResult:
        card = self.card(request.model, request.version)
        if self.refusals:
            raise self.refusals.pop(0)
        known = {each.name: each.datatype for each in card.signature.inputs}
        for each in request.inputs:
            if known.get(each.name) is not each.datatype:
                raise InvalidRequestError(f"{each.name!r} is no {each.datatype} input.", code="invalid_value")
        self.requests.append(request)
        if self.gate is not None:
            self.waiting.set()
            try:
                await self.gate.wait()
            except asyncio.CancelledError:
                self.cancelled.set()
                raise
        return TensorResult(card.name, card.version, self.answer(request))

    async def load(self, model: str) -> None:
        self.card(model)
        if self.refusals:
            raise self.refusals.pop(0)
        self.is_loaded = True

    async def unload(self, model: str) -> None:
        self.card(model)
        self.is_loaded = False


def _echo(request: TensorRequest) -> Sequence[Tensor]:
    given = {each.name: each for each in request.inputs}
    missing = [each for each in request.outputs if each not in given]
    if missing:
        raise InvalidRequestError(f"There is no input for {missing}.", code="invalid_value")
    return [given[name] for name in request.outputs]
