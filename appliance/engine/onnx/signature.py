"""What a session says of its inputs and outputs, in the protocol's terms; and whether tensors fit them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from appliance.core.errors import InvalidRequestError, ModelFileError
from appliance.core.printable import printable
from appliance.core.tensors import Datatype, ModelSignature, TensorSpec

MOST_NAMES = 16
"""Names listed in an error."""

ELEMENTS = {
    "tensor(bool)": Datatype.BOOL,
    "tensor(uint8)": Datatype.UINT8,
    "tensor(uint16)": Datatype.UINT16,
    "tensor(uint32)": Datatype.UINT32,
    "tensor(uint64)": Datatype.UINT64,
    "tensor(int8)": Datatype.INT8,
    "tensor(int16)": Datatype.INT16,
    "tensor(int32)": Datatype.INT32,
    "tensor(int64)": Datatype.INT64,
    "tensor(float16)": Datatype.FP16,
    "tensor(bfloat16)": Datatype.BF16,
    "tensor(float)": Datatype.FP32,
    "tensor(double)": Datatype.FP64,
    "tensor(string)": Datatype.BYTES,
}
"""Datatypes by onnxruntime's names of types."""

DTYPES: dict[Datatype, np.dtype[Any]] = {
    Datatype.BOOL: np.dtype(np.bool_),
    Datatype.UINT8: np.dtype(np.uint8),
    Datatype.UINT16: np.dtype(np.uint16),
    Datatype.UINT32: np.dtype(np.uint32),
    Datatype.UINT64: np.dtype(np.uint64),
    Datatype.INT8: np.dtype(np.int8),
    Datatype.INT16: np.dtype(np.int16),
    Datatype.INT32: np.dtype(np.int32),
    Datatype.INT64: np.dtype(np.int64),
    Datatype.FP16: np.dtype(np.float16),
    Datatype.BF16: np.dtype(ml_dtypes.bfloat16),
    Datatype.FP32: np.dtype(np.float32),
    Datatype.FP64: np.dtype(np.float64),
    Datatype.BYTES: np.dtype(np.object_),
}
"""What the arrays of a `core.tensors.Tensor` are made of."""

_NAMES = {dtype: datatype for datatype, dtype in DTYPES.items()}

Dimension = int | str | None
"""A size, the name of a size that is free but the same wherever it stands, or None: free."""


@dataclass(frozen=True, slots=True)
class Argument:
    """An input or output as onnxruntime describes it."""

    name: str
    type: str
    shape: tuple[Dimension, ...]


