"""Quantisation of ONNX models to int8 by onnxruntime's own tools, which want the onnx package.

*Dynamic* quantisation stores weights as int8 and finds the range of activations anew in each run: for encoders and
recurrent models, without any data. *Static* quantisation fixes the ranges beforehand, by what they are on calibration
data: for convolutions, which it makes several times as fast, where dynamic quantisation makes them slower.
"""

from __future__ import annotations

import errno
import io
import logging
import platform
import tempfile
from collections.abc import Collection, Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import onnx
import onnxruntime
from onnx import GraphProto, NodeProto, version_converter
from onnxruntime.quantization import CalibrationMethod, QuantType, quantize_dynamic, quantize_static
from onnxruntime.quantization.shape_inference import quant_pre_process

from appliance.core.errors import EngineError, InvalidRequestError, ModelFileError, StorageError
from appliance.engine.onnx.samples import Samples

LARGEST_GRAPH = 1_500_000_000
"""Bytes of a model from which on weights lie in a file of their own; protobuf itself ends at 2 GiB."""

DISK_FACTOR = 6
"""Copies of a model that lie in the work folder at once at most: as it came, prepared, with shapes, calibrating."""

QUANTISED_OPERATORS = frozenset(
    {
        "QuantizeLinear",
        "DequantizeLinear",
        "DynamicQuantizeLinear",
        "MatMulInteger",
        "ConvInteger",
        "MatMulIntegerToFloat",
        "DynamicQuantizeMatMul",
        "DynamicQuantizeLSTM",
        "QLinearConv",
        "QLinearMatMul",
        "QGemm",
        "QAttention",
        "QEmbedLayerNormalization",
        "MatMulNBits",
        "MatMulBnb4",
    }
)

DYNAMIC_OPERATORS = ("MatMul", "Gemm", "Attention", "LSTM", "Gather", "EmbedLayerNormalization")
"""What dynamic quantisation makes smaller and no slower. Convolutions are not among them: ConvInteger takes 1.5 to 7
times as long as the FP32 convolution on x86."""

STATIC_OPERATORS = (
    *("Conv", "ConvTranspose", "Gemm", "MatMul"),
    *("Relu", "Clip", "LeakyRelu", "MaxPool", "AveragePool", "GlobalAveragePool", "Add", "Concat"),
    *("Reshape", "Transpose", "Squeeze", "Unsqueeze", "Flatten", "Resize", "Pad", "Slice", "Split", "Gather"),
)
"""Operators with weights, and those that let int8 pass between them. Softmax and normalisations stay as they are: their
outputs lose more than their time is worth."""

_PER_CHANNEL_OPSET = 13
_INT8_DOT_PRODUCTS = frozenset({"avx512_vnni", "avx_vnni"})


