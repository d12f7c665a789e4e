from __future__ import annotations

import ctypes
import importlib.util
import io
import os
import re
import struct
import tempfile
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from appliance.core.errors import InvalidRequestError, ModelFileError, NotFoundError
from appliance.registry import gguf_header, gguf_values
from appliance.registry.ggml_types import FILE_TYPES, TENSOR_TYPES
from appliance.registry.gguf_header import GGUFHeader, parse_header, read_header
from tests.registry.models import TinyModel
from tests.tiny_gguf import write_tiny_bert

STRING, ARRAY, UINT32, UINT64 = 8, 9, 4, 10


def text(value: str | bytes) -> bytes:
    raw = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(raw)) + raw


def field(key: str | bytes, kind: int, value: bytes) -> bytes:
    return text(key) + struct.pack("<I", kind) + value


def words(key: str, values: list[str]) -> bytes:
    return field(key, ARRAY, struct.pack("<IQ", STRING, len(values)) + b"".join(map(text, values)))


def number(key: str, value: int) -> bytes:
    return field(key, UINT32, struct.pack("<I", value))


def tensor(name: str = "w", shape: tuple[int, ...] = (4,), kind: int = 0, offset: int = 0) -> bytes:
    return text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset)


FIELDS: dict[str, bytes] = {
    "architecture": field("general.architecture", STRING, text("llama")),
    "context": number("llama.context_length", 2048),
    "blocks": number("llama.block_count", 2),
    "width": number("llama.embedding_length", 64),
    "heads": number("llama.attention.head_count", 4),
    "kv heads": number("llama.attention.head_count_kv", 2),
    "tokenizer": field("tokenizer.ggml.model", STRING, text("gpt2")),
    "tokens": words("tokenizer.ggml.tokens", ["a", "你好"]),
    "template": field("tokenizer.chat_template", STRING, text("{{ messages }}")),
}


def build(
    fields: dict[str, bytes] = FIELDS,
    tensors: list[bytes] | None = None,
    *,
    data: int = 16,
    magic: bytes = b"GGUF",
    version: int = 3,
    counts: tuple[int, int] | None = None,
) -> bytes:
    tensors = [tensor()] if tensors is None else tensors
    head = magic + struct.pack("<IQQ", version, *(counts or (len(tensors), len(fields))))
    head += b"".join(fields.values()) + b"".join(tensors)
    return head + b"\0" * (-len(head) % 32 + data)


def with_fields(**changes: bytes | None) -> dict[str, bytes]:
    merged = FIELDS | {key.replace("_", " "): value for key, value in changes.items() if value is not None}
    return {key: value for key, value in merged.items() if changes.get(key.replace(" ", "_"), b"") is not None}


def parse(content: bytes) -> GGUFHeader:
    return parse_header(io.BytesIO(content), len(content))


def test_a_sound_header_says_what_the_model_is() -> None:
    assert parse(build()) == GGUFHeader(
        architecture="llama",
        name="",
        licence="",
        context_length=2048,
        quantisation="F32",
        tokenizer="gpt2",
        vocabulary_size=2,
        chat_template="{{ messages }}",
        tensor_count=1,
        kv_bytes_per_token=2 * 2 * (16 + 16) * 2,
    )


def test_the_tiny_model_is_sound(tiny: TinyModel) -> None:
    header = read_header(tiny.path)
    assert (header.architecture, header.context_length, header.quantisation) == ("llama", 512, "F32")
    assert header.vocabulary_size == 320


def test_quantised_kv_cells_take_what_their_blocks_do() -> None:
    header = parse(build())
    cell = header.kv_bytes_per_token
    assert header.kv_bytes(10, "f16") == 10 * cell
    assert header.kv_bytes(10, "q8_0") == 10 * cell * 34 // 64
    assert header.kv_bytes(10, "q4_0") == 10 * cell * 18 // 64


def test_an_encoder_and_a_decoder_that_says_how_it_pools_are_for_embeddings(tmp_path: Path) -> None:
    header = read_header(write_tiny_bert(tmp_path / "bert.gguf", pooling=None))
    assert (header.architecture, header.tokenizer, header.embeds) == ("bert", "bert", True)
    assert not parse(build()).embeds
    for pooling, embeds in ((0, False), (1, True), (2, True), (3, True)):
        assert parse(build(with_fields(pooling=number("llama.pooling_type", pooling)))).embeds is embeds


