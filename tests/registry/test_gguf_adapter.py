"""Adapters are checked against their base before native code sees them; each refusal gives its figures."""

from __future__ import annotations

import io
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from appliance.core.errors import ModelFileError
from appliance.registry.gguf_adapter import AdapterHeader, parse_adapter, read_adapter
from appliance.registry.gguf_header import GGUFContents, parse_contents, read_header
from tests.tiny_gguf import Architecture, Weights, write_tiny_llama, write_tiny_lora

Change = Callable[[dict[str, Weights]], object]
A, B = "blk.0.attn_q.weight.lora_a", "blk.0.attn_q.weight.lora_b"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_llama(tmp_path_factory.mktemp("base") / "base.gguf")


@pytest.fixture(scope="module")
def contents(base: Path) -> GGUFContents:
    with base.open("rb") as file:
        return parse_contents(file, base.stat().st_size)


Fields = list[tuple[str, Any, gguf.GGUFValueType]]
TEXT, F32, F64, U32 = (
    gguf.GGUFValueType.STRING,
    gguf.GGUFValueType.FLOAT32,
    gguf.GGUFValueType.FLOAT64,
    gguf.GGUFValueType.UINT32,
)
LORA: Fields = [("general.type", "adapter", TEXT), ("adapter.type", "lora", TEXT)]


def write_adapter(path: Path, fields: Fields, tensors: dict[str, Any] | None = None, kind: Any = None) -> Path:
    """Write an adapter with the given keys and one sound pair, or the given tensors."""
    writer = gguf.GGUFWriter(path, "llama")
    for key, value, value_type in fields:
        writer.add_key_value(key, value, value_type)
    for name, weights in (tensors or {A: np.ones((2, 32), np.float32), B: np.ones((32, 2), np.float32)}).items():
        writer.add_tensor(name, weights, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_a_sound_adapter_says_what_it_is(base: Path, tmp_path: Path) -> None:
    path = write_tiny_lora(tmp_path / "lora.gguf", base, rank=4, alpha=8.0)
    assert read_adapter(path, base) == AdapterHeader("llama", "", "", "F32", alpha=8.0, rank=4, matrices=6)


@pytest.mark.parametrize("kind", ["f32", "f16", "q8_0"])
def test_the_types_that_adapters_are_converted_to_are_taken(base: Path, tmp_path: Path, kind: Any) -> None:
    path = write_tiny_lora(tmp_path / "lora.gguf", base, rank=32, quantisation=kind)
    assert read_adapter(path, base).rank == 32


@pytest.mark.parametrize("architecture", ["gemma2", "mamba"])
def test_other_architectures_have_adapters_too(tmp_path: Path, architecture: Architecture) -> None:
    base = write_tiny_llama(tmp_path / "base.gguf", architecture=architecture)
    assert read_adapter(write_tiny_lora(tmp_path / "lora.gguf", base), base).architecture == architecture


def test_embeddings_are_taken_where_they_are_only_looked_up(base: Path, tmp_path: Path) -> None:
    path = write_tiny_lora(tmp_path / "lora.gguf", base, matrices=["token_embd", "output"])
    assert read_adapter(path, base).matrices == 2


def test_embeddings_that_are_the_output_too_would_end_the_process_and_are_refused(tmp_path: Path) -> None:
    tied = write_tiny_llama(tmp_path / "tied.gguf", architecture="gemma2")
    path = write_tiny_lora(tmp_path / "lora.gguf", tied, matrices=["token_embd"])
    with pytest.raises(ModelFileError, match="is the output matrix too"):
        read_adapter(path, tied)


def replace_one(name: str, weights: Weights) -> Change:
    return lambda tensors: tensors.__setitem__(name, weights)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (replace_one(A, np.ones((4, 16), np.float32)), r"\[16, 4\] and \[4, 32\] .* do not fit the base's \[32, 32\]"),
        (replace_one(B, np.ones((64, 4), np.float32)), r"\[32, 4\] and \[4, 64\]"),
        (replace_one(B, np.ones((32, 5), np.float32)), r"\[32, 4\] and \[5, 32\]"),
        (replace_one(A, np.ones((2, 4, 32), np.float32)), r"\[32, 4, 2\]"),
        (replace_one(A, np.ones(32, np.float32)), r"\[32\] and \[4, 32\]"),
        (lambda tensors: tensors.pop(A), f"has no '{A}', one half of a pair"),
        (lambda tensors: tensors.pop(B), f"has no '{B}', one half of a pair"),
        (replace_one("blk.0.attn_norm.weight", np.ones(32, np.float32)), "'blk.0.attn_norm.weight' is neither"),
        (replace_one("blk.9.attn_q.weight.lora_a", np.ones((4, 32), np.float32)), "'blk.9.attn_q.weight.lora_b'"),
        (replace_one("x.lora_b.lora_a", np.ones((4, 32), np.float32)), "is neither"),
        (replace_one("lora_a", np.ones((4, 32), np.float32)), "is neither"),
        (replace_one(A, np.full((4, 32), np.nan, np.float32)), "infinities or what is not a number"),
        (replace_one(B, np.full((32, 4), np.inf, np.float32)), "infinities or what is not a number"),
        (replace_one(A, np.ones((4, 32), np.int32)), "of the type I32; F32, F16, BF16, Q8_0 can be applied"),
    ],
)
def test_what_does_not_fit_is_refused_with_figures(base: Path, tmp_path: Path, change: Change, told: str) -> None:
    path = write_tiny_lora(tmp_path / "lora.gguf", base, change=change)
    with pytest.raises(ModelFileError, match=told):
        read_adapter(path, base)


