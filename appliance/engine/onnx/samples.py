"""Inputs to calibrate and to measure a model with: arrays from files, sentences, or made-up ones.

Files come from outside: they are bounded, nothing in them is run, and each array is checked against the model.
"""

from __future__ import annotations

import zipfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import msgspec
import numpy as np
from numpy.typing import NDArray

from appliance.core.errors import InvalidRequestError, ModelFileError, NotFoundError
from appliance.core.tensors import Datatype, ModelSignature, TensorSpec
from appliance.engine.onnx.work import Arrays

MOST_SAMPLES = 512
"""Sets of inputs that are used; ranges hardly change after so many."""

MOST_SENTENCES = 4096

MOST_ARRAY_BYTES = 1 << 30
"""Of one .npz file, unpacked."""

MOST_TEXT_BYTES = 64 << 20

SENTENCES = (
    "Hello.",
    "How do I reset the router?",
    "The pump stopped at 3:14 this morning.",
    "Replace the filter every six months, or sooner where there is much dust.",
    "Error 0x80070005: access is denied.",
    "A heat pump moves heat from a cold place to a warm one, and needs less electricity than a heater for it.",
    "Die Lieferung kommt am Dienstag zwischen acht und zwölf Uhr.",
    "Le réservoir est vide ; remplissez-le avant de redémarrer l'appareil.",
    "会议改到下周三下午两点。",
    "for i in range(10): print(i ** 2)",
    "Invoice 2024-117 over 1,250.00 EUR is due within 30 days; a discount of 2 % is granted within 10 days.",
    "The committee discussed the proposal at length. Some members feared its cost, others doubted that it could be "
    "finished in time; in the end it was adopted with two abstentions, on the condition that progress is reported "
    "every quarter and that the budget is reviewed once a year by an independent auditor.",
)
"""Of different lengths and languages; they say nothing of what a model is used for."""

ARRAY_TYPES: Mapping[Datatype, type[Any]] = {
    Datatype.BOOL: np.bool_,
    Datatype.UINT8: np.uint8,
    Datatype.UINT16: np.uint16,
    Datatype.UINT32: np.uint32,
    Datatype.UINT64: np.uint64,
    Datatype.INT8: np.int8,
    Datatype.INT16: np.int16,
    Datatype.INT32: np.int32,
    Datatype.INT64: np.int64,
    Datatype.FP16: np.float16,
    Datatype.FP32: np.float32,
    Datatype.FP64: np.float64,
    Datatype.BYTES: np.object_,
}
"""NumPy's type of each datatype; it has none for BF16."""

_FREE_LENGTHS = (64, 1, 16, 128, 224, 256, 320, 512, 640)