class Say(Protocol):
    """Told what is being done."""

    def __call__(self, activity: str, /) -> None:
        """Take note."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Quantisation:
    """How a model is to be quantised.

    Attributes:
        mode: See this module's docstring.
        calibration: How static ranges are made of what was seen: all of it, the least loss of information, or all but
            the outermost values, which is best where a few are far out.
        per_channel: Give each output channel of a weight a scale of its own.
        reduce_range: Use 7 bits of weights, for CPUs whose int8 products may overflow.
        symmetric: Ranges around 0 and signed activations, as TensorRT wants them; for static quantisation.
    """

    mode: Literal["dynamic", "static"] = "dynamic"
    calibration: Literal["minmax", "entropy", "percentile"] = "percentile"
    per_channel: bool = True
    reduce_range: bool = False
    symmetric: bool = False


def quantise(
    graph: Path, target: Path, wanted: Quantisation, samples: Samples, say: Say, *, largest: int = LARGEST_GRAPH
) -> tuple[Path, ...]:
    """Write the quantised model.

    Args:
        graph: The model, in a folder with its external data, where intermediate files may be written too.
        target: The quantised model; external data goes beside it under its name and `.data`.
        wanted: How.
        samples: Calibration data of static quantisation.
        say: Told of each step.
        largest: Bytes from which on the weights get a file of their own.

    Returns:
        The files that were written, the graph first.

    Raises:
        ModelFileError: It is quantised already, has nothing that can be quantised, or is beyond the library.
        InvalidRequestError: Static quantisation has no samples, or they do not fit.
        EngineError: There is not enough memory.
        StorageError: The disk is full.
    """
    if wanted.mode == "static" and not len(samples):
        raise InvalidRequestError(
            "Static quantisation needs calibration data, and there is none.",
            advice="Name a folder of .npz files or a file of sentences with --samples.",
            param="samples",
        )
    with _library_at_work(graph.parent):
        say("reading the model")
        is_large = sum(each.stat().st_size for each in graph.parent.iterdir() if each.is_file()) > largest
        _check_quantisable(graph, wanted)
        say("inferring shapes and simplifying")
        prepared = graph.with_name("prepared.onnx")
        _prepare(_normalised(graph, wanted, is_large=is_large), prepared, is_large=is_large)
        if wanted.mode == "dynamic":
            say("quantising weights")
            _quantise_dynamically(prepared, target, wanted, is_large=is_large)
        else:
            _quantise_statically(prepared, target, wanted, samples, say, is_large=is_large)
        _check_quantised(target)
    data = target.with_name(f"{target.name}.data")
    return (target, data) if data.exists() else (target,)


def lacks_int8_dot_products(machine: str, flags: Collection[str]) -> bool:
    """Tell whether the CPU adds products of int8 in int16, where they may overflow.

    Args:
        machine: As `platform.machine()`.
        flags: The CPU's features in the kernel's words.
    """
    return machine in ("x86_64", "AMD64", "i686") and not _INT8_DOT_PRODUCTS.intersection(flags)


def reduced_range_is_better() -> bool:
    """Tell whether weights should have 7 bits for the sake of this machine's CPU."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return False
    flags = next((line.partition(":")[2].split() for line in lines if line.startswith("flags")), [])
    return lacks_int8_dot_products(platform.machine(), flags)


def _check_quantisable(graph: Path, wanted: Quantisation) -> None:
    operators = {each.op_type for each in _nodes(onnx.load(graph, load_external_data=False).graph)}
    if present := sorted(operators & QUANTISED_OPERATORS):
        raise ModelFileError(
            f"The model is quantised already: it has the operators {', '.join(present)}.",
            advice="Quantise the original, of FP32 or FP16.",
        )
    if wanted.mode == "static" and not operators.intersection(("Conv", "ConvTranspose", "Gemm", "MatMul")):
        raise _nothing_to_quantise(operators)
    if wanted.mode == "dynamic" and not operators.intersection(DYNAMIC_OPERATORS):
        raise _nothing_to_quantise(operators)


def _nothing_to_quantise(operators: set[str]) -> ModelFileError:
    advice = "It stays as it is."
    if operators & {"Conv", "ConvTranspose"}:
        advice = "Its convolutions get smaller and faster by static quantisation: --static --samples FOLDER."
    return ModelFileError(
        f"The model has no weights that can be quantised so; its operators are {', '.join(sorted(operators)):.300}.",
        advice=advice,
    )


def _check_quantised(target: Path) -> None:
    operators = {each.op_type for each in _nodes(onnx.load(target, load_external_data=False).graph)}
    if not operators & QUANTISED_OPERATORS:
        target.unlink()
        raise _nothing_to_quantise(operators)


def _nodes(graph: GraphProto) -> Iterator[NodeProto]:
    """Yield the nodes of a graph, those of its branches and loops too."""
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            for inner in (attribute.g, *attribute.graphs):
                yield from _nodes(inner)


def _normalised(graph: Path, wanted: Quantisation, *, is_large: bool) -> Path:
    """Return the model in an opset that knows scales of channels, if need be, and in one file unless it is large."""
    model = onnx.load(graph)
    version = max((each.version for each in model.opset_import if each.domain in ("", "ai.onnx")), default=0)
    if wanted.mode == "static" and wanted.per_channel and version < _PER_CHANNEL_OPSET:
        model = version_converter.convert_version(model, _PER_CHANNEL_OPSET)
    elif is_large:
        return graph
    normalised = graph.with_name("normalised.onnx")
    onnx.save(model, normalised)
    return normalised


