"""What is registered and wished for at one time, and what a name means there.

A LoRA adapter belongs to one version of one model, its base. Names are resolved without ambiguity:

    base                   the version that is wished for (`wishes`), else the one registered last
    base:version           that version
    base:adapter           the adapter of that version, else of the one registered last that has one of that name
    base:version:adapter   that adapter

since a version and an adapter of one base never have the same name.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType

from appliance.core.errors import NotFoundError
from appliance.core.tensors import ModelSignature
from appliance.core.wishes import Wish
from appliance.registry.trial import Trial, meant_version


@dataclass(frozen=True, slots=True)
class ModelFile:
    """One file of a model: what it is for, where it is, and what its bytes are.

    Attributes:
        role: `model` is the one that the engine loads, `adapter` an adapter; any other file of a model has its relative
            path in the model's folder as its role, for example `1_Pooling/config.json`.
        path: A read-only file named after its hash.
        size: Bytes.
    """

    role: str
    path: Path
    sha256: str
    size: int


@dataclass(frozen=True, slots=True)
class RegisteredModel:
    """A model on this box, or an adapter; of an adapter everything that is not said to be its own is its base's.

    Attributes:
        kind: `gguf` is a model for text, `lora` an adapter in the same file format, `onnx` a model of tensors.
        task: What it is for: `chat`, `completion` or `embedding`; of the kind `onnx` `embedding`, `rerank`,
            `classification` or, where only tensors are known, `tensor`.
        licence: SPDX licence expression; an adapter's own.
        created: Unix seconds of registration; an adapter's own.
        files: An adapter's own.
        architecture: As its files say, for example `llama`.
        quantisation: For example `Q4_1` or `int8`; an adapter's own.
        context_length: Tokens it was trained for, 0 for a model of the kind `onnx` that does not say.
        minimum_memory: Bytes the process needs with it loaded; an adapter's come on top of its base's.
        chat_template: Replaces the one in the file; None keeps that.
        stop: Strings that end an answer.
        default_context: Tokens of a conversation, or None for `context_length`.
        adapter: The adapter's name, or "" for a model.
        rank: The adapter's rank, or 0 for a model.
        signature: What a model of the kind `onnx` takes and gives; None for the others.
    """

    name: str
    version: str
    kind: str
    task: str
    licence: str
    created: int
    files: tuple[ModelFile, ...]
    architecture: str
    quantisation: str
    context_length: int
    minimum_memory: int
    chat_template: str | None
    stop: tuple[str, ...]
    default_context: int | None
    adapter: str = ""
    rank: int = 0
    signature: ModelSignature | None = None

    @property
    def full_name(self) -> str:
        """Return `name:version`, or `name:version:adapter`."""
        return f"{self.base_name}:{self.adapter}" if self.adapter else self.base_name

    @property
    def base_name(self) -> str:
        """Return `name:version`, which of an adapter is its base's full name."""
        return f"{self.name}:{self.version}"

    @property
    def names(self) -> tuple[str, str]:
        """Return the short name and the full one."""
        return (f"{self.name}:{self.adapter}" if self.adapter else self.name, self.full_name)

    @property
    def size(self) -> int:
        """Return the bytes of all files together."""
        return sum(each.size for each in self.files)

    @property
    def digests(self) -> dict[str, str]:
        """Return the hash of each file by its role."""
        return {each.role: each.sha256 for each in self.files}

    def file(self, role: str) -> ModelFile | None:
        """Return the file of that role, or None."""
        return next((each for each in self.files if each.role == role), None)


@dataclass(frozen=True, slots=True)
class Known:
    """What is registered and wished for at one time.

    Attributes:
        models: Oldest first, each with its adapters behind it, oldest first too.
        wishes: By its short name, which version of a model is wished for, where one is.
    """

    models: tuple[RegisteredModel, ...]
    wishes: Mapping[str, Wish]
    _resolved: dict[str, RegisteredModel] = field(default_factory=dict, repr=False, compare=False)

    def resolve(self, name: str) -> RegisteredModel:
        """Return the model or adapter of that name.

        Raises:
            NotFoundError: There is none; the message names those that exist.
        """
        found = self._resolved.get(name)
        if found is None:
            found = self._resolved[name] = find_model(self.models, name, self.wishes)
        return found


def find_model(
    models: Sequence[RegisteredModel], name: str, wishes: Mapping[str, Wish] = MappingProxyType({})
) -> RegisteredModel:
    """Return the model or adapter that has this full name, or the one that this short name means.

    Raises:
        NotFoundError: There is none; the message names those that exist.
    """
    wanted = name if any(each.full_name == name for each in models) else find_meant(models, name, wishes)
    for model in models:
        if model.full_name == wanted:
            return model
    known = ", ".join(each.full_name for each in models)
    raise NotFoundError(
        f"There is no model {name!r:.100}; " + (f"there are: {known}." if known else "there is none at all yet."),
        advice="`appliance models catalog` lists what can be had, `appliance models pull NAME` gets it.",
        code="model_not_found",
        param="model",
    )


def find_meant(models: Sequence[RegisteredModel], name: str, wishes: Mapping[str, Wish]) -> str | None:
    """Return the full name of the model or adapter that a short name means, or None if it means none."""
    named = {each.version: each for each in models if each.names[0] == name}
    if not named:
        return None
    meant = meant_version(_trial(wishes.get(next(iter(named.values())).name)), list(named))
    return None if meant is None else named[meant].full_name


def _trial(wish: Wish | None) -> Trial | None:
    return None if wish is None else Trial(wish.version, wish.previous, wish.state)
