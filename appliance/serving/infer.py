"""A request with tensors becomes engine work: name and version → model → queue → outputs."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import replace

from appliance.core.errors import ApplianceError, DeadlineExceededError, InvalidRequestError, NotFoundError
from appliance.core.settings import Settings
from appliance.core.tensors import (
    ModelSignature,
    ModelState,
    Tensor,
    TensorModelCard,
    TensorRequest,
    TensorResult,
    TensorStatistics,
)
from appliance.engine.onnx.engine import OnnxEngine
from appliance.engine.onnx.work import Arrays
from appliance.registry.known import Known, RegisteredModel
from appliance.registry.versions import Registry
from appliance.serving.purposes import ONNX
from appliance.serving.tensor_loader import LoadedTensorModel
from appliance.serving.tensor_models import LoadedTensorModels

PLATFORM = "onnxruntime_onnx"
"""What the protocol calls models of this kind."""


class TensorInference:
    """The serving floor's answer to `core.tensors.TensorModels`."""

    def __init__(self, settings: Settings, registry: Registry, models: LoadedTensorModels) -> None:
        """Serve the registered ONNX models with those that are loaded."""
        self._settings = settings
        self._registry = registry
        self._models = models

    def index(self) -> Sequence[ModelState]:
        """Return every registered version of every ONNX model."""
        return [
            ModelState(each.name, each.version, *self._models.state(each.full_name))
            for each in self._registry.list()
            if each.kind == ONNX
        ]

    def card(self, model: str, version: str = "") -> TensorModelCard:
        """Return what is known of a version; see `core.tensors.TensorModels.card`."""
        known = self._registry.known()
        versions = _versions(known, model)
        registered = self._choose(known, versions, model, version)
        loaded = self._models.find(registered.full_name)
        return TensorModelCard(
            name=registered.name,
            version=registered.version,
            versions=tuple(each.version for each in versions),
            platform=PLATFORM,
            signature=_signature(registered),
            properties={} if loaded is None else _properties(loaded.engine),
        )

    def is_ready(self, model: str, version: str = "") -> bool:
        """Return True if the version is loaded, warmed up and its circuit closed."""
        state, _ = self._models.state(self._find(model, version).full_name)
        return state == "READY"

    def statistics(self, model: str = "", version: str = "") -> Sequence[TensorStatistics]:
        """Return the figures of the loaded versions of that name, or of all."""
        wanted: Sequence[RegisteredModel]
        if version:
            wanted = [self._find(model, version)]
        elif model:
            wanted = _versions(self._registry.known(), model)
        else:
            wanted = [each for each in self._registry.list() if each.kind == ONNX]
        return [
            replace(loaded.engine.statistics, name=each.name, version=each.version)
            for each in wanted
            if (loaded := self._models.find(each.full_name)) is not None
        ]

    async def infer(self, request: TensorRequest) -> TensorResult:
        """Evaluate; see `core.tensors.TensorModels.infer`."""
        inputs = _by_name(request.inputs)
        _check_once(request.outputs, "outputs")
        deadline_s = self._limit(request.deadline_s)
        ends = asyncio.get_running_loop().time() + deadline_s
        try:
            async with asyncio.timeout(deadline_s), self._leased(request.model, request.version) as model:
                registered = model.registered
                arrays = await model.engine.infer(
                    inputs,
                    request.outputs,
                    priority=request.priority,
                    deadline_s=max(0.0, ends - asyncio.get_running_loop().time()),
                )
        except TimeoutError as error:
            raise DeadlineExceededError(
                f"{self._find(request.model, request.version).full_name} had not answered after {deadline_s:g} s.",
                advice="Send less at once, or allow more time: `timeout`, or the setting `request_timeout_s`.",
            ) from error
        datatypes = {each.name: each.datatype for each in _signature(registered).outputs}
        names = request.outputs or tuple(datatypes)
        outputs = [Tensor(name, datatypes[name], arrays[name]) for name in names]
        return TensorResult(registered.name, registered.version, outputs)

    @asynccontextmanager
    async def _leased(self, model: str, version: str) -> AsyncIterator[LoadedTensorModel]:
        """Yield a version; one that cannot be loaded makes way for the one that the name means then."""
        async with AsyncExitStack() as stack:
            while True:
                registered = self._find(model, version)
                try:
                    loaded = await stack.enter_async_context(self._models.lease(registered))
                    break
                except ApplianceError:
                    if self._find(model, version).full_name == registered.full_name:
                        raise
            yield loaded

    async def load(self, model: str) -> None:
        """Load the version that the name means, and wait until it is ready."""
        registered = self._find(model)
        deadline_s = self._limit(None)
        try:
            async with asyncio.timeout(deadline_s), self._models.lease(registered):
                pass
        except TimeoutError as error:
            raise DeadlineExceededError(
                f"{registered.full_name} was not loaded after {deadline_s:g} s; it goes on loading.",
                advice="Ask for its readiness later, or raise `request_timeout_s`.",
            ) from error

    async def unload(self, model: str) -> None:
        """Unload every version, after what is running has ended."""
        versions = _versions(self._registry.known(), model)
        async with asyncio.TaskGroup() as tasks:
            for each in versions:
                tasks.create_task(self._models.unload(each.full_name), name=f"unload {each.full_name}")

    # Names

    def _limit(self, deadline_s: float | None) -> float:
        limit = self._settings.request_timeout_s
        return limit if deadline_s is None else min(deadline_s, limit)

    def _find(self, model: str, version: str = "") -> RegisteredModel:
        known = self._registry.known()
        return self._choose(known, _versions(known, model), model, version)

    def _choose(self, known: Known, versions: Sequence[RegisteredModel], model: str, version: str) -> RegisteredModel:
        if version:
            return _version(versions, version)
        answers = self._models.short_names.without_waiting(model, known)
        return answers if answers.kind == ONNX else versions[-1]