@pytest.mark.parametrize("pooling", [4, 5])
def test_a_reranker_is_refused_by_name(pooling: int) -> None:
    with pytest.raises(ModelFileError, match=f"reranker.*pooling type {pooling}"):
        parse(build(with_fields(pooling=number("llama.pooling_type", pooling))))


def test_a_word_piece_vocabulary_without_its_end_tokens_is_refused(tmp_path: Path) -> None:
    path = write_tiny_bert(tmp_path / "bert.gguf")
    for key in (b"tokenizer.ggml.bos_token_id", b"tokenizer.ggml.seperator_token_id"):
        content = path.read_bytes()
        hidden = content.replace(key, key[:-1] + b"x")  # 101 and 102 are in this vocabulary of 125
        assert parse(hidden).embeds
        at = content.index(key) + len(key) + 4
        assert content[at] in (2, 3)
        with pytest.raises(ModelFileError, match="token_id is 125"):
            parse(content[:at] + bytes([125]) + content[at + 1 :])


@pytest.mark.parametrize("version", [2, 3])
def test_versions_two_and_three_are_read(version: int) -> None:
    assert parse(build(version=version)).architecture == "llama"


def test_a_model_without_chat_template_or_heads_is_sound() -> None:
    header = parse(build(with_fields(template=None, heads=None, kv_heads=None)))
    assert header.chat_template is None
    assert header.kv_bytes_per_token == 0


def test_the_declared_quantisation_counts_and_else_that_of_most_weights() -> None:
    mixed = [tensor("a", (256,), 12), tensor("b", (4,), 0, 160)]
    assert parse(build(with_fields(file=number("general.file_type", 15)), mixed, data=176)).quantisation == "Q4_K_M"
    assert (
        parse(build(with_fields(file=number("general.file_type", 1024 + 15)), mixed, data=176)).quantisation == "Q4_K_M"
    )
    assert parse(build(with_fields(file=number("general.file_type", 999)), mixed, data=176)).quantisation == "Q4_K"
    assert parse(build(FIELDS, mixed, data=176)).quantisation == "Q4_K"