class Samples(Protocol):
    """Inputs of a model, one set for each run."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: int, /) -> Arrays: ...


class ArrayFiles:
    """The .npz files of a folder in the order of their names, each with one array for each input."""

    def __init__(self, folder: Path, signature: ModelSignature) -> None:
        """List the files.

        Raises:
            NotFoundError: There is no such folder.
            InvalidRequestError: It has no .npz file.
        """
        if not folder.is_dir():
            raise NotFoundError(f"There is no folder {folder}.")
        self._paths = sorted(folder.glob("*.npz"))[:MOST_SAMPLES]
        self._signature = signature
        if not self._paths:
            raise InvalidRequestError(
                f"The folder {folder} has no .npz files.",
                advice="Write one for each run: numpy.savez('1.npz', " + _example(signature) + ").",
                param="samples",
            )

    def __len__(self) -> int:
        return len(self._paths)

    def __getitem__(self, index: int) -> Arrays:
        """Return one file's arrays.

        Raises:
            InvalidRequestError: It is no sound .npz file, is too large, or does not fit the model.
        """
        path = self._paths[index]
        try:
            _check_size(path)
            with np.load(path, allow_pickle=False) as content:
                arrays = {name: content[name] for name in content.files}
        except (OSError, ValueError, EOFError, zipfile.BadZipFile, NotImplementedError) as error:
            raise InvalidRequestError(f"{path} is no sound .npz file: {error!s:.200}.", param="samples") from error
        return checked(arrays, self._signature, str(path))


class MadeUp:
    """Random inputs in the first shape that the model runs with."""

    def __init__(self, signature: ModelSignature, runs: Callable[[Arrays], bool], count: int = 8) -> None:
        """Find the shape.

        Args:
            signature: Of the model.
            runs: Tells whether the model can be run with these inputs.
            count: Sets of inputs.

        Raises:
            InvalidRequestError: None was found.
        """
        self._signature, self._count = signature, count
        for sizes in _guesses():
            self._sizes = sizes
            if runs(self[0]):
                return
        raise InvalidRequestError(
            "No inputs could be made up that the model runs with.",
            advice="Name a folder of .npz files with --samples, each with the arrays " + _example(signature) + ".",
            param="samples",
        )

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> Arrays:
        """Return random inputs, the same whenever they are asked for."""
        random = np.random.default_rng(index)
        return {
            each.name: _random_array(each, tuple(self._sizes(each.shape)), random) for each in self._signature.inputs
        }


def read_sentences(path: Path) -> list[str]:
    """Return the sentences of a text file, one a line, or of a .jsonl file of strings or objects with a `text`.

    Raises:
        NotFoundError: There is no such file.
        InvalidRequestError: It cannot be read, is too large or has no sentence.
    """
    try:
        if path.stat().st_size > MOST_TEXT_BYTES:
            raise InvalidRequestError(
                f"{path} has {path.stat().st_size:,} bytes; at most {MOST_TEXT_BYTES:,} are read.", param="samples"
            )
        lines = path.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError as error:
        raise NotFoundError(f"There is no file {path}.") from error
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidRequestError(f"{path} cannot be read as UTF-8 text: {error}.", param="samples") from error
    is_json = path.suffix.lower() in (".jsonl", ".ndjson")
    sentences = [_sentence_of(line, number, path) if is_json else line for number, line in enumerate(lines, 1) if line]
    sentences = [each for each in sentences if each.strip()][:MOST_SENTENCES]
    if not sentences:
        raise InvalidRequestError(f"{path} has no sentence.", param="samples")
    return sentences


def checked(arrays: Arrays, signature: ModelSignature, origin: str) -> Arrays:
    """Return the arrays if they are what the model takes.

    Raises:
        InvalidRequestError: One is missing, unknown, or of another type or shape; the message says where from.
    """
    wanted = {each.name: each for each in signature.inputs}
    if wanted.keys() != arrays.keys():
        raise InvalidRequestError(
            f"{origin} has the arrays {', '.join(sorted(arrays)) or 'none'}; the model takes "
            f"{', '.join(sorted(wanted))}.",
            param="samples",
        )
    return {name: _checked_array(array, wanted[name], origin) for name, array in arrays.items()}


def _checked_array(array: NDArray[Any], wanted: TensorSpec, origin: str) -> NDArray[Any]:
    kind = ARRAY_TYPES.get(wanted.datatype)
    if wanted.datatype is Datatype.BYTES and array.dtype.kind == "U":
        array = array.astype(np.object_)
    fits = len(array.shape) == len(wanted.shape) and all(
        size in (-1, given) for size, given in zip(wanted.shape, array.shape, strict=True)
    )
    if kind is None or array.dtype != kind or not fits:
        raise InvalidRequestError(
            f"{origin}: {wanted.name} is {array.dtype} {list(array.shape)}; the model takes {wanted.datatype} "
            f"{list(wanted.shape)}, where -1 is any size.",
            param="samples",
        )
    return array


def _check_size(path: Path) -> None:
    with zipfile.ZipFile(path) as archive:
        size = sum(each.file_size for each in archive.infolist())
    if size > MOST_ARRAY_BYTES:
        raise ValueError(f"it unpacks to {size:,} bytes, and at most {MOST_ARRAY_BYTES:,} are read")


def _sentence_of(line: str, number: int, path: Path) -> str:
    try:
        document = msgspec.json.decode(line)
    except msgspec.DecodeError as error:
        raise InvalidRequestError(f"Line {number} of {path} is not JSON: {error}.", param="samples") from error
    text = document.get("text") if isinstance(document, dict) else document
    if not isinstance(text, str):
        raise InvalidRequestError(
            f"Line {number} of {path} is neither a string nor an object with a `text`.", param="samples"
        )
    return text


def _guesses() -> Iterator[Callable[[tuple[int, ...]], Iterator[int]]]:
    """Yield ways to fill in the free dimensions of a shape, the likeliest first."""
    for length in _FREE_LENGTHS:
        yield lambda shape, length=length: _filled(shape, 1, length)  # type: ignore[misc]
        yield lambda shape, length=length: _filled(shape, len(shape) - 1, length)  # type: ignore[misc]
        yield lambda shape, length=length: _filled(shape, 0, length)  # type: ignore[misc]


def _filled(shape: tuple[int, ...], first: int, length: int) -> Iterator[int]:
    """Yield a shape whose free dimensions are 1, and `length` from the dimension `first` on."""
    for place, size in enumerate(shape):
        yield size if size >= 0 else (length if place >= first else 1)


def _random_array(spec: TensorSpec, shape: tuple[int, ...], random: np.random.Generator) -> NDArray[Any]:
    kind = ARRAY_TYPES.get(spec.datatype)
    if kind is None:
        raise ModelFileError(f"The input {spec.name} is {spec.datatype}, which cannot be made up here.")
    if kind is np.object_:
        return np.full(shape, "text", np.object_)
    if np.issubdtype(kind, np.floating):
        return random.standard_normal(shape).astype(kind)
    return random.integers(0, 2, shape).astype(kind)


def _example(signature: ModelSignature) -> str:
    return ", ".join(f"{each.name}=… of {each.datatype} {list(each.shape)}" for each in signature.inputs)
