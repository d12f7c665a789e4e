"""From the bytes of an inference request to its tensors. Pure; may run in a thread.

A body is JSON, or JSON followed by the binary data of the inputs that have a `binary_data_size`, in their order.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import msgspec
from msgspec import Raw

from appliance.api.oip.binary_tensors import array_from_bytes
from appliance.api.oip.datatypes import BINARY_ONLY, invalid
from appliance.api.oip.json_tensors import array_from_json, no_json
from appliance.api.oip.long_lists import LEAST_BYTES, cut_lists
from appliance.api.oip.wire import InferRequest, InputTensor, OutputParameters
from appliance.core.tensors import Datatype, Tensor, TensorModelCard, TensorSpec
from appliance.core.types import Priority
from appliance.web.wire import decode_as

_DECODER = msgspec.json.Decoder(InferRequest)
_NO_PARAMETERS = OutputParameters()
_HEADER = "Inference-Header-Content-Length"


@dataclass(frozen=True, slots=True, eq=False)
class InferBody:
    """A request whose JSON was read, and whose tensors were not.

    Attributes:
        binary: The binary data of each input, None where there is none.
        lists: Long lists that were taken out of the JSON, by what stands there instead.
    """

    document: InferRequest
    binary: tuple[memoryview | None, ...]
    lists: Mapping[bytes, bytes]

    @property
    def slow_bytes(self) -> int:
        """How much binary data must be looked at, since it cannot be used as it is."""
        pairs = zip(self.document.inputs, self.binary, strict=True)
        slow = (Datatype.BOOL, Datatype.BYTES)
        return sum(len(data) for each, data in pairs if data is not None and each.datatype in slow)


@dataclass(frozen=True, slots=True)
class WantedOutput:
    """How an output goes out: as binary data or JSON; `classes` of its highest values instead of all, unless 0."""

    name: str
    binary: bool = False
    classes: int = 0


def header_length(value: str | None, body_length: int) -> int:
    """Return the length of the JSON at the beginning of a body.

    Args:
        value: Of the header `Inference-Header-Content-Length`, or None without one: the body is all JSON.
        body_length: Bytes of the body.

    Raises:
        InvalidRequestError: It is no number, or more than the body has.
    """
    if value is None:
        return body_length
    if not (value.isascii() and value.isdecimal() and len(value) <= 19):
        raise invalid(f"{_HEADER} is {value[:50]!r}; it must be the number of bytes that the JSON has.")
    length = int(value)
    if length == 0:
        raise invalid(f"{_HEADER} is 0; a body without JSON is not supported.", "Name the inputs in JSON.")
    if length > body_length:
        raise invalid(f"{_HEADER} is {length}, and the body has only {body_length} bytes.")
    return length


def read_body(body: memoryview, json_length: int) -> InferBody:
    """Read the JSON, and tell which part of the rest is whose.

    Args:
        body: All of it.
        json_length: Bytes of the JSON, at most those of the body.

    Raises:
        InvalidRequestError: The JSON will not do, a name stands twice, or the binary data is less or more than said.
    """
    document, lists = _decoded(body[:json_length])
    _check_names("inputs", [each.name for each in document.inputs])
    _check_names("outputs", [each.name for each in document.outputs or ()])
    return InferBody(document, tuple(_split(document.inputs, body[json_length:])), lists)


def input_tensors(body: InferBody) -> list[Tensor]:
    """Return the inputs; binary ones are views of the body where that is possible.

    Raises:
        InvalidRequestError: The elements of one are of the wrong kind or number.
    """
    pairs = zip(body.document.inputs, body.binary, strict=True)
    return [_tensor(index, each, data, body.lists) for index, (each, data) in enumerate(pairs)]


def wanted_outputs(document: InferRequest, card: TensorModelCard) -> list[WantedOutput]:
    """Return how each output goes out.

    Raises:
        InvalidRequestError: The model has no such output, or JSON cannot say it, or it has no classes.
    """
    specs = {each.name: each for each in card.signature.outputs}
    binary = bool(document.parameters and document.parameters.binary_data_output)
    if not document.outputs:
        wanted = [(each.name, _NO_PARAMETERS) for each in card.signature.outputs]
    else:
        wanted = [(each.name, each.parameters or _NO_PARAMETERS) for each in document.outputs]
    found: list[WantedOutput] = []
    for index, (name, how) in enumerate(wanted):
        place = _place("outputs", index, name)
        if name not in specs:
            raise invalid(f"{place}: the model has no such output; it has {', '.join(specs)}.")
        found.append(_wanted(specs[name], how, place, binary=binary))
    return found


def priority_of(document: InferRequest) -> Priority:
    """Return the order of admission: the protocol's 1 is its highest priority, and 0 the model's default."""
    given = (document.parameters and document.parameters.priority) or 2
    return Priority(min(given, 3) - 1)


def deadline_of(document: InferRequest, longest_s: float) -> float:
    """Return the seconds after which the request is given up, `longest_s` at most."""
    given = (document.parameters and document.parameters.timeout) or 0
    return min(given / 1e6, longest_s) if given else longest_s


def _decoded(text: memoryview) -> tuple[InferRequest, Mapping[bytes, bytes]]:
    """Decode the JSON without its long lists, or with them where it will not do, so that the error's place is true."""
    if len(text) >= LEAST_BYTES:
        short, lists = cut_lists(bytes(text))
        if lists:
            try:
                return _DECODER.decode(short), lists
            except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
                pass  # the same again, for the message
    return decode_as(text, _DECODER, InferRequest), {}


