"""From the tensors of an answer to its bytes: JSON, and behind it the binary data. Pure; may run in a thread."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import msgspec
from msgspec import UNSET, Raw, UnsetType

from appliance.api.oip.binary_tensors import array_to_bytes
from appliance.api.oip.classification import classified
from appliance.api.oip.json_tensors import array_to_json
from appliance.api.oip.request import WantedOutput
from appliance.api.oip.wire import InferResponse, OutputSize, OutputTensor
from appliance.core.tensors import Datatype, Tensor, TensorResult


@dataclass(frozen=True, slots=True, eq=False)
class InferAnswer:
    """The body of an answer; binary data is the memory of the tensors where that is possible."""

    json: bytes
    binary: tuple[memoryview, ...]

    @property
    def length(self) -> int:
        """Bytes of the whole body."""
        return len(self.json) + sum(map(len, self.binary))


def infer_answer(
    result: TensorResult, wanted: Sequence[WantedOutput], request_id: str | None, *, batched: bool
) -> InferAnswer:
    """Return the body of an answer.

    Args:
        result: The outputs, in the order of `wanted`.
        wanted: How each goes out.
        request_id: As the client gave it, or None.
        batched: The first dimension of each output is the batch.

    Raises:
        InvalidRequestError: An output is wanted as JSON, which has no way to say it.
    """
    outputs: list[OutputTensor] = []
    binary: list[memoryview] = []
    for index, (tensor, how) in enumerate(zip(result.outputs, wanted, strict=True)):
        shaped = classified(tensor, how.classes, batched=batched) if how.classes else tensor
        data: Raw | UnsetType = UNSET
        parameters: OutputSize | UnsetType = UNSET
        if how.binary:
            binary.append(array_to_bytes(shaped.array, shaped.datatype))
            parameters = OutputSize(len(binary[-1]))
        else:
            data = Raw(array_to_json(shaped.array, shaped.datatype, f"outputs[{index}] ({shaped.name[:100]!r})"))
        outputs.append(OutputTensor(shaped.name, shaped.datatype, list(shaped.array.shape), parameters, data))
    document = InferResponse(result.model, result.version, outputs, UNSET if request_id is None else request_id)
    return InferAnswer(msgspec.json.encode(document), tuple(binary))


def slow_elements(outputs: Sequence[Tensor], wanted: Sequence[WantedOutput]) -> int:
    """Return how many elements must be converted one by one."""
    return sum(
        tensor.array.size
        for tensor, how in zip(outputs, wanted, strict=True)
        if how.classes or not how.binary or tensor.datatype is Datatype.BYTES
    )