REFUSED: dict[str, tuple[bytes, str]] = {
    "empty file": (b"", "0 bytes long"),
    "three bytes": (b"GGU", "3 bytes long"),
    "wrong magic": (build(magic=b"GGUX"), "begins with b'GGUX'"),
    "zip archive": (b"PK\x03\x04" + b"\0" * 100, "ZIP archive"),
    "web page": (b"<!DOCTYPE html><title>Log in</title>", "web page"),
    "pointer of Git LFS": (b"version https://git-lfs.github.com/spec/v1\n", "Git LFS"),
    "old format": (b"tjgg" + b"\0" * 100, "before GGUF"),
    "big-endian by magic": (build(magic=b"FUGG"), "big-endian"),
    "big-endian by version": (b"GGUF" + struct.pack(">IQQ", 3, 1, 9), "big-endian"),
    "version 0": (build(version=0), "version 0"),
    "version 1": (build(version=1), "version 1"),
    "version 4": (build(version=4), "version 4"),
    "no tensors": (build(tensors=[]), "claims 0 tensors"),
    "too many tensors": (build(counts=(2**63, 9)), "tensors"),
    "too many keys": (build(counts=(1, 2**63)), "keys"),
    "more keys than there are": (build(counts=(1, 500)), "damaged"),
    "empty key": (build(with_fields(x=field("", UINT32, b"\0" * 4))), "is empty"),
    "key twice": (build(with_fields(x=FIELDS["context"])), "is there twice"),
    "key not UTF-8": (build(with_fields(x=field(b"\xff\xfe", UINT32, b"\0" * 4))), "not valid UTF-8"),
    "key too long": (build(with_fields(x=number("k" * 513, 1))), "513 bytes"),
    "key of 2^64 bytes": (build(with_fields(x=struct.pack("<Q", 2**64 - 1))), "allowed"),
    "text of 2^63 bytes": (
        build(with_fields(x=field("general.description", STRING, struct.pack("<Q", 2**63)))),
        "and the file ends",
    ),
    "kept text over the limit": (
        build(with_fields(x=field("general.name", STRING, text("n" * (gguf_values.MAX_STRING_BYTES + 1))))),
        "1,048,577 bytes",
    ),
    "kept text not UTF-8": (build(with_fields(x=field("general.name", STRING, text(b"\xff")))), "not valid UTF-8"),
    "unknown value type": (build(with_fields(x=field("k", 13, b"\0" * 8))), "unknown type 13"),
    "unknown array type": (build(with_fields(x=field("k", ARRAY, struct.pack("<IQ", 77, 1)))), "type 77"),
    "array of arrays": (build(with_fields(x=field("k", ARRAY, struct.pack("<IQ", ARRAY, 1) * 2))), "type 9"),
    "array of 2^62 numbers": (build(with_fields(x=field("k", ARRAY, struct.pack("<IQ", UINT64, 2**62)))), "damaged"),
    "array of 2^61 texts": (build(with_fields(x=field("k", ARRAY, struct.pack("<IQ", STRING, 2**61)))), "damaged"),
    "text in an array past the end": (
        build(with_fields(x=field("k", ARRAY, struct.pack("<IQQ", STRING, 1, 2**40)))),
        "damaged",
    ),
    "no architecture": (build(with_fields(architecture=None)), "general.architecture is missing"),
    "architecture a number": (build(with_fields(architecture=number("general.architecture", 1))), "architecture is 1"),
    "architecture a path": (
        build(with_fields(architecture=field("general.architecture", STRING, text("../llama")))),
        "'../llama'",
    ),
    "no context length": (build(with_fields(context=None)), "llama.context_length is missing"),
    "context length 0": (build(with_fields(context=number("llama.context_length", 0))), "is 0"),
    "context length a truth value": (
        build(with_fields(context=field("llama.context_length", 7, b"\1"))),
        "context_length is True",
    ),
    "context length a text": (
        build(with_fields(context=field("llama.context_length", STRING, text("8192")))),
        "context_length",
    ),
    "no layers": (build(with_fields(blocks=None)), "block_count is missing"),
    "more layers than llama.cpp has room for": (build(with_fields(blocks=number("llama.block_count", 513))), "is 513"),
    "no width": (build(with_fields(width=None)), "embedding_length is missing"),
    "no tokenizer": (build(with_fields(tokenizer=None)), "tokenizer.ggml.model is missing"),
    "no tokens": (build(with_fields(tokens=None)), "no vocabulary"),
    "empty vocabulary": (build(with_fields(tokens=words("tokenizer.ggml.tokens", []))), "no vocabulary"),
    "tokens not an array": (build(with_fields(tokens=number("tokenizer.ggml.tokens", 2))), "no vocabulary"),
    "fewer scores than tokens": (
        build(with_fields(x=field("tokenizer.ggml.scores", ARRAY, struct.pack("<IQf", 6, 1, 0.0)))),
        "one number for each",
    ),
    "token types as texts": (
        build(with_fields(x=words("tokenizer.ggml.token_type", ["a", "b"]))),
        "one number for each",
    ),
    "template a number": (build(with_fields(template=number("tokenizer.chat_template", 1))), "is no text"),
    "template too large": (
        build(with_fields(template=field("tokenizer.chat_template", STRING, text("x" * 65_537)))),
        "65,537 bytes",
    ),
    "adapter": (build(with_fields(x=field("general.type", STRING, text("adapter")))), "'adapter'"),
    "split model": (build(with_fields(x=field("split.count", 2, struct.pack("<H", 3)))), "one of the 3 parts"),
    "alignment 0": (build(with_fields(x=number("general.alignment", 0))), "alignment is 0"),
    "alignment 48": (build(with_fields(x=number("general.alignment", 48))), "no power of two"),
    "alignment 2^31": (build(with_fields(x=number("general.alignment", 2**31))), "alignment"),
    "tensor twice": (build(tensors=[tensor("a"), tensor("a", offset=32)], data=64), "'a' is there twice"),
    "tensor name of 64 bytes": (build(tensors=[tensor("n" * 64)]), "64 bytes"),
    "five dimensions": (build(tensors=[tensor(shape=(1,) * 5)]), "5 dimensions"),
    "2^32 dimensions": (build(tensors=[text("w") + struct.pack("<I", 2**32 - 1)]), "dimensions"),
    "dimension 0": (build(tensors=[tensor(shape=(4, 0))]), "shape [4, 0]"),
    "elements over 2^63": (build(tensors=[tensor(shape=(2**32, 2**32))]), "shape"),
    "dimension -1": (build(tensors=[tensor(shape=(2**64 - 1,))]), "shape"),
    "removed tensor type": (build(tensors=[tensor(kind=4)]), "type 4"),
    "unknown tensor type": (build(tensors=[tensor(kind=2**31)]), "does not know"),
    "row cut through a block": (build(tensors=[tensor(shape=(33,), kind=2)]), "no multiple of Q4_0's 32"),
    "tensor past the end": (build(tensors=[tensor(shape=(5,))]), "and the file ends"),
    "one byte short": (build()[:-1], "and the file ends"),
    "tensors over each other": (build(tensors=[tensor("a"), tensor("b", offset=0)]), "instead of 32"),
    "tensor before the data": (build(tensors=[tensor(offset=2**64 - 32)]), "instead of 0"),
    "hole between tensors": (build(tensors=[tensor("a"), tensor("b", offset=64)], data=96), "instead of 32"),
}


