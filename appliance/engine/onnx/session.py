"""One onnxruntime session: opened for a small device, described, warmed up and run. No exception of its crosses this.

Measured with MiniLM (int8, CPU): giving the arena's free memory back keeps a third less memory after batches of many
lengths, but after every run it costs 5 to 15 %, so it is done when nothing waits, and now and then while runs follow
each other. Spinning off costs nothing with one model and leaves the cores to others.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from appliance.core.errors import EngineError, InvalidRequestError, ModelFileError
from appliance.core.printable import printable
from appliance.core.tensors import Datatype, ModelSignature
from appliance.engine.onnx.config import SessionConfig
from appliance.engine.onnx.providers import CPU, CUDA, TENSORRT, choose, options
from appliance.engine.onnx.signature import DTYPES, Argument, Dimension, Inputs
from appliance.engine.onnx.work import Arrays

LOGGER = logging.getLogger("appliance.engine")

MOST_REASON_CHARACTERS = 300
"""How much of onnxruntime's own words an error passes on."""
WARM_UP_SIZES = (8, 64, 1)
"""What free dimensions are set to in turn, until the model takes it; the batch is 1."""
MOST_WARM_UP_ELEMENTS = 2**24
MOST_METADATA_CHARACTERS = 2**20
"""Of what a model's publisher wrote into its file; the 18,708 characters of a text recogniser are 37,415."""
RUNS_UNTIL_SHRUNK = 256
"""So often memory is given back while one run follows the other."""
FATAL = 4
"""The log severity at which onnxruntime says nothing: what matters comes as an exception, too."""