def test_a_pair_for_a_matrix_that_the_base_has_not_is_refused(base: Path, tmp_path: Path) -> None:
    larger = write_tiny_llama(tmp_path / "larger.gguf", layers=3)
    path = write_tiny_lora(tmp_path / "lora.gguf", larger)
    with pytest.raises(ModelFileError, match=r"'blk\.2\.attn_q\.weight', and its base has no such tensor"):
        read_adapter(path, base)


def test_a_wider_model_is_not_the_base(base: Path, tmp_path: Path) -> None:
    wider = write_tiny_llama(tmp_path / "wider.gguf", embedding=64)
    path = write_tiny_lora(tmp_path / "lora.gguf", wider)
    with pytest.raises(ModelFileError, match=r"\[64, 4\] and \[4, 64\] .* base's \[32, 32\]"):
        read_adapter(path, base)


def test_a_tensor_that_the_engine_would_ignore_is_refused(tmp_path: Path) -> None:
    mamba = write_tiny_llama(tmp_path / "mamba.gguf", architecture="mamba")
    path = write_tiny_lora(tmp_path / "lora.gguf", mamba, matrices=["ssm_conv1d"])
    with pytest.raises(ModelFileError, match=r"ssm_conv1d\.weight' \[4, 64\], to which the engine cannot apply it"):
        read_adapter(path, mamba)


def test_a_rank_beyond_the_matrix_itself_is_refused(base: Path, tmp_path: Path) -> None:
    path = write_tiny_lora(tmp_path / "lora.gguf", base, rank=4096, matrices=["attn_q"])
    with pytest.raises(ModelFileError, match="is 4,096; the matrix itself has only 32"):
        read_adapter(path, base)


def test_an_infinity_in_half_precision_is_found(base: Path, tmp_path: Path) -> None:
    change = replace_one(A, np.full((4, 32), 1e38, np.float32))  # too large for 16 bits
    with np.errstate(over="ignore"):
        path = write_tiny_lora(tmp_path / "lora.gguf", base, quantisation="f16", change=change)
    with pytest.raises(ModelFileError, match="infinities"):
        read_adapter(path, base)