@pytest.mark.parametrize(("content", "reason"), REFUSED.values(), ids=REFUSED.keys())
def test_an_unsound_file_is_refused_with_the_reason(content: bytes, reason: str) -> None:
    with pytest.raises(ModelFileError, match=re.escape(reason)):
        parse(content)


def test_a_header_larger_than_the_limit_is_refused_without_reading_it(tmp_path: Path) -> None:
    content = build(with_fields(x=field("k", ARRAY, struct.pack("<IQ", 0, 2**30))))
    path = tmp_path / "sparse.gguf"
    with path.open("wb") as file:
        file.write(content)
        file.truncate(2**31)
    with pytest.raises(ModelFileError, match=r"over 268,435,456 bytes"):
        read_header(path)


def test_a_file_of_endless_empty_texts_is_refused_in_time(tmp_path: Path) -> None:
    path = tmp_path / "sparse.gguf"
    with path.open("wb") as file:
        file.write(build(with_fields(x=field("k", ARRAY, struct.pack("<IQ", STRING, 10_000_000)))))
        file.truncate(2**31)
    with pytest.raises(ModelFileError, match=r"more than the 8,388,608 allowed"):
        read_header(path)


def test_a_vocabulary_of_256_000_tokens_is_read() -> None:
    tokens = words("tokenizer.ggml.tokens", [f"token{index}" for index in range(256_000)])
    merges = words("tokenizer.ggml.merges", [f"to ken{index}" for index in range(256_000)])
    content = build(with_fields(tokens=tokens, merges=merges))
    assert parse(content).vocabulary_size == 256_000


def test_long_texts_beside_the_window_are_skipped_not_kept() -> None:
    long = ["x" * 3_000_000, "y", "z" * 2_500_000]
    content = build(
        with_fields(tokens=words("tokenizer.ggml.tokens", long), x=field("d", STRING, text("d" * 5_000_000)))
    )
    tracemalloc.start()
    try:
        assert parse(content).vocabulary_size == 3
        assert tracemalloc.get_traced_memory()[1] < 8_000_000
    finally:
        tracemalloc.stop()


def test_a_file_that_shrinks_while_it_is_read_is_refused() -> None:
    content = build()
    with pytest.raises(ModelFileError, match="cut off while it was read"):
        parse_header(io.BytesIO(content[:200]), len(content))


def test_what_is_no_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError):
        read_header(tmp_path / "missing.gguf")
    with pytest.raises(InvalidRequestError, match="not a regular file"):
        read_header(tmp_path)
    with pytest.raises(InvalidRequestError, match="not a regular file"):
        read_header(Path("/dev/zero"))


def test_a_link_that_leads_to_itself_is_refused(tmp_path: Path) -> None:
    link = tmp_path / "link.gguf"
    link.symlink_to(link)
    with pytest.raises(InvalidRequestError, match="cannot be read"):
        read_header(link)


