"""Whether a GGUF file is sound, and what it says of itself, before native code sees it.

llama.cpp maps a model file into memory and aborts the process on some of what a hostile file can say, so every file is
read here first, by code that trusts no count, length or offset. The reader of the `gguf` package is not used
for that: it maps the file too and follows its counts wherever they lead. It serves as the second opinion in our tests.

Sources: docs/gguf.md of ggml; the checks of `gguf_init_from_reader` and of llama.cpp's vocabulary loader.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from appliance.core.errors import ModelFileError
from appliance.core.types import KvCacheType
from appliance.registry.files import open_regular, storage_errors
from appliance.registry.ggml_types import FILE_TYPES, GUESSED_FILE_TYPE, TENSOR_TYPES
from appliance.registry.gguf_tensors import TensorPlace, dominant_type_of, read_tensors
from appliance.registry.gguf_values import FLOAT32, SCALARS, STRING, ArrayOf, Value, ValueReader, damaged

MAX_CHAT_TEMPLATE_BYTES = 64 * 1024
MAX_KEYS = 16_384
MAX_KEY_BYTES = 512
MAX_TENSORS = 65_536
MAX_CONTEXT_LENGTH = 2**30
MAX_LAYERS = 512
DEFAULT_ALIGNMENT = 32
MAX_ALIGNMENT = 2**20

_TEMPLATE_KEY = "tokenizer.chat_template"
_KEPT_STRINGS = frozenset(
    {
        "general.architecture",
        "general.type",
        "general.name",
        "general.license",
        "tokenizer.ggml.model",
        "adapter.type",
        _TEMPLATE_KEY,
    }
)
_IDENTIFIER = re.compile(r"[a-z0-9][a-z0-9_.-]{0,63}")

_ENCODERS = frozenset(
    {
        "bert",
        "eurobert",
        "gemma-embedding",
        "jina-bert-v2",
        "jina-bert-v3",
        "llama-embed",
        "modern-bert",
        "neo-bert",
        "nomic-bert",
        "nomic-bert-moe",
        "t5encoder",
    }
)
"""Architectures of llama.cpp that write no text."""

_POOLING_NONE, _POOLING_RANK = 0, 4
"""Numbers of `enum llama_pooling_type`; between them are mean, cls and last."""

_WORD_PIECE_ENDS = {"tokenizer.ggml.bos_token_id": 101, "tokenizer.ggml.seperator_token_id": 102}
"""The tokens around every text of a WordPiece vocabulary, and their ids where the file is silent."""

_OTHER_FORMATS = (
    (b"FUGG", "a big-endian GGUF file", "Convert it to little-endian."),
    (b"PK\x03\x04", "a ZIP archive or wheel", "Name the .gguf file inside it."),
    (b"lmgg", "a GGML file from before GGUF", "Convert it with llama.cpp's scripts, or fetch the GGUF edition."),
    (b"tjgg", "a GGML file from before GGUF", "Convert it with llama.cpp's scripts, or fetch the GGUF edition."),
    (b"vers", "a pointer of Git LFS rather than the file", "Run `git lfs pull` where it came from."),
    (b"<", "a web page rather than the file", "The address probably asks for a login; fetch the file itself."),
)


@dataclass(frozen=True, slots=True)
class GGUFHeader:
    """What a sound GGUF file says of itself.

    Attributes:
        architecture: As llama.cpp names it, for example `llama`.
        name: What its publisher called it, or "".
        licence: As its publisher wrote it, or "".
        context_length: Tokens it was trained for.
        quantisation: For example `Q4_1`.
        tokenizer: The tokenizer's kind, for example `gpt2`.
        vocabulary_size: Tokens.
        chat_template: Jinja source, or None.
        tensor_count: Tensors.
        kv_bytes_per_token: Bytes one token takes in an f16 KV cache; an upper bound where layers differ.
        embeds: It was made for embeddings: it writes no text, or says how its states become one vector.
    """

    architecture: str
    name: str
    licence: str
    context_length: int
    quantisation: str
    tokenizer: str
    vocabulary_size: int
    chat_template: str | None
    tensor_count: int
    kv_bytes_per_token: int
    embeds: bool = False

    def kv_bytes(self, cells: int, kind: KvCacheType) -> int:
        """Return the bytes that so many KV cells of a type take."""
        stored = next(each for each in TENSOR_TYPES.values() if each.name == kind.upper())
        return cells * self.kv_bytes_per_token // 2 * stored.block_bytes // stored.block_elements


@dataclass(frozen=True, slots=True)
class GGUFContents:
    """A sound file's keys and tensors, whatever kind of file it is.

    Attributes:
        tensors: By name, in the order of the file; offsets count from the start of the file.
    """

    fields: GGUFFields
    tensors: Mapping[str, TensorPlace]


def read_header(path: Path) -> GGUFHeader:
    """Check the file at `path` and return what it says of itself.

    Raises:
        ModelFileError: It is not a GGUF file that llama.cpp can load; the message says what is wrong and where.
        StorageError: It cannot be read.
    """
    with storage_errors(path), open_regular(path) as file:
        return parse_header(file, os.fstat(file.fileno()).st_size)


def parse_header(file: BinaryIO, size: int) -> GGUFHeader:
    """As `read_header`, from a file that stands at its start and is `size` bytes long."""
    contents = parse_contents(file, size)
    fields = contents.fields
    fields.refuse_what_is_no_model()
    dominant_type = dominant_type_of(contents.tensors)
    architecture = fields.identifier("general.architecture")
    tokenizer, vocabulary_size = fields.vocabulary()
    return GGUFHeader(
        architecture=architecture,
        name=fields.text("general.name"),
        licence=fields.text("general.license"),
        context_length=fields.integer(f"{architecture}.context_length", 1, MAX_CONTEXT_LENGTH),
        quantisation=fields.quantisation(dominant_type),
        tokenizer=tokenizer,
        vocabulary_size=vocabulary_size,
        chat_template=fields.chat_template(),
        tensor_count=len(contents.tensors),
        kv_bytes_per_token=fields.kv_bytes_per_token(architecture),
        embeds=fields.embeds(architecture),
    )


def parse_contents(file: BinaryIO, size: int) -> GGUFContents:
    """Check that a file is sound GGUF of any kind, and return its keys and where its tensors are.

    Raises:
        ModelFileError: It is not; the message says what is wrong and where.
    """
    reader = ValueReader(file, size)
    _check_magic(reader)
    tensor_count = reader.unsigned("the number of tensors")
    key_count = reader.unsigned("the number of keys")
    if not 1 <= tensor_count <= MAX_TENSORS:
        raise damaged(f"it claims {tensor_count:,} tensors; 1 to {MAX_TENSORS:,} can be")
    if key_count > MAX_KEYS:
        raise damaged(f"it claims {key_count:,} keys; at most {MAX_KEYS:,} can be")
    fields = _read_fields(reader, key_count)
    return GGUFContents(fields, read_tensors(reader, tensor_count, fields.alignment()))


def _check_magic(reader: ValueReader) -> None:
    if reader.remaining < 4:
        raise damaged(f"it is {reader.remaining} bytes long")
    magic = reader.take(4, "the magic number")
    if magic != b"GGUF":
        for start, what, advice in _OTHER_FORMATS:
            if magic.startswith(start):
                raise ModelFileError(f"This is {what}, not a GGUF model file.", advice=advice)
        raise ModelFileError(f"This is not a GGUF model file: it begins with {magic!r} instead of b'GGUF'.")
    version = reader.unsigned("the version", wide=False)
    if version & 0xFFFF == 0 and version:
        raise ModelFileError("This is a big-endian GGUF file.", advice="Convert it to little-endian.")
    if version not in (2, 3):
        raise ModelFileError(
            f"The GGUF file has version {version}; versions 2 and 3 can be loaded.",
            advice="Fetch a current edition of the model.",
        )


def _read_fields(reader: ValueReader, count: int) -> GGUFFields:
    """Return the header's keys with their values; of texts only those that are asked for later."""
    values: dict[str, Value] = {}
    types: dict[str, int] = {}
    for index in range(count):
        key = reader.string(f"key {index}", MAX_KEY_BYTES)
        if not key or key in values:
            raise damaged(f"key {index} ({key!r}) is {'there twice' if key else 'empty'}")
        what = f"the value of {key!r}"
        types[key] = reader.unsigned(what, wide=False)
        values[key] = reader.value(types[key], what, keep_text=key in _KEPT_STRINGS)
    return GGUFFields(values, types)