def test_an_infinity_in_brain_floats_is_found(base: Path, tmp_path: Path) -> None:
    def write(path: Path, bits: int) -> Path:
        tensors = {name: np.full(shape, bits, np.uint16).view(np.uint8) for name, shape in ((A, (4, 32)), (B, (32, 4)))}
        return write_adapter(path, LORA, tensors, gguf.GGMLQuantizationType.BF16)

    assert read_adapter(write(tmp_path / "one.gguf", 0x3F80), base).quantisation == "BF16"
    with pytest.raises(ModelFileError, match="infinities"):
        read_adapter(write(tmp_path / "infinite.gguf", 0x7F80), base)


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ([], "holds a 'model', not an adapter"),
        ([("general.type", "mmproj", TEXT)], "holds a 'mmproj', not an adapter"),
        (LORA[:1], "of the type ''; only 'lora'"),
        ([*LORA[:1], ("adapter.type", "control_vector", TEXT)], "type 'control_vector'"),
        ([*LORA[:1], ("adapter.type", 7, U32)], "of the type ''; only 'lora'"),
        ([*LORA, ("adapter.lora.alpha", 1.0, F64)], "of the type 12; it must be a finite"),
        ([*LORA, ("adapter.lora.alpha", 1, U32)], "alpha is 1 of the type 4"),
        ([*LORA, ("adapter.lora.alpha", "1", TEXT)], "of the type 8"),
        ([*LORA, ("adapter.lora.alpha", float("nan"), F32)], "alpha is nan"),
        ([*LORA, ("adapter.alora.invocation_tokens", [1, 2], gguf.GGUFValueType.ARRAY)], "activated LoRA"),
    ],
)
def test_a_header_on_which_native_code_would_end_the_process_is_refused(
    base: Path, tmp_path: Path, fields: Fields, told: str
) -> None:
    with pytest.raises(ModelFileError, match=told):
        read_adapter(write_adapter(tmp_path / "bad.gguf", fields), base)


def test_without_alpha_the_scale_is_one_as_in_native_code(base: Path, tmp_path: Path) -> None:
    assert read_adapter(write_adapter(tmp_path / "plain.gguf", LORA), base).alpha == 0.0


def test_another_architecture_is_refused_by_name(base: Path, tmp_path: Path) -> None:
    path = write_tiny_lora(tmp_path / "lora.gguf", base, architecture="qwen3")
    with pytest.raises(ModelFileError, match="architecture 'qwen3', and its base is a 'llama'"):
        read_adapter(path, base)


def test_an_adapter_is_no_model_and_the_refusal_says_how_it_comes_in(base: Path, tmp_path: Path) -> None:
    path = write_tiny_lora(tmp_path / "lora.gguf", base)
    with pytest.raises(ModelFileError, match="'adapter'") as refused:
        read_header(path)
    assert "--base" in refused.value.advice


def test_a_file_cut_off_while_it_is_read_is_refused(base: Path, contents: GGUFContents, tmp_path: Path) -> None:
    data = write_tiny_lora(tmp_path / "lora.gguf", base).read_bytes()
    with pytest.raises(ModelFileError, match="cut off while it was read"):
        parse_adapter(io.BytesIO(data[:-100]), len(data), contents)


@pytest.fixture(scope="module")
def sound(base: Path, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("sound") / "lora.gguf"
    return write_tiny_lora(path, base, rank=1, matrices=["attn_q"]).read_bytes()


@given(data=st.data())
@settings(max_examples=300, deadline=None)
def test_any_altered_adapter_is_taken_or_refused_and_nothing_else(
    sound: bytes, contents: GGUFContents, data: st.DataObject
) -> None:
    altered = bytearray(sound)
    for _ in range(data.draw(st.integers(1, 4))):
        altered[data.draw(st.integers(0, len(sound) - 1))] = data.draw(st.integers(0, 255))
    cut = data.draw(st.integers(0, len(sound)) | st.just(len(sound)))
    with suppress(ModelFileError):
        parse_adapter(io.BytesIO(altered[:cut]), cut, contents)