def test_a_pipe_does_not_hang_the_reader(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe.gguf"
    os.mkfifo(pipe)
    with pytest.raises(InvalidRequestError, match="not a regular file"):
        read_header(pipe)


def every_number_made_huge(content: bytes) -> Iterator[bytes]:
    for place in range(4, len(content) - 8):
        for huge in (b"\xff" * 8, struct.pack("<Q", 2**40), struct.pack("<Q", 2**63 - 1), b"\0" * 8):
            yield content[:place] + huge + content[place + 8 :]


def test_no_number_in_the_header_however_large_costs_memory_or_another_error() -> None:
    content = build()
    tracemalloc.start()
    try:
        for mutated in every_number_made_huge(content):
            try:
                parse(mutated)
            except ModelFileError:
                continue
        assert tracemalloc.get_traced_memory()[1] < 4_000_000
    finally:
        tracemalloc.stop()


def test_every_truncation_is_refused() -> None:
    content = build()
    for length in range(len(content)):
        with pytest.raises(ModelFileError):
            parse(content[:length])


MUTATIONS = st.lists(
    st.tuples(
        st.sampled_from(["byte", "word", "cut", "insert", "repeat"]),
        st.floats(0, 1, exclude_max=True),
        st.binary(min_size=1, max_size=9),
    ),
    min_size=1,
    max_size=6,
)


def mutate(content: bytes, mutations: list[tuple[str, float, bytes]]) -> bytes:
    for kind, where, raw in mutations:
        place = int(where * len(content))
        if kind == "byte":
            content = content[:place] + raw[:1] + content[place + 1 :]
        elif kind == "word":
            content = content[:place] + raw + content[place + len(raw) :]
        elif kind == "cut":
            content = content[:place] or content
        elif kind == "insert":
            content = content[:place] + raw + content[place:]
        else:
            content = content[:place] + content[place : place + 64] * 3 + content[place + 64 :]
    return content


@settings(max_examples=300, deadline=None)
@given(MUTATIONS)
def test_a_mutated_file_is_read_or_refused_and_nothing_else(mutations: list[tuple[str, float, bytes]]) -> None:
    content = mutate(build(), mutations)
    try:
        header = parse(content)
    except ModelFileError:
        return
    assert 1 <= header.context_length <= gguf_header.MAX_CONTEXT_LENGTH
    assert header.tensor_count >= 1


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=400))
@example(b"GGUF\x03\0\0\0" + b"\xff" * 16)
def test_random_bytes_after_a_right_start_are_refused(tail: bytes) -> None:
    with pytest.raises(ModelFileError):
        parse(b"GGUF" + struct.pack("<IQQ", 3, 1, 2) + tail)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(mutations=MUTATIONS)
def test_a_mutated_file_on_disk_raises_only_our_errors(
    tmp_path: Path, tiny: TinyModel, mutations: list[tuple[str, float, bytes]]
) -> None:
    path = tmp_path / "mutated.gguf"
    header_end = 16_384  # of the tiny model's 130 kB, so that mutations hit the header
    path.write_bytes(mutate(tiny.content[:header_end], mutations) + tiny.content[header_end:])
    with suppress(ModelFileError):
        read_header(path)


SCALARS: dict[str, tuple[Callable[[gguf.GGUFWriter, str, Any], None], st.SearchStrategy[Any]]] = {
    "uint8": (lambda writer, key, value: writer.add_uint8(key, value), st.integers(0, 255)),
    "int16": (lambda writer, key, value: writer.add_int16(key, value), st.integers(-(2**15), 2**15 - 1)),
    "uint32": (lambda writer, key, value: writer.add_uint32(key, value), st.integers(0, 2**32 - 1)),
    "int64": (lambda writer, key, value: writer.add_int64(key, value), st.integers(-(2**63), 2**63 - 1)),
    "float64": (lambda writer, key, value: writer.add_float64(key, value), st.floats(allow_nan=False)),
    "bool": (lambda writer, key, value: writer.add_bool(key, value), st.booleans()),
    "string": (lambda writer, key, value: writer.add_string(key, value), st.text(max_size=300)),
    "texts": (
        lambda writer, key, value: writer.add_array(key, value),
        st.lists(st.text(min_size=1, max_size=20), min_size=1, max_size=30),
    ),
    "numbers": (
        lambda writer, key, value: writer.add_array(key, value),
        st.lists(st.integers(0, 2**31 - 1), min_size=1, max_size=30),
    ),
}