def _versions(known: Known, model: str) -> Sequence[RegisteredModel]:
    """Return the registered versions of an ONNX model, oldest first.

    Raises:
        NotFoundError: There is none; the message names the ONNX models that exist.
    """
    versions = [each for each in known.models if each.kind == ONNX and each.name == model]
    if not versions:
        raise _no_model(known.models, model)
    return versions


def _version(versions: Sequence[RegisteredModel], wanted: str) -> RegisteredModel:
    for each in versions:
        if each.version == wanted:
            return each
    raise NotFoundError(
        f"{versions[0].name} has no version {wanted!r:.100}; it has: {', '.join(each.version for each in versions)}.",
        code="model_not_found",
        param="model",
    )


def _no_model(registered: Sequence[RegisteredModel], wanted: str) -> NotFoundError:
    if any(wanted in each.names for each in registered if each.kind != ONNX):
        return NotFoundError(
            f"{wanted:.200} takes no tensors: it is a GGUF model.",
            advice="Use it under /v1: chat/completions, completions or embeddings.",
            code="model_not_found",
            param="model",
        )
    known = ", ".join(sorted({each.name for each in registered if each.kind == ONNX}))
    return NotFoundError(
        f"There is no tensor model {wanted!r:.100}; " + (f"there are: {known}." if known else "there is none yet."),
        advice="`appliance models catalog` lists what can be had, `appliance models pull NAME` gets it.",
        code="model_not_found",
        param="model",
    )


def _signature(registered: RegisteredModel) -> ModelSignature:
    assert registered.signature is not None, "every model of the kind onnx is registered with one"
    return registered.signature


def _properties(engine: OnnxEngine) -> dict[str, str]:
    written = {f"metadata.{name}": text for name, text in engine.metadata.items()}
    return {**written, **engine.properties}


def _by_name(tensors: Sequence[Tensor]) -> Arrays:
    _check_once([each.name for each in tensors], "inputs")
    return {each.name: each.array for each in tensors}


def _check_once(names: Sequence[str], param: str) -> None:
    if len(set(names)) < len(names):
        twice = next(each for each in names if names.count(each) > 1)
        raise InvalidRequestError(
            f"The tensor {twice!r:.100} is named twice among the {param}.", param=param, code="invalid_value"
        )
