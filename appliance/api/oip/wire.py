"""The documents of the Open Inference Protocol, as they are on the wire.

Protocol: https://github.com/kserve/open-inference-protocol; extensions: Triton's.
"""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec
from msgspec import UNSET, Meta, Raw, UnsetType

from appliance.core.tensors import Datatype
from appliance.web.wire import ignored, meaning, refused

Dimension = Annotated[int, Meta(ge=0, le=2**63 - 1)]
Name = Annotated[str, Meta(min_length=1, max_length=1024)]

_SHARED_MEMORY = "clients have no memory in common with the appliance."
_SEQUENCES = "models here keep no state from one request to the next."


class InputParameters(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What belongs to one input."""

    binary_data_size: Annotated[
        Annotated[int, Meta(ge=0, le=2**63 - 1)] | None,
        meaning("Bytes of the tensor, which follow the JSON in the order of the inputs"),
    ] = None
    content_type: Annotated[str | None, ignored("the datatype says it all")] = None
    shared_memory_region: Annotated[None, refused(_SHARED_MEMORY)] = None
    shared_memory_byte_size: Annotated[None, refused(_SHARED_MEMORY)] = None
    shared_memory_offset: Annotated[None, refused(_SHARED_MEMORY)] = None


class InputTensor(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One input: its elements are in `data`, or follow the JSON as binary data."""

    name: Name
    shape: list[Dimension]
    datatype: Datatype
    parameters: InputParameters | None = None
    data: Annotated[Raw | UnsetType, meaning("The elements, row-major: one flat list, or nested as the shape says")] = (
        UNSET
    )


class OutputParameters(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How one output is wanted."""

    binary_data: Annotated[bool | None, meaning("As binary data behind the JSON")] = None
    classification: Annotated[
        Annotated[int, Meta(ge=0, le=2**31 - 1)] | None,
        meaning("Instead of the numbers so many of the highest, as `value:index`; 0 is none"),
    ] = None
    content_type: Annotated[str | None, ignored("the datatype says it all")] = None
    shared_memory_region: Annotated[None, refused(_SHARED_MEMORY)] = None
    shared_memory_byte_size: Annotated[None, refused(_SHARED_MEMORY)] = None
    shared_memory_offset: Annotated[None, refused(_SHARED_MEMORY)] = None


class RequestedOutput(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One output that is wanted."""

    name: Name
    parameters: OutputParameters | None = None


class RequestParameters(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What belongs to the request as a whole."""

    priority: Annotated[
        Annotated[int, Meta(ge=0, le=2**32 - 1)] | None,
        meaning("1 is the highest, 2 the default's, 3 and more come last; 0 is the default"),
    ] = None
    timeout: Annotated[
        Annotated[int, Meta(ge=0, le=2**63 - 1)] | None,
        meaning("Microseconds after which the request is given up; 0 is `request_timeout_s`"),
    ] = None
    binary_data_output: Annotated[bool | None, meaning("All outputs as binary data, unless an output says else")] = None
    content_type: Annotated[str | None, ignored("the datatypes say it all")] = None
    sequence_id: Annotated[None, refused(_SEQUENCES)] = None
    sequence_start: Annotated[None, refused(_SEQUENCES)] = None
    sequence_end: Annotated[None, refused(_SEQUENCES)] = None


class InferRequest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """An inference request."""

    inputs: list[InputTensor]
    id: Annotated[Annotated[str, Meta(max_length=1024)] | None, meaning("Comes back with the answer")] = None
    outputs: Annotated[list[RequestedOutput] | None, meaning("The outputs that are wanted; all unless given")] = None
    parameters: RequestParameters | None = None


class OutputSize(msgspec.Struct, frozen=True):
    """Says that an output follows the JSON, and its bytes."""

    binary_data_size: int


class OutputTensor(msgspec.Struct, frozen=True, omit_defaults=True):
    """One output: its elements are in `data`, flat and row-major, or follow the JSON as binary data."""

    name: str
    datatype: str
    shape: list[int]
    parameters: OutputSize | UnsetType = UNSET
    data: Raw | UnsetType = UNSET


class InferResponse(msgspec.Struct, frozen=True, omit_defaults=True):
    """The answer to an inference request."""

    model_name: str
    model_version: str
    outputs: list[OutputTensor]
    id: str | UnsetType = UNSET


class ServerMetadata(msgspec.Struct, frozen=True):
    """What serves here, and the protocol's extensions that it has."""

    name: str
    version: str
    extensions: list[str]


class ServerLive(msgspec.Struct, frozen=True):
    """The process runs."""

    live: Literal[True] = True


class ServerReady(msgspec.Struct, frozen=True):
    """Requests can be answered."""

    ready: Literal[True] = True


class ModelReady(msgspec.Struct, frozen=True):
    """The model is loaded and can answer at once."""

    name: str
    ready: Literal[True] = True


class TensorMetadata(msgspec.Struct, frozen=True):
    """One input or output of a model; -1 is a dimension that the caller chooses."""

    name: str
    datatype: str
    shape: list[int]


class ModelMetadata(msgspec.Struct, frozen=True):
    """What a model takes and gives, and in `parameters` what it runs with; they are empty while it is not loaded."""

    name: str
    versions: list[str]
    platform: str
    inputs: list[TensorMetadata]
    outputs: list[TensorMetadata]
    parameters: dict[str, str]


class StatisticDuration(msgspec.Struct, frozen=True):
    """How often something happened, and the nanoseconds it took altogether."""

    count: int
    ns: int


class InferenceStatistics(msgspec.Struct, frozen=True):
    """The times of requests. There is no cache of answers, so its figures stay at 0."""

    success: StatisticDuration
    fail: StatisticDuration
    queue: StatisticDuration
    compute_input: StatisticDuration
    compute_infer: StatisticDuration
    compute_output: StatisticDuration
    cancel: StatisticDuration
    cache_hit: StatisticDuration
    cache_miss: StatisticDuration


class BatchSizeStatistics(msgspec.Struct, frozen=True):
    """The times of batches of one size."""

    batch_size: int
    compute_input: StatisticDuration
    compute_infer: StatisticDuration
    compute_output: StatisticDuration


class ModelStatistics(msgspec.Struct, frozen=True):
    """What a loaded version has done since it was loaded; `last_inference` is in milliseconds since 1970."""

    name: str
    version: str
    last_inference: int
    inference_count: int
    execution_count: int
    inference_stats: InferenceStatistics
    batch_stats: list[BatchSizeStatistics]


class StatisticsResponse(msgspec.Struct, frozen=True):
    """The statistics of every loaded version."""

    model_stats: list[ModelStatistics]


class RepositoryIndexRequest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Which models the index shall list."""

    ready: Annotated[bool | None, meaning("Only those that are ready")] = None


class RepositoryModel(msgspec.Struct, frozen=True, omit_defaults=True):
    """One version in the repository."""

    name: str
    version: str
    state: Literal["READY", "LOADING", "UNLOADING", "UNAVAILABLE"]
    reason: str = ""


class NoParameters(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Parameters of which there are none."""


class LoadRequest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A request to load a model as it is registered: neither its files nor its configuration come with the request."""

    parameters: NoParameters | None = None


class UnloadParameters(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How to unload."""

    unload_dependents: Annotated[bool | None, ignored("no model depends on another")] = None


class UnloadRequest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A request to unload a model."""

    parameters: UnloadParameters | None = None


class RepositoryChanged(msgspec.Struct, frozen=True):
    """The model was loaded or unloaded."""
