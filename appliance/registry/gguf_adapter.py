"""Whether a GGUF file is a sound LoRA adapter and fits its base model, before native code sees it.

llama.cpp computes `W·x + (alpha / rank) · B·(A·x)` for every matrix W that the adapter names. It ends the process on
an adapter whose header holds another type than it asks for, whose matrices have more dimensions than it compares, or
are of a type that it cannot multiply; and it ignores tensors that it cannot apply. So all of that is refused here, with
figures. An infinity would reach the KV cells, and from there every other sequence.

Shapes are given innermost dimension first, as in the file: a matrix of `n` inputs and `m` outputs is `[n, m]`, its A is
`[n, rank]` and its B is `[rank, m]`. Token embeddings are looked up and not multiplied: A is `[rank, tokens]` and B is
`[rank, width]`.

Sources: `llama_adapter_lora_init_impl` and `build_lora_mm` of llama.cpp; its `convert_lora_to_gguf.py`.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from appliance.core.errors import ModelFileError
from appliance.registry.files import open_regular, storage_errors
from appliance.registry.gguf_header import GGUFContents, parse_contents
from appliance.registry.gguf_tensors import TensorPlace, dominant_type_of
from appliance.registry.gguf_values import damaged

_SUFFIXES = (".lora_a", ".lora_b")
_EMBEDDINGS = "token_embd.weight"
_APPLIED = re.compile(
    r"(token_embd|output|blk\.[0-9]+\."
    r"(attn_(q|k|v|qkv|output)|ffn_(gate|up|down|gate_up)(_exps|_shexp)?|ffn_gate_inp(_shexp)?|ssm_(in|x|dt|out)))\.weight"
)
"""Matrices that llama.cpp multiplies with regard to adapters in all architectures; of others it forgets to in some."""
_CHUNK_BYTES = 34 * 32 * 1024

_HALF = bytes(each for each in range(256) if each & 0x7C == 0x7C)
_WIDE = b"\x7f\xff"
_EXPONENTS = {"F32": (3, 4, _WIDE), "F16": (1, 2, _HALF), "BF16": (1, 2, _WIDE), "Q8_0": (1, 34, _HALF)}
"""The types that adapters come in: where in how many bytes a number's highest byte is, and which it has if the number
is infinite, none, or over 1.7e38. Of `Q8_0` it is the scale of a block that counts."""


@dataclass(frozen=True, slots=True)
class AdapterHeader:
    """What a sound adapter says of itself.

    Attributes:
        architecture: That of its base model.
        name: What its publisher called it, or "".
        licence: As its publisher wrote it, or "".
        quantisation: The type that most of its weights have, for example `F16`.
        alpha: Its scale is this divided by the rank; 0 is a scale of 1.
        rank: The largest of its matrices.
        matrices: How many of the base's matrices it changes.
    """

    architecture: str
    name: str
    licence: str
    quantisation: str
    alpha: float
    rank: int
    matrices: int


def read_adapter(path: Path, base: Path) -> AdapterHeader:
    """Check the adapter at `path` against its base model's file and return what it says of itself.

    Raises:
        ModelFileError: It is no LoRA adapter, or not one for this base; the message says what is wrong and where.
        StorageError: One of the two cannot be read.
    """
    with storage_errors(base), open_regular(base) as file:
        base_contents = parse_contents(file, os.fstat(file.fileno()).st_size)
    with storage_errors(path), open_regular(path) as file:
        return parse_adapter(file, os.fstat(file.fileno()).st_size, base_contents)


def parse_adapter(file: BinaryIO, size: int, base: GGUFContents) -> AdapterHeader:
    """As `read_adapter`, from a file that stands at its start and is `size` bytes long."""
    contents = parse_contents(file, size)
    fields = contents.fields
    _refuse_other_kinds(contents)
    architecture, wanted = (each.fields.identifier("general.architecture") for each in (contents, base))
    if architecture != wanted:
        raise ModelFileError(
            f"The adapter is for models of the architecture {architecture!r}, and its base is a {wanted!r}.",
            advice="Name the base model that it was trained on.",
        )
    alpha = fields.float32("adapter.lora.alpha", 0.0)
    pairs = _pairs(contents.tensors)
    ranks = [_check_pair(name, pair, base.tensors) for name, pair in pairs.items()]
    for name, place in contents.tensors.items():
        _check_numbers(file, name, place)
    return AdapterHeader(
        architecture=architecture,
        name=fields.text("general.name"),
        licence=fields.text("general.license"),
        quantisation=dominant_type_of(contents.tensors),
        alpha=alpha,
        rank=max(ranks),
        matrices=len(ranks),
    )


def _refuse_other_kinds(contents: GGUFContents) -> None:
    fields = contents.fields
    if (kind := fields.text("general.type") or "model") != "adapter":
        raise ModelFileError(
            f"The GGUF file holds a {kind[:40]!r}, not an adapter.",
            advice="A model comes in without --base; an adapter is made by llama.cpp's convert_lora_to_gguf.py.",
        )
    if (kind := fields.text("adapter.type")) != "lora":
        raise ModelFileError(f"The adapter is of the type {kind[:40]!r}; only 'lora' can be applied.")
    if fields.has("adapter.alora.invocation_tokens"):
        raise ModelFileError(
            "The adapter is an activated LoRA, which counts only from certain tokens on; it would answer wrongly.",
            advice="Use an ordinary LoRA adapter.",
        )


def _pairs(tensors: Mapping[str, TensorPlace]) -> dict[str, tuple[TensorPlace, TensorPlace]]:
    """Return A and B by the name of the matrix that they change."""
    matrices = []
    for name in tensors:
        matrix, dot, suffix = name.rpartition(".")
        if dot + suffix not in _SUFFIXES or any(each in matrix for each in _SUFFIXES):
            raise ModelFileError(
                f"The adapter's tensor {name!r} is neither a '.lora_a' nor a '.lora_b', and would be ignored.",
                advice="Export it again as a plain LoRA, without changed norms, biases or whole matrices.",
            )
        matrices.append(matrix)
    for matrix in matrices:
        for suffix in _SUFFIXES:
            if matrix + suffix not in tensors:
                raise damaged(f"the adapter has no {matrix + suffix!r}, one half of a pair")
    return {each: (tensors[each + ".lora_a"], tensors[each + ".lora_b"]) for each in matrices}


def _check_pair(name: str, pair: tuple[TensorPlace, TensorPlace], base: Mapping[str, TensorPlace]) -> int:
    """Check the shapes of A and B against the base's matrix and return their rank."""
    target = base.get(name)
    if target is None:
        raise _misfit(f"The adapter changes {name!r}, and its base has no such tensor.")
    if not _APPLIED.fullmatch(name) or len(target.dimensions) != (3 if "_exps." in name else 2):
        raise ModelFileError(
            f"The adapter changes {name!r} {list(target.dimensions)}, to which the engine cannot apply it.",
            advice="Export it with attention and feed-forward matrices alone, or merge it into the model.",
        )
    if name == _EMBEDDINGS and "output.weight" not in base:
        raise ModelFileError(
            f"The adapter changes {name!r}, which in this base model is the output matrix too; that cannot be applied.",
            advice="Export the adapter without its embeddings.",
        )
    inputs, outputs, *experts = target.dimensions
    down, up = pair
    rank = down.dimensions[0] if name == _EMBEDDINGS else (*down.dimensions, 1)[1]
    fitting = ((rank, outputs), (rank, inputs)) if name == _EMBEDDINGS else ((inputs, rank), (rank, outputs))
    if (down.dimensions, up.dimensions) != tuple((*each, *experts) for each in fitting):
        raise _misfit(
            f"The adapter's matrices {list(down.dimensions)} and {list(up.dimensions)} for {name!r} do not fit "
            f"the base's {list(target.dimensions)}."
        )
    if rank > min(inputs, outputs):
        raise ModelFileError(
            f"The adapter's rank for {name!r} is {rank:,}; the matrix itself has only {min(inputs, outputs):,}.",
            advice="That is no low-rank adapter: merge it into the model and import that.",
        )
    return rank


def _misfit(message: str) -> ModelFileError:
    return ModelFileError(message, advice="Name the base model that it was trained on.")


def _check_numbers(file: BinaryIO, name: str, place: TensorPlace) -> None:
    if place.type_name not in _EXPONENTS:
        raise ModelFileError(
            f"The adapter's tensor {name!r} is of the type {place.type_name}; {', '.join(_EXPONENTS)} can be applied.",
            advice="Convert the adapter with --outtype f16.",
        )
    first, stride, endless = _EXPONENTS[place.type_name]
    sound = bytes(set(range(256)).difference(endless))
    file.seek(place.offset)
    left = place.size
    while left:
        wanted = min(_CHUNK_BYTES, left)
        chunk = file.read(wanted)
        if len(chunk) < wanted:
            raise damaged(f"the file was cut off while it was read, at tensor {name!r}")
        if chunk[first::stride].translate(None, sound):
            raise damaged(f"tensor {name!r} holds infinities or what is not a number")
        left -= wanted