def _place(kind: str, index: int, name: str) -> str:
    return f"{kind}[{index}] ({name[:100]!r})"


def _check_names(kind: str, names: list[str]) -> None:
    seen: set[str] = set()
    for index, name in enumerate(names):
        if name in seen:
            raise invalid(f"{_place(kind, index, name)}: the name stands there twice.")
        seen.add(name)


def _split(inputs: list[InputTensor], rest: memoryview) -> Iterator[memoryview | None]:
    sizes = [each.parameters.binary_data_size if each.parameters else None for each in inputs]
    announced = sum(size or 0 for size in sizes)
    if announced != len(rest):
        raise invalid(
            f"The inputs announce {announced} bytes of binary data, and {len(rest)} follow the JSON.",
            f"{_HEADER} must be the bytes of the JSON, and each binary_data_size those of its tensor.",
        )
    at = 0
    for size in sizes:
        yield None if size is None else rest[at : at + size]
        at += size or 0


def _tensor(index: int, given: InputTensor, data: memoryview | None, lists: Mapping[bytes, bytes]) -> Tensor:
    place = _place("inputs", index, given.name)
    if isinstance(given.data, Raw):
        if data is not None:
            raise invalid(f"{place}: it has both data and binary_data_size.", "Send it one way.")
        text = bytes(given.data)
        array = array_from_json(lists.get(text, text), given.datatype, given.shape, place)
    elif data is None:
        raise invalid(f"{place}: it has neither data nor the parameter binary_data_size.")
    else:
        array = array_from_bytes(data, given.datatype, given.shape, place)
    return Tensor(given.name, given.datatype, array)


def _wanted(spec: TensorSpec, how: OutputParameters, place: str, *, binary: bool) -> WantedOutput:
    wanted = WantedOutput(spec.name, binary if how.binary_data is None else how.binary_data, how.classification or 0)
    if wanted.classes and spec.datatype is Datatype.BYTES:
        raise invalid(f"{place}: classification needs numbers, and it is {spec.datatype}.")
    if spec.datatype in BINARY_ONLY and not wanted.binary and not wanted.classes:
        raise no_json(place, f"{spec.datatype} has no JSON")
    return wanted