def _prepare(graph: Path, prepared: Path, *, is_large: bool) -> None:
    quant_pre_process(
        graph,
        prepared,
        skip_symbolic_shape=True,  # it wants sympy, and quantisation needs types more than shapes
        save_as_external_data=is_large,
        all_tensors_to_one_file=True,
        external_data_location="prepared.data" if is_large else None,
    )


def _quantise_dynamically(prepared: Path, target: Path, wanted: Quantisation, *, is_large: bool) -> None:
    quantize_dynamic(
        prepared,
        target,
        op_types_to_quantize=list(DYNAMIC_OPERATORS),
        per_channel=wanted.per_channel,
        reduce_range=wanted.reduce_range,
        weight_type=QuantType.QInt8,
        use_external_data_format=is_large,
        extra_options={"EnableSubgraph": True},
    )


def _quantise_statically(
    prepared: Path, target: Path, wanted: Quantisation, samples: Samples, say: Say, *, is_large: bool
) -> None:
    methods = {
        "minmax": CalibrationMethod.MinMax,
        "entropy": CalibrationMethod.Entropy,
        "percentile": CalibrationMethod.Percentile,
    }
    quantize_static(
        prepared,
        target,
        _Reader(samples, say),
        op_types_to_quantize=list(STATIC_OPERATORS),
        per_channel=wanted.per_channel,
        reduce_range=wanted.reduce_range,
        activation_type=QuantType.QInt8 if wanted.symmetric or _is_arm() else QuantType.QUInt8,
        weight_type=QuantType.QInt8,
        use_external_data_format=is_large,
        calibrate_method=methods[wanted.calibration],
        extra_options={
            "CalibStridedMinMax": 1,  # one sample's activations in memory at a time, with each of the methods
            "MatMulConstBOnly": True,
            "ActivationSymmetric": wanted.symmetric,
        },
    )


def _is_arm() -> bool:
    return platform.machine() in ("aarch64", "arm64")


class _Reader:
    """Hands samples to the calibration, which asks for them range by range."""

    def __init__(self, samples: Samples, say: Say) -> None:
        self._samples, self._say = samples, say
        self._next, self._end = 0, 0
        self._steps = {round(len(samples) * tenth / 10) for tenth in range(1, 11)}

    def __len__(self) -> int:
        return len(self._samples)

    def set_range(self, start_index: int, end_index: int) -> None:
        self._next, self._end = start_index, end_index

    def get_next(self) -> dict[str, Any] | None:
        if self._next >= self._end:
            return None
        self._next += 1
        if self._next in self._steps:
            self._say(f"calibrating, {self._next:,} of {len(self._samples):,} samples")
        return dict(self._samples[self._next - 1])


@contextmanager
def _library_at_work(folder: Path) -> Iterator[None]:
    """Keep the library's temporary files in `folder` and its chatter away, and turn its errors into ours."""
    temporary, disabled = tempfile.tempdir, logging.root.manager.disable
    tempfile.tempdir = str(folder)
    logging.disable(logging.CRITICAL)
    onnxruntime.set_default_logger_severity(4)
    try:
        with redirect_stdout(io.StringIO()):
            yield
    except (InvalidRequestError, EngineError, StorageError):
        raise
    except MemoryError as error:
        raise EngineError(
            "There is not enough memory to quantise the model; about four times its size is needed.",
            advice="Close other programs, or quantise it on a larger machine and import the result.",
            code="not_enough_memory",
        ) from error
    except Exception as error:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise StorageError("The disk is full: quantising the model failed.", code="disk_full") from error
        raise ModelFileError(
            f"onnxruntime cannot quantise this model: {_first_line(error)}",
            advice="Try the other mode, or --per-tensor; a model that was exported with a newer opset may do better.",
        ) from error
    finally:
        onnxruntime.set_default_logger_severity(2)
        logging.disable(disabled)
        tempfile.tempdir = temporary


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return (lines[0] if lines else type(error).__name__)[:300]
