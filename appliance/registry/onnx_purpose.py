"""What an ONNX model is for, from the files that lie beside it as Hugging Face and sentence-transformers name them.

Sources: the configuration files of the transformers and sentence-transformers libraries.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import msgspec
from msgspec import Struct

from appliance.core.errors import InvalidRequestError, ModelFileError
from appliance.core.tensors import Datatype, ModelSignature
from appliance.registry.files import open_regular, storage_errors

COMPANIONS = (
    "tokenizer.json",
    "config.json",
    "1_Pooling/config.json",
    "2_Dense/config.json",
    "2_Dense/model.safetensors",
    "3_Dense/config.json",
    "3_Dense/model.safetensors",
    "modules.json",
    "sentence_bert_config.json",
    "config_sentence_transformers.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "labels.txt",
)
"""Files beside the graph that are taken in with it."""

MAX_CONFIG_BYTES = 1024 * 1024
MAX_CONTEXT_LENGTH = 2**20

_TOKEN_INPUTS = frozenset({"input_ids", "attention_mask", "token_type_ids", "position_ids"})
_TEXT_TASKS = frozenset({"embedding", "rerank", "classification"})
_FLOATS = frozenset({Datatype.FP32, Datatype.FP16})
_CLASSIFIER = "ForSequenceClassification"

T = TypeVar("T")


class _Config(Struct, frozen=True):
    architectures: list[str] | None = None
    model_type: str | None = None
    max_position_embeddings: int | None = None
    num_labels: int | None = None
    id2label: dict[str, Any] | None = None


class _SentenceConfig(Struct, frozen=True):
    max_seq_length: int | None = None


@dataclass(frozen=True, slots=True)
class Purpose:
    """What a model is for.

    Attributes:
        task: `embedding`, `rerank`, `classification` or `tensor`.
        architecture: As its configuration says, for example `bert`, or else `onnx`.
        context_length: Tokens it takes, or 0 where no file says so.
    """

    task: str
    architecture: str
    context_length: int


def read_purpose(signature: ModelSignature, files: Mapping[str, Path], task: str | None = None) -> Purpose:
    """Tell what a model is for.

    Args:
        signature: Of the graph.
        files: Where each file beside it is, by its role.
        task: What a person or a manifest says it is for, or None.

    Raises:
        ModelFileError: A configuration file is damaged.
        InvalidRequestError: The model lacks what `task` needs; the message says what.
    """
    config = _read(files, "config.json", _Config) or _Config()
    sentences = _read(files, "sentence_bert_config.json", _SentenceConfig) or _SentenceConfig()
    lengths = [each for each in (sentences.max_seq_length, config.max_position_embeddings) if each is not None]
    missing = _missing_for_text(signature, files)
    if task in _TEXT_TASKS and missing:
        raise InvalidRequestError(
            f"The model cannot be for {task}: {missing}.",
            advice="Add what is missing to its folder, or import it with --task tensor.",
            param="task",
        )
    architecture = config.model_type or "onnx"
    return Purpose(
        task=task or ("tensor" if missing else _text_task(signature, files, config)),
        architecture=architecture if architecture.isprintable() and len(architecture) <= 64 else "onnx",
        context_length=next((each for each in lengths if 0 < each <= MAX_CONTEXT_LENGTH), 0) if not missing else 0,
    )


def _missing_for_text(signature: ModelSignature, files: Mapping[str, Path]) -> str:
    """Return what keeps the model from being given text, or ""."""
    names = {each.name for each in signature.inputs}
    if "tokenizer.json" not in files:
        return "it has no tokenizer.json"
    if "input_ids" not in names or not names <= _TOKEN_INPUTS:
        return f"its inputs are {', '.join(sorted(names))!r:.200}, not input_ids and what goes with them"
    wrong = [each for each in signature.inputs if each.datatype not in (Datatype.INT64, Datatype.INT32)]
    if wrong or any(len(each.shape) != 2 for each in signature.inputs):
        return "its inputs are not whole numbers in rows and columns"
    return ""


def _text_task(signature: ModelSignature, files: Mapping[str, Path], config: _Config) -> str:
    first = signature.outputs[0]
    is_classifier = any(each.endswith(_CLASSIFIER) for each in config.architectures or [])
    if len(first.shape) == 2 and (is_classifier or (first.name == "logits" and config.architectures is None)):
        return "rerank" if _label_count(first.shape[-1], files, config) == 1 else "classification"
    is_float = any(each.datatype in _FLOATS and len(each.shape) in (2, 3) for each in signature.outputs)
    return "embedding" if is_float and not is_classifier and not _writes_text(config) else "tensor"


def _writes_text(config: _Config) -> bool:
    """Tell whether the scores of a model's outputs are those of tokens or of spans."""
    endings = ("ForMaskedLM", "ForCausalLM", "ForTokenClassification", "ForQuestionAnswering", "LMHeadModel")
    return any(each.endswith(endings) for each in config.architectures or [])


def _label_count(width: int, files: Mapping[str, Path], config: _Config) -> int:
    """Return how many labels a classifier has; the graph knows best, its configuration next, then the list."""
    if width > 0:
        return width
    if config.id2label is not None:
        return len(config.id2label)
    if config.num_labels is not None:
        return config.num_labels
    if path := files.get("labels.txt"):
        return sum(1 for line in _content(path).splitlines() if line.strip())
    return 2  # what transformers takes for granted


def _read(files: Mapping[str, Path], role: str, kind: type[T]) -> T | None:
    if role not in files:
        return None
    try:
        return msgspec.json.decode(_content(files[role]), type=kind)
    except (msgspec.MsgspecError, UnicodeError, RecursionError) as error:
        raise ModelFileError(
            f"The model's {role} cannot be read: {error!s:.200}.", advice="Fetch or export it again."
        ) from error


def _content(path: Path) -> bytes:
    with storage_errors(path), open_regular(path) as file:
        content = file.read(MAX_CONFIG_BYTES + 1)
    if len(content) > MAX_CONFIG_BYTES:
        raise ModelFileError(f"The model's {path.name} is over {MAX_CONFIG_BYTES:,} bytes.")
    return content