class Inputs:
    """The inputs and outputs of one model.

    Attributes:
        signature: The same in the protocol's terms.
    """

    def __init__(self, inputs: Sequence[Argument], outputs: Sequence[Argument]) -> None:
        """Read what onnxruntime says. Outputs that are no tensors are left out.

        Raises:
            ModelFileError: An input is no tensor, or no output is one.
        """
        self.arguments = {each.name: each for each in inputs}
        kept = [each for each in outputs if each.type in ELEMENTS]
        self.signature = ModelSignature(
            inputs=tuple(_spec(each) for each in inputs),
            outputs=tuple(_spec(each) for each in kept),
            batched=_is_batched(inputs, outputs),
        )
        if not kept:
            raise ModelFileError(
                "The model has no output that is a tensor.",
                advice="Export it so that it answers with tensors; of scikit-learn's models, with `zipmap=False`.",
            )
        self._specs = {each.name: each for each in self.signature.inputs}
        self._output_names = frozenset(each.name for each in self.signature.outputs)

    def check(self, inputs: Mapping[str, NDArray[Any]], outputs: Sequence[str]) -> None:
        """See that the tensors are those that the model takes, and the outputs wanted those that it has.

        Raises:
            InvalidRequestError: They are not.
        """
        if inputs.keys() != self._specs.keys():
            self._refuse_names(inputs)
        sizes: dict[str, tuple[int, str]] = {}
        for name, spec in self._specs.items():
            array = inputs[name]
            if array.dtype != DTYPES[spec.datatype]:
                given = _NAMES.get(array.dtype, array.dtype)
                raise _bad(name, f"is {given}; the model takes {spec.datatype}")
            self._check_shape(name, array.shape, sizes)
        if not self._output_names.issuperset(outputs):
            unknown = next(each for each in outputs if each not in self._output_names)
            raise InvalidRequestError(
                f"The model has no output {_shown(unknown)}; it has {_listed(self._output_names)}.", param=unknown
            )

    def _refuse_names(self, inputs: Mapping[str, NDArray[Any]]) -> None:
        takes = f"the model takes {_listed(self._specs)}"
        for name in inputs:
            if name not in self._specs:
                raise InvalidRequestError(f"The model has no input {_shown(name)}; {takes}.", param=name)
        missing = next(name for name in self._specs if name not in inputs)
        raise InvalidRequestError(f"The input {_shown(missing)} is missing; {takes}.", param=missing)

    def _check_shape(self, name: str, given: tuple[int, ...], sizes: dict[str, tuple[int, str]]) -> None:
        wanted = self.arguments[name].shape
        if len(given) != len(wanted):
            raise _bad(name, f"has {len(given)} dimensions; the model takes {len(wanted)}: {_text(wanted)}")
        for size, dimension in zip(given, wanted, strict=True):
            if isinstance(dimension, int):
                if size != dimension:
                    raise _bad(name, f"has the shape {_text(given)}; the model takes {_text(wanted)}")
            elif dimension is not None:
                known, first = sizes.setdefault(dimension, (size, name))
                if size != known:
                    shown = printable(dimension)[:40]
                    raise _bad(name, f"has {size} where {_shown(first)} has {known}: both are the model's `{shown}`")


def _is_batched(inputs: Sequence[Argument], outputs: Sequence[Argument]) -> bool:
    """Return True if the first dimension of everything is one and the same free dimension.

    Exporters lose the names of outputs, so an output without one passes; the outputs of each batch are checked anyway.
    """
    every = [*inputs, *outputs]
    if not inputs or not all(each.type in ELEMENTS and each.shape for each in every):
        return False
    of_inputs = {each.shape[0] for each in inputs}
    of_outputs = {each.shape[0] for each in outputs}
    return (
        len(of_inputs) == 1
        and not any(isinstance(each, int) for each in of_inputs | of_outputs)
        and of_outputs <= of_inputs | {None}
        and not any(_returns(each, of_inputs) for each in every)
    )


def _returns(argument: Argument, first: set[Dimension]) -> bool:
    """Return True if the batch dimension stands in another place too: its size then means more than rows."""
    return first != {None} and bool(first & set(argument.shape[1:]))


def _spec(argument: Argument) -> TensorSpec:
    if argument.type not in ELEMENTS:
        raise ModelFileError(
            f"The model's {_shown(argument.name)} is a {printable(argument.type)[:60]}, which is no tensor that the "
            "protocol knows.",
            advice="Export it so that it takes and gives tensors.",
        )
    shape = tuple(each if isinstance(each, int) else -1 for each in argument.shape)
    return TensorSpec(argument.name, ELEMENTS[argument.type], shape)


def _bad(name: str, what: str) -> InvalidRequestError:
    return InvalidRequestError(f"The input {_shown(name)} {what}.", param=name)


def _shown(name: str) -> str:
    return f"`{printable(name)[:80]}`"


def _listed(names: Mapping[str, Any] | frozenset[str]) -> str:
    known = list(names)
    return ", ".join(map(_shown, known[:MOST_NAMES])) + (" …" if len(known) > MOST_NAMES else "")


def _text(shape: Sequence[Dimension]) -> str:
    return "[" + ", ".join("-1" if each is None else printable(str(each))[:40] for each in shape) + "]"
