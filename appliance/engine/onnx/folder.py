"""What the files beside an encoder's graph say, as Hugging Face and sentence-transformers lay them out.

A file that is missing says nothing; one that is there must make sense.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

import msgspec

from appliance.core.errors import ModelFileError
from appliance.engine.onnx.dense import Dense, read_dense
from appliance.engine.onnx.pooling import Pooling, poolings_of

LARGEST_FILE = 4 * 2**20
"""Bytes of a configuration; one with the names of 20,000 labels has 1 MB."""
_OFFSET_POSITIONS = frozenset({"camembert", "longformer", "mpnet", "roberta", "xlm-roberta", "xlm-roberta-xl"})
"""Architectures whose first position comes behind that of the padding token."""
_SIGMOIDS = frozenset({"Sigmoid", "Identity"})

_Struct = TypeVar("_Struct")


class _CrossEncoder(msgspec.Struct):
    activation_fn: str | None = None


class _Config(msgspec.Struct):
    """The keys of `config.json` that matter here."""

    model_type: str = ""
    hidden_size: int | None = None
    dim: int | None = None
    vocab_size: int | None = None
    max_position_embeddings: int | None = None
    pad_token_id: int | None = None
    id2label: dict[str, str] = {}
    problem_type: str | None = None
    matryoshka_dimensions: list[int] | None = None
    sentence_transformers: _CrossEncoder | None = None
    sbert_ce_default_activation_function: str | None = None


class _TokenizerConfig(msgspec.Struct):
    model_max_length: int | float | None = None


class _SentenceConfig(msgspec.Struct):
    max_seq_length: int | None = None
    do_lower_case: bool = False


class _Prompts(msgspec.Struct):
    """The keys of `config_sentence_transformers.json` that matter here."""

    prompts: dict[str, str | None] = {}
    default_prompt_name: str | None = None


class _Module(msgspec.Struct):
    type: str
    path: str = ""


@dataclass(frozen=True, slots=True)
class EncoderFiles:
    """What an encoder's files say.

    Attributes:
        lengths: Limits of an input in tokens, by the file that sets it.
        vocabulary_size: Tokens that the model knows, or None.
        hidden_size: Numbers of a token's state, or None.
        padding_id: The token to fill up with.
        lower_case: Texts are made lower case before anything else.
        prompt: What stands in front of every text.
        poolings: How states become a vector.
        dense: Layers that the vector then goes through.
        labels: Of a classifier, in the order of its logits; may be empty.
        exclusive: A text has one label, and not any number of them.
        matryoshka: The start of a vector is a vector itself.
    """

    lengths: dict[str, int]
    vocabulary_size: int | None
    hidden_size: int | None
    padding_id: int
    lower_case: bool
    prompt: str
    poolings: tuple[Pooling, ...]
    dense: tuple[Dense, ...]
    labels: tuple[str, ...]
    exclusive: bool
    matryoshka: bool


def read_encoder_files(folder: Path) -> EncoderFiles:
    """Read the files of a folder.

    Raises:
        ModelFileError: One is damaged, or asks for what is not known; the message names it.
    """
    config = _read(folder, "config.json", _Config) or _Config()
    sentence = _read(folder, "sentence_bert_config.json", _SentenceConfig) or _SentenceConfig()
    tokenizer = _read(folder, "tokenizer_config.json", _TokenizerConfig) or _TokenizerConfig()
    _check_activation(config)
    lengths = {
        "sentence_bert_config.json": sentence.max_seq_length,
        "tokenizer_config.json": tokenizer.model_max_length,
        "config.json": _positions(config),
    }
    poolings, dense = _steps(folder)
    return EncoderFiles(
        lengths={file: int(length) for file, length in lengths.items() if length is not None and length > 0},
        vocabulary_size=_positive(config.vocab_size),
        hidden_size=_positive(config.hidden_size or config.dim),
        padding_id=max(0, config.pad_token_id or 0),
        lower_case=sentence.do_lower_case,
        prompt=_prompt(folder),
        poolings=poolings,
        dense=dense,
        labels=_labels(folder, config),
        exclusive=config.problem_type != "multi_label_classification",
        matryoshka=bool(config.matryoshka_dimensions),
    )


def _positive(number: int | None) -> int | None:
    return number if number is not None and number > 0 else None


def _positions(config: _Config) -> int | None:
    positions = _positive(config.max_position_embeddings)
    if positions is not None and config.model_type in _OFFSET_POSITIONS:
        return positions - (config.pad_token_id or 0) - 1
    return positions


def _prompt(folder: Path) -> str:
    file = "config_sentence_transformers.json"
    config = _read(folder, file, _Prompts) or _Prompts()
    name = config.default_prompt_name
    if name is None:
        return ""
    if name not in config.prompts:
        raise ModelFileError(f"The model's {file} has no prompt {name!r}, which it names as its default.")
    return config.prompts[name] or ""


def _check_activation(config: _Config) -> None:
    asked = config.sbert_ce_default_activation_function
    if config.sentence_transformers is not None:
        asked = config.sentence_transformers.activation_fn or asked
    if asked and asked.rpartition(".")[2] not in _SIGMOIDS:
        raise ModelFileError(
            f"The model's config.json asks for the activation {asked!r}; known are Sigmoid and Identity.",
            advice="Use another model, or set the activation to torch.nn.modules.activation.Sigmoid.",
        )


def _steps(folder: Path) -> tuple[tuple[Pooling, ...], tuple[Dense, ...]]:
    """Return how states become a vector. It is then always made one of length 1, with or without `Normalize`."""
    modules = _read(folder, "modules.json", list[_Module])
    if modules is None:
        return _poolings(folder, "1_Pooling"), ()
    poolings: tuple[Pooling, ...] = (Pooling.MEAN,)
    dense: list[Dense] = []
    for module in modules:
        match module.type.rpartition(".")[2]:
            case "Transformer" | "Normalize" | "Dropout":
                pass
            case "Pooling":
                poolings = _poolings(folder, module.path)
            case "Dense":
                dense.append(read_dense(_inside(folder, module.path)))
            case _:
                raise ModelFileError(
                    f"The model's modules.json asks for {module.type!r}, which is not known.",
                    advice="Export the model with all its steps in the graph, as the output `sentence_embedding`.",
                )
    return poolings, tuple(dense)


def _poolings(folder: Path, path: str) -> tuple[Pooling, ...]:
    config = _read(_inside(folder, path), "config.json", dict[str, Any]) or {}
    if config.get("include_prompt") is False and _prompt(folder):
        raise ModelFileError(
            "The model leaves its prompt out of the pooling, which is not supported.",
            advice="Export the model with all its steps in the graph, as the output `sentence_embedding`.",
        )
    return poolings_of(config)


def _inside(folder: Path, path: str) -> Path:
    parts = PurePosixPath(path)
    if parts.is_absolute() or ".." in parts.parts or "\0" in path:
        raise ModelFileError(f"The model's modules.json names {path!r}, which is outside the model's folder.")
    return folder / parts


def _labels(folder: Path, config: _Config) -> tuple[str, ...]:
    if config.id2label:
        if set(config.id2label) != set(map(str, range(len(config.id2label)))):
            raise ModelFileError("The model's config.json has labels in `id2label` that are not numbered from 0.")
        return tuple(config.id2label[str(number)] for number in range(len(config.id2label)))
    return tuple(_lines(folder, "labels.txt"))


def _lines(folder: Path, name: str) -> Iterator[str]:
    content = _content(folder, name) or b""
    try:
        yield from (line.strip() for line in content.decode("utf-8").splitlines() if line.strip())
    except UnicodeDecodeError as error:
        raise ModelFileError(f"The model's {name} is not UTF-8 text.") from error


def _read(folder: Path, name: str, kind: type[_Struct]) -> _Struct | None:
    content = _content(folder, name)
    if content is None:
        return None
    try:
        return msgspec.json.decode(content, type=kind)
    except (msgspec.DecodeError, RecursionError) as error:
        raise ModelFileError(f"The model's {name} cannot be used: {error}.") from error


def _content(folder: Path, name: str) -> bytes | None:
    path = folder / name
    try:
        if path.stat().st_size > LARGEST_FILE:
            raise ModelFileError(f"The model's {name} has {path.stat().st_size} bytes; {LARGEST_FILE} are allowed.")
        return path.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise ModelFileError(f"The model's {name} cannot be read: {error.strerror}.") from error