QUANTISED = [
    kind
    for kind, sizes in gguf.GGML_QUANT_SIZES.items()
    if sizes == TENSOR_TYPES[int(kind)][1:]  # the package has a Q8_1 of 40 bytes; ggml's is 36 since its scales are f16
]


@st.composite
def metadata(draw: st.DrawFn) -> dict[str, Any]:
    kinds = draw(st.lists(st.sampled_from(sorted(SCALARS)), max_size=8))
    return {
        "architecture": draw(st.sampled_from(["llama", "qwen2", "gpt-oss", "nemotron_h"])),
        "context": draw(st.integers(1, gguf_header.MAX_CONTEXT_LENGTH)),
        "file_type": draw(st.sampled_from(sorted(FILE_TYPES))),
        "tokens": draw(st.lists(st.text(min_size=1, max_size=12), min_size=1, max_size=40)),
        "template": draw(st.none() | st.text(min_size=1, max_size=2000)),
        "alignment": draw(st.sampled_from([8, 32, 64, 4096])),
        "others": {f"some.{index}.{kind}": (kind, draw(SCALARS[kind][1])) for index, kind in enumerate(kinds)},
        "tensors": draw(st.lists(st.tuples(st.sampled_from(QUANTISED), st.integers(1, 3)), min_size=1, max_size=5)),
    }


@settings(max_examples=80, deadline=None)
@given(metadata())
def test_what_the_gguf_package_writes_is_read_as_its_own_reader_reads_it(wanted: dict[str, Any]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "written.gguf"
        _write(path, wanted)
        header = read_header(path)
        reader = gguf.GGUFReader(path)
    architecture = reader.fields["general.architecture"].contents()
    template = reader.fields.get("tokenizer.chat_template")
    assert header.architecture == architecture == wanted["architecture"]
    assert header.context_length == reader.fields[f"{architecture}.context_length"].contents() == wanted["context"]
    assert header.vocabulary_size == len(reader.fields["tokenizer.ggml.tokens"].data) == len(wanted["tokens"])
    assert header.chat_template == (template.contents() if template else None) == wanted["template"]
    assert header.tensor_count == len(reader.tensors) == len(wanted["tensors"])
    assert header.quantisation == FILE_TYPES[reader.fields["general.file_type"].contents()]


def _write(path: Path, wanted: dict[str, Any]) -> None:
    writer = gguf.GGUFWriter(path, wanted["architecture"])
    writer.add_custom_alignment(wanted["alignment"])
    writer.add_context_length(wanted["context"])
    writer.add_embedding_length(64)
    writer.add_block_count(1)
    writer.add_head_count(4)
    writer.add_file_type(wanted["file_type"])
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(wanted["tokens"])
    if wanted["template"] is not None:
        writer.add_chat_template(wanted["template"])
    for key, (kind, value) in wanted["others"].items():
        SCALARS[kind][0](writer, key, value)
    for index, (kind, rows) in enumerate(wanted["tensors"]):
        row_bytes = TENSOR_TYPES[int(kind)].block_bytes
        writer.add_tensor(f"tensor.{index}", np.zeros((rows, row_bytes), np.uint8), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_our_table_of_types_is_that_of_the_llama_cpp_we_load() -> None:
    package = importlib.util.find_spec("llama_cpp")
    assert package is not None
    assert package.origin is not None
    ggml = ctypes.CDLL(str(Path(package.origin).parent / "lib" / "libggml-base.so"))
    ggml.ggml_type_size.restype = ctypes.c_size_t
    ggml.ggml_blck_size.restype = ctypes.c_int64
    ggml.ggml_type_name.restype = ctypes.c_char_p
    native = {
        number: (ggml.ggml_type_name(number).decode().upper(), ggml.ggml_blck_size(number), ggml.ggml_type_size(number))
        for number in range(43)
        if ggml.ggml_blck_size(number)  # 0 where a type was removed
    }
    assert {number: (kind.name.upper(), *kind[1:]) for number, kind in TENSOR_TYPES.items()} == native


def test_our_names_of_file_types_are_those_of_the_gguf_package() -> None:
    names = {
        int(kind): kind.name.removeprefix("MOSTLY_").removeprefix("ALL_")
        for kind in gguf.LlamaFileType
        if kind is not gguf.LlamaFileType.GUESSED
    }
    assert {number: name for number, name in FILE_TYPES.items() if number in names} == names
