"""The types of KV cells: what they take, what they answer, and which combinations are refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from appliance.core.errors import SettingsError
from appliance.core.types import KvCacheType
from appliance.engine.llama.context import LlamaContext
from appliance.engine.llama.model import LlamaModel
from tests.engine.conftest import Answer, running
from tests.tiny_gguf import Architecture, write_tiny_llama

KINDS: tuple[KvCacheType, ...] = ("f16", "q8_0", "q4_0")


def whole_blocks(folder: Path, architecture: Architecture = "llama") -> Path:
    """Return a model whose attention heads are one block of a quantised type long."""
    return write_tiny_llama(folder / f"{architecture}.gguf", embedding=64, architecture=architecture)


def drift(answer: Answer, expected: Answer) -> float:
    """Return by how much the log probabilities of the tokens up to the first that differs differ at most."""
    differences = [0.0]
    for ours, theirs in zip(answer.told, expected.told, strict=True):
        differences.append(abs(ours.logprob - theirs.logprob))
        if ours.token_id != theirs.token_id:
            break
    return max(differences)


@pytest.mark.anyio
async def test_quantised_cells_answer_nearly_as_floats_do(tmp_path: Path) -> None:
    path, answers = whole_blocks(tmp_path), {}
    for kind in KINDS:
        async with running(path, kv_cache_type=kind) as subject:
            answers[kind] = await subject.greedy("the quick brown fox jumps over the lazy dog", 24)
    assert 0 < drift(answers["q8_0"], answers["f16"]) < 0.3
    assert 0 < drift(answers["q4_0"], answers["f16"]) < 3


@pytest.mark.anyio
@pytest.mark.parametrize("kind", ["q8_0", "q4_0"])
@pytest.mark.parametrize("architecture", ["llama", "gemma2"])
async def test_a_reused_past_of_quantised_cells_gives_the_logits_of_a_cold_run(
    tmp_path: Path, kind: KvCacheType, architecture: Architecture
) -> None:
    path = whole_blocks(tmp_path, architecture)
    text = "the quick brown fox jumps over the lazy dog "
    async with running(path, kv_cache_type=kind) as cold:
        expected = await cold.greedy(text + "so what?", 8)
    async with running(path, kv_cache_type=kind) as warm:
        await warm.greedy(text, 8)
        assert drift(await warm.greedy(text + "so what?", 8), expected) < 0.1


@pytest.mark.parametrize("kind", KINDS)
def test_the_state_of_cells_has_the_size_that_the_type_says(tmp_path: Path, kind: KvCacheType) -> None:
    from array import array

    from appliance.engine.llama.step import Run, Sequence
    from appliance.registry.gguf_header import read_header

    path = whole_blocks(tmp_path)
    model = LlamaModel(path, gpu_layers=0)
    context = LlamaContext(model, cells=512, slots=1, batch_tokens=256, threads=1, kv_cache_type=kind)
    try:
        sequence = Sequence(0, array("i", [5] * 256))
        sequence.slot = 0
        assert context.decode([Run(sequence, 0, 256, sample=True)]) == 0
        told, held = read_header(path).kv_bytes(256, kind), context.state_bytes(0)
        assert told <= held < told + 8192
    finally:
        context.close()
        model.close()


def test_heads_that_are_no_whole_blocks_are_refused_with_their_length(tmp_path: Path) -> None:
    model = LlamaModel(write_tiny_llama(tmp_path / "m.gguf"), gpu_layers=0)
    try:
        with pytest.raises(SettingsError, match=r"blocks of 32 numbers; .* have 16 and 16") as refusal:
            LlamaContext(model, cells=512, slots=1, batch_tokens=64, threads=1, kv_cache_type="q8_0")
        assert (refusal.value.param, refusal.value.advice) == (
            "kv_cache_type",
            "Set kv_cache_type to f16 for this model.",
        )
    finally:
        model.close()


def test_quantised_cells_without_flash_attention_are_refused(tmp_path: Path) -> None:
    model = LlamaModel(whole_blocks(tmp_path), gpu_layers=0)
    try:
        with pytest.raises(SettingsError, match="need flash attention"):
            LlamaContext(
                model, cells=512, slots=1, batch_tokens=64, threads=1, kv_cache_type="q4_0", flash_attention="off"
            )
    finally:
        model.close()


@pytest.mark.anyio
async def test_a_model_without_attention_takes_any_type(tmp_path: Path) -> None:
    async with running(write_tiny_llama(tmp_path / "m.gguf", architecture="mamba"), kv_cache_type="q8_0") as subject:
        assert (await subject.greedy("the quick", 4)).text