class OnnxSession:
    """A model that is ready to run, for one thread at a time.

    Attributes:
        inputs: What it takes, and the check of it.
        providers: What onnxruntime really runs it on, first choice first.
        on_cpu: Whether that is the CPU alone.
        metadata: What the file's publisher wrote into it, such as the characters that a text recogniser knows.
    """

    def __init__(self, path: Path, config: SessionConfig) -> None:
        """Open the file.

        Raises:
            ModelFileError: onnxruntime refuses the file, or it is no model of tensors.
            SettingsError: The execution providers that are wished cannot be had.
            EngineError: onnxruntime is not installed, or there is not enough memory.
        """
        self._ort = ort = _onnxruntime()
        wished = choose(config.providers, ort.get_available_providers())
        if config.engine_cache_dir is not None and TENSORRT in wished:
            config.engine_cache_dir.mkdir(parents=True, exist_ok=True)
        self._session: Any = _open(ort, path, config, wished)
        self.providers: tuple[str, ...] = tuple(self._session.get_providers())
        self.on_cpu = self.providers == (CPU,)
        if missing := [each for each in wished if each not in self.providers]:
            if not _is_automatic(config):
                raise EngineError(
                    f"onnxruntime could not start {', '.join(missing)}, which the settings ask for.",
                    advice="See that its driver and libraries are installed, or set `execution_providers` to auto.",
                    code="provider_failed",
                )
            LOGGER.warning("onnxruntime could not start %s; models run on the rest", ", ".join(missing))
        self.metadata = _metadata(self._session)
        self.inputs = Inputs(_arguments(self._session.get_inputs()), _arguments(self._session.get_outputs()))
        specs = (*self.signature.inputs, *self.signature.outputs)
        self._output_names = [each.name for each in self.signature.outputs]
        self._texts = [each.name for each in self.signature.inputs if each.datatype is Datatype.BYTES]
        self._has_text = any(each.datatype is Datatype.BYTES for each in self.signature.outputs)
        self._has_bfloat16 = any(each.datatype is Datatype.BF16 for each in specs)
        self._plainly, self._shrinking = ort.RunOptions(), ort.RunOptions()
        self._plainly.log_severity_level = self._shrinking.log_severity_level = FATAL
        arenas = "cpu:0;gpu:0" if CUDA in self.providers else "cpu:0"
        self._shrinking.add_run_config_entry("memory.enable_memory_arena_shrinkage", arenas)
        self._run_options = self._shrinking
        self._zeros: dict[str, NDArray[Any]] | None = None
        self._runs = 0

    @property
    def signature(self) -> ModelSignature:
        """Return what the model takes and gives."""
        return self.inputs.signature

    def close(self) -> None:
        """Free the model. Idempotent."""
        self._session = None

    def run(self, inputs: Arrays) -> dict[str, NDArray[Any]]:
        """Evaluate arrays that fit the signature, and return every output.

        Raises:
            InvalidRequestError: A string is no UTF-8.
            EngineError: The model failed on these.
        """
        self._runs += 1
        often = self._zeros is not None and self._runs % RUNS_UNTIL_SHRUNK
        self._run_options = self._plainly if often else self._shrinking
        given: Mapping[str, NDArray[Any]] = inputs
        if self._texts:
            given = {name: _decoded(name, array) if name in self._texts else array for name, array in inputs.items()}
        try:
            outputs = self._run_bfloat16(given) if self._has_bfloat16 else self._run(given)
        except Exception as error:
            raise EngineError(
                f"The model failed at run time: {reason(error)}",
                advice="Check the tensors' values.",
                code="model_failed",
            ) from error
        if self._has_text:
            outputs = [_encoded(each) if each.dtype == np.object_ else each for each in outputs]
        return dict(zip(self._output_names, outputs, strict=True))

    def warm_up(self) -> None:
        """Run on made-up zeros, so that the first request does not pay for what is done once.

        A model that wants more than its signature says may refuse them; that is logged and no error.
        """
        failure = "its inputs are too large to make up"
        for size in WARM_UP_SIZES:
            zeros = self._zeros_of(size)
            if zeros is None:
                continue
            try:
                self.run(zeros)
            except EngineError as error:
                failure = error.message
            else:
                self._zeros = zeros
                return
        LOGGER.warning("the model was not warmed up: %s", failure)

    @property
    def can_shrink(self) -> bool:
        """Return True if memory may have been kept since it was given back for the last time."""
        return self._zeros is not None and self._runs % RUNS_UNTIL_SHRUNK != 0

    def shrink(self) -> None:
        """Give the arena's free memory back, which takes a small run.

        Raises:
            EngineError: The model failed.
        """
        self._runs = -1
        if self._zeros is not None:
            self.run(self._zeros)

    def _zeros_of(self, size: int) -> dict[str, NDArray[Any]] | None:
        arrays: dict[str, NDArray[Any]] = {}
        batch = {each.shape[0] for each in self.inputs.arguments.values()} if self.signature.batched else set()
        for spec in self.signature.inputs:
            shape = tuple(_made_up(each, size, batch) for each in self.inputs.arguments[spec.name].shape)
            if self.signature.batched:
                shape = (1, *shape[1:])
            if int(np.prod(shape, dtype=np.float64)) > MOST_WARM_UP_ELEMENTS:
                return None
            text = spec.datatype is Datatype.BYTES
            arrays[spec.name] = np.full(shape, b"", np.object_) if text else np.zeros(shape, DTYPES[spec.datatype])
        return arrays

    def _run(self, inputs: Mapping[str, NDArray[Any]]) -> list[NDArray[Any]]:
        fitting = {name: _aligned(array) for name, array in inputs.items()}
        return cast("list[NDArray[Any]]", self._session.run(self._output_names, fitting, self._run_options))

    def _run_bfloat16(self, inputs: Mapping[str, NDArray[Any]]) -> list[NDArray[Any]]:
        """Run with arrays of a type that NumPy and so onnxruntime's own conversion do not know."""
        values = {name: self._value(array) for name, array in inputs.items()}
        outputs = self._session.run_with_ort_values(self._output_names, values, self._run_options)
        return [_array(each) for each in outputs]

    def _value(self, array: NDArray[Any]) -> Any:
        if array.dtype != DTYPES[Datatype.BF16]:
            return self._ort.OrtValue.ortvalue_from_numpy(_aligned(array))
        bits = np.ascontiguousarray(array).view(np.uint16)
        return self._ort.OrtValue.ortvalue_from_numpy_with_onnx_type(bits, _BFLOAT16)


_BFLOAT16 = 16
"""`TensorProto.BFLOAT16`."""


class _Memory:
    """The memory of a bfloat16 value as NumPy's array interface wants it described."""

    def __init__(self, value: Any) -> None:
        self._value = value
        self.__array_interface__ = {
            "data": (value.data_ptr(), True),
            "shape": tuple(value.shape()),
            "typestr": "<u2",
            "version": 3,
        }


def _array(value: Any) -> NDArray[Any]:
    if value.element_type() != _BFLOAT16:
        return cast("NDArray[Any]", value.numpy())
    if 0 in value.shape():
        return np.empty(tuple(value.shape()), ml_dtypes.bfloat16)
    return np.array(_Memory(value), copy=True).view(ml_dtypes.bfloat16)


_FOLDERS = re.compile(r"(?<![\w.])/(?:[^\s/\"']+/)*")
"""The folders of an absolute path."""