class GGUFFields:
    """The header's keys, asked for by type."""

    def __init__(self, fields: Mapping[str, Value], types: Mapping[str, int]) -> None:
        """Take the values by key, and the number of each value's type."""
        self._fields = fields
        self._types = types

    def refuse_what_is_no_model(self) -> None:
        """Refuse adapters, projectors and the parts of a split model, by name."""
        kind = self.text("general.type") or "model"
        if kind != "model":
            raise ModelFileError(
                f"The GGUF file holds a part of another kind ({kind[:40]!r}), not a model.",
                advice="Name the file with the model itself; a LoRA adapter comes in with --base MODEL.",
            )
        parts = self._fields.get("split.count", 0)
        if isinstance(parts, int) and parts > 1:
            raise ModelFileError(
                f"The GGUF file is one of the {parts} parts of a split model.",
                advice="Join them first: llama-gguf-split --merge FIRST-PART JOINED-FILE.",
            )

    def alignment(self) -> int:
        """Return what every tensor's place is a multiple of, in bytes."""
        value = self.integer("general.alignment", 1, MAX_ALIGNMENT, default=DEFAULT_ALIGNMENT)
        if value & (value - 1):
            raise damaged(f"its alignment of {value} bytes is no power of two")
        return value

    def vocabulary(self) -> tuple[str, int]:
        """Return the tokenizer's kind and its number of tokens."""
        tokenizer = self.identifier("tokenizer.ggml.model")
        tokens = self._fields.get("tokenizer.ggml.tokens")
        if not isinstance(tokens, ArrayOf) or tokens.element_type != STRING or not tokens.count:
            raise ModelFileError(
                "The GGUF file has no vocabulary (tokenizer.ggml.tokens).",
                advice="It was converted without its tokenizer; fetch a complete edition.",
            )
        for key in ("tokenizer.ggml.scores", "tokenizer.ggml.token_type"):
            values = self._fields.get(key)
            if values is not None and not (
                isinstance(values, ArrayOf) and values.element_type in SCALARS and values.count >= tokens.count
            ):
                raise damaged(f"{key} does not have one number for each of the {tokens.count:,} tokens")
        if tokenizer == "bert":  # llama.cpp aborts the process when it cannot put these around a text
            for key, usual in _WORD_PIECE_ENDS.items():
                self.integer(key, 0, tokens.count - 1, default=usual)
        return tokenizer, tokens.count

    def chat_template(self) -> str | None:
        """Return the chat template, or None if there is none."""
        value = self._fields.get(_TEMPLATE_KEY)
        if value is None:
            return None
        if not isinstance(value, str):
            raise damaged(f"{_TEMPLATE_KEY} is no text")
        check_chat_template(value)
        return value or None

    def quantisation(self, dominant_type: str) -> str:
        """Return the name the file gives its quantisation, or else the type that most of its weights have."""
        value = self._fields.get("general.file_type")
        number = value & ~GUESSED_FILE_TYPE if isinstance(value, int) else -1
        return FILE_TYPES.get(number, dominant_type)

    def kv_bytes_per_token(self, architecture: str) -> int:
        """Return layers x heads x (key + value length) x 2 bytes. Per-layer arrays count as the largest they can be."""
        layers = self.integer(f"{architecture}.block_count", 1, MAX_LAYERS)
        heads = self._scalar(f"{architecture}.attention.head_count")
        kv_heads = self._scalar(f"{architecture}.attention.head_count_kv") or heads
        width = self.integer(f"{architecture}.embedding_length", 1, 2**24)
        head_length = width // heads if heads else 0
        key_length = self._scalar(f"{architecture}.attention.key_length") or head_length
        value_length = self._scalar(f"{architecture}.attention.value_length") or head_length
        return layers * kv_heads * (key_length + value_length) * 2

    def embeds(self, architecture: str) -> bool:
        """Return whether the model was made for embeddings; refuse rerankers."""
        pooling = self.integer(f"{architecture}.pooling_type", _POOLING_NONE, 2**31, default=_POOLING_NONE)
        if pooling >= _POOLING_RANK:
            raise ModelFileError(
                "The GGUF file holds a reranker, or an embedding model of a kind that is not known "
                f"(pooling type {pooling}).",
                advice="Models for chat, completion and embeddings can be served.",
            )
        return pooling != _POOLING_NONE or architecture in _ENCODERS

    def text(self, key: str) -> str:
        """Return a text, or "" where there is none."""
        value = self._fields.get(key)
        return value if isinstance(value, str) else ""

    def identifier(self, key: str) -> str:
        """Return a text of the kind that names an architecture or a tokenizer."""
        value = self._fields.get(key)
        if not isinstance(value, str) or not _IDENTIFIER.fullmatch(value):
            found = "missing" if value is None else f"{value!r:.80}"
            raise ModelFileError(
                f"The GGUF file's {key} is {found}; without it llama.cpp cannot tell how to run the model.",
                advice="It is incomplete or of a kind that is not for chat; fetch another edition.",
            )
        return value

    def integer(self, key: str, least: int, most: int, default: int | None = None) -> int:
        """Return a whole number from `least` to `most`."""
        value = self._fields.get(key, default)
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
            raise damaged(f"{key} is {'missing' if value is None else value}; it must be from {least:,} to {most:,}")
        return value

    def has(self, key: str) -> bool:
        """Return True if the file has the key."""
        return key in self._fields

    def float32(self, key: str, default: float) -> float:
        """Return a finite number that is stored in 32 bits, as native code will ask for it."""
        if key not in self._fields:
            return default
        value = self._fields[key]
        if self._types[key] != FLOAT32 or not isinstance(value, float) or not math.isfinite(value):
            raise damaged(f"{key} is {value!r:.40} of the type {self._types[key]}; it must be a finite 32-bit number")
        return value

    def _scalar(self, key: str) -> int:
        """Return a count that only an estimate depends on: 0 where there is none or it differs by layer."""
        value = self._fields.get(key)
        return value if isinstance(value, int) and 0 <= value <= 2**20 else 0


def check_chat_template(template: str) -> None:
    """Refuse a chat template that is larger than any honest one.

    Raises:
        ModelFileError: It is over `MAX_CHAT_TEMPLATE_BYTES`.
    """
    length = len(template.encode(errors="surrogatepass"))
    if length > MAX_CHAT_TEMPLATE_BYTES:
        raise ModelFileError(
            f"The chat template has {length:,} bytes; at most {MAX_CHAT_TEMPLATE_BYTES:,} are taken.",
            advice="Give the model another template in its manifest.",
        )
