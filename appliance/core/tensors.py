"""Tensors, and the models that turn tensors into tensors, in the terms of the Open Inference Protocol v2.

All durations are seconds. A dimension of -1 in a model's shape is one that the caller chooses.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Literal, Protocol

from numpy.typing import NDArray

from appliance.core.types import Priority


class Datatype(StrEnum):
    """What the elements of a tensor are, in the protocol's words; `BYTES` are strings of any length."""

    BOOL = "BOOL"
    UINT8 = "UINT8"
    UINT16 = "UINT16"
    UINT32 = "UINT32"
    UINT64 = "UINT64"
    INT8 = "INT8"
    INT16 = "INT16"
    INT32 = "INT32"
    INT64 = "INT64"
    FP16 = "FP16"
    BF16 = "BF16"
    FP32 = "FP32"
    FP64 = "FP64"
    BYTES = "BYTES"


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """One input or output of a model: `shape` has the batch dimension in it, where there is one."""

    name: str
    datatype: Datatype
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class ModelSignature:
    """What a tensor model takes and gives.

    Attributes:
        batched: The first dimension of every input and output is one and the same free dimension, the batch.
        longest_batch: Most rows of a batch that the model itself allows; 0 is any number, and for one without batch.
        opset: Version of the standard operators that the file asks for.
    """

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    batched: bool
    longest_batch: int = 0
    opset: int = 0


@dataclass(frozen=True, slots=True, eq=False)
class Tensor:
    """A named tensor.

    Attributes:
        array: Row-major, in the machine's byte order. `BYTES` are an object array of `bytes`, `BF16` one of
            `ml_dtypes.bfloat16`.
    """

    name: str
    datatype: Datatype
    array: NDArray[Any]


@dataclass(frozen=True, slots=True, eq=False)
class TensorRequest:
    """One accepted inference request.

    Attributes:
        model: The name, without a version.
        version: "" is the one registered last.
        outputs: Names of the outputs that are wanted; none is all of them.
        deadline_s: Seconds from now after which the work is given up, or None.
        tenant: The API key's id, or "" on an open loopback server.
        request_id: As in `X-Request-Id`, for the log.
    """

    model: str
    version: str
    inputs: Sequence[Tensor]
    outputs: tuple[str, ...] = ()
    priority: Priority = Priority.DEFAULT
    deadline_s: float | None = None
    tenant: str = ""
    request_id: str = ""


@dataclass(frozen=True, slots=True, eq=False)
class TensorResult:
    """The answer to a `TensorRequest`, in the order of `outputs`, or else of the model's signature."""

    model: str
    version: str
    outputs: Sequence[Tensor]


@dataclass(frozen=True, slots=True)
class TensorModelCard:
    """What a client may know of a tensor model.

    Attributes:
        versions: Every registered version of the name, oldest first.
        platform: As in the protocol, for example `onnxruntime_onnx`.
        properties: What it runs with: execution providers in order, precision, threads; and, each behind `metadata.`,
            what the publisher wrote into its file. Empty while not loaded.
    """

    name: str
    version: str
    versions: tuple[str, ...]
    platform: str
    signature: ModelSignature
    properties: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class ModelState:
    """One version of a model in the repository index; `reason` says why it is not ready."""

    name: str
    version: str
    state: Literal["READY", "LOADING", "UNLOADING", "UNAVAILABLE"]
    reason: str = ""


@dataclass(slots=True)
class Duration:
    """How often something happened, and the seconds it took altogether."""

    count: int = 0
    total_s: float = 0.0

    def add(self, s: float, count: int = 1) -> None:
        """Count `count` times that took `s` seconds together."""
        self.count += count
        self.total_s += s


@dataclass(slots=True)
class BatchStatistics:
    """What batches of one size took, each counted once."""

    rows: int
    compute_input: Duration = field(default_factory=Duration)
    compute_infer: Duration = field(default_factory=Duration)
    compute_output: Duration = field(default_factory=Duration)


@dataclass(slots=True)
class TensorStatistics:
    """What a loaded version of a model has done since it was loaded; times are those of requests.

    Attributes:
        last_inference: Unix seconds of the last execution, 0 for none.
        inference_count: Rows evaluated.
        execution_count: Batches evaluated.
    """

    name: str
    version: str
    last_inference: float = 0.0
    inference_count: int = 0
    execution_count: int = 0
    success: Duration = field(default_factory=Duration)
    fail: Duration = field(default_factory=Duration)
    cancel: Duration = field(default_factory=Duration)
    queue: Duration = field(default_factory=Duration)
    compute_input: Duration = field(default_factory=Duration)
    compute_infer: Duration = field(default_factory=Duration)
    compute_output: Duration = field(default_factory=Duration)
    batches: dict[int, BatchStatistics] = field(default_factory=dict)


class TensorModels(Protocol):
    """Whatever turns tensors into tensors, as the doors see it. All but the coroutines answer at once from memory."""

    def index(self) -> Sequence[ModelState]:
        """Return every registered version of every tensor model."""
        ...

    def card(self, model: str, version: str = "") -> TensorModelCard:
        """Return what is known of a version; "" is the one registered last.

        Raises:
            NotFoundError: There is no such tensor model or version.
        """
        ...

    def is_ready(self, model: str, version: str = "") -> bool:
        """Return True if the version is loaded, warmed up and its circuit closed. Raises as `card`."""
        ...

    def statistics(self, model: str = "", version: str = "") -> Sequence[TensorStatistics]:
        """Return the figures of the loaded versions of that name, or of all. Raises as `card` if a name is given."""
        ...

    async def infer(self, request: TensorRequest) -> TensorResult:
        """Evaluate: find and if need be load the model, check the tensors, queue, run.

        Cancelling it ends the work and disturbs nobody else's.

        Raises:
            NotFoundError: No such model or version; the message names those that exist.
            InvalidRequestError: A tensor is missing, unknown, given twice, or of the wrong datatype or shape.
            OverloadedError: The queue is full.
            UnavailableError: The model cannot be loaded now, or failed too often of late (`circuit_open`).
            DeadlineExceededError: It took longer than `deadline_s`.
            EngineError: The model failed on these tensors.
        """
        ...

    async def load(self, model: str) -> None:
        """Load the version registered last, and wait until it is ready. Raises as `infer`."""
        ...

    async def unload(self, model: str) -> None:
        """Unload every version, after what is running has ended. The next request for it loads it again.

        Raises:
            NotFoundError: There is no such tensor model.
        """
        ...