def reason(error: Exception) -> str:
    """Return what onnxruntime's exception says, on one bounded line, without its prefixes and this machine's paths."""
    text = " ".join(str(error).split())
    text = text.rpartition("Status Message: ")[2]
    if text.startswith("[ONNXRuntimeError]"):
        text = text.split(" : ", 3)[-1]
    if text.startswith("Load model from ") and " failed:" in text:
        text = text.partition(" failed:")[2]
    text = printable(_FOLDERS.sub("", text)) or type(error).__name__
    return text if len(text) <= MOST_REASON_CHARACTERS else f"{text[:MOST_REASON_CHARACTERS]}…"


def _onnxruntime() -> Any:
    try:
        import onnxruntime  # noqa: PLC0415 - it takes 70 ms, which only a process with an ONNX model needs to spend
    except ImportError as error:
        raise EngineError(
            f"onnxruntime cannot be loaded: {reason(error)}", advice="Install the build for this device."
        ) from error
    return onnxruntime


def _open(ort: Any, path: Path, config: SessionConfig, providers: Sequence[str]) -> Any:
    chosen = ort.SessionOptions()
    chosen.log_severity_level = FATAL
    chosen.intra_op_num_threads = config.threads
    chosen.inter_op_num_threads = 1
    chosen.execution_mode = ort.ExecutionMode.ORT_SEQUENTIAL
    chosen.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
    chosen.enable_mem_pattern = False  # it remembers every shape that ever came, and shapes come from clients
    chosen.add_session_config_entry("session.intra_op.allow_spinning", "0")
    chosen.add_session_config_entry("session.inter_op.allow_spinning", "0")
    while True:
        try:
            return ort.InferenceSession(
                str(path),
                chosen,
                providers=list(providers),
                provider_options=[options(each, config) for each in providers],
                enable_fallback=0,  # it would print to the standard output, and change providers while it runs
            )
        except MemoryError as error:
            raise EngineError("There is not enough memory to load the model.", code="not_enough_memory") from error
        except Exception as error:
            if len(providers) == 1 or not _is_automatic(config):
                raise ModelFileError(f"onnxruntime refuses the model: {reason(error)}") from error
            LOGGER.warning("the model is tried without %s: %s", providers[0], reason(error))
            providers = providers[1:]


def _is_automatic(config: SessionConfig) -> bool:
    return config.providers.strip().lower() == "auto"


def _metadata(session: Any) -> dict[str, str]:
    try:
        entries: dict[str, str] = session.get_modelmeta().custom_metadata_map
    except UnicodeDecodeError:
        LOGGER.warning("the model's metadata is no UTF-8 text, and is left out")
        return {}
    if sum(len(key) + len(value) for key, value in entries.items()) > MOST_METADATA_CHARACTERS:
        LOGGER.warning("the model's metadata has more than %s characters, and is left out", MOST_METADATA_CHARACTERS)
        return {}
    return entries


def _arguments(found: Sequence[Any]) -> list[Argument]:
    return [Argument(each.name, each.type, tuple(_dimension(size) for size in each.shape)) for each in found]


def _dimension(size: Any) -> Dimension:
    """Return a dimension as a file may write it: a free one has a name, nothing, or a number that is no size.

    Paddle's exporter writes `?` for each that it does not know, so that is not one name.
    """
    if isinstance(size, str):
        return size if size not in ("", "?") else None
    return size if isinstance(size, int) and size >= 0 else None


def _made_up(dimension: Dimension, size: int, batch: set[Dimension]) -> int:
    if isinstance(dimension, int):
        return dimension
    return 1 if dimension is not None and dimension in batch else size


def _aligned(array: NDArray[Any]) -> NDArray[Any]:
    """Return the array as native code may read it; a view into a request's body may begin anywhere."""
    return array if array.flags.c_contiguous and array.flags.aligned else np.array(array, order="C")


def _decoded(name: str, array: NDArray[Any]) -> NDArray[Any]:
    """Return bytes as the `str` that onnxruntime wants."""
    try:
        return np.array([each.decode() for each in array.flat], np.object_).reshape(array.shape)
    except UnicodeDecodeError as error:
        shown = printable(name)[:80]
        raise InvalidRequestError(f"The input `{shown}` has a string that is no UTF-8.", param=name) from error


def _encoded(array: NDArray[Any]) -> NDArray[Any]:
    """Return strings as bytes."""
    return np.array([each.encode() for each in array.flat], np.object_).reshape(array.shape)
