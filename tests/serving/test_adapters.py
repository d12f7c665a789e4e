"""Adapters on demand: `base:adapter` loads what is missing, keeps what is used, and drops what is not."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from appliance.core.errors import (
    ConflictError,
    EngineError,
    InvalidRequestError,
    NotFoundError,
    OverloadedError,
    UnavailableError,
)
from appliance.core.types import ChatMessage, EmbeddingRequest, Generation, GenerationRequest, SamplingParams
from appliance.observe.resources import memory
from appliance.registry.install import import_adapter
from appliance.serving import adapters as serving_adapters
from appliance.serving.floor import ServingFloor
from tests.deltas import deltas_of
from tests.serving.conftest import Box, serving, text_of
from tests.tiny_gguf import write_merged, write_tiny_lora

pytestmark = pytest.mark.anyio

GREEDY = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)
ENDLESS = SamplingParams(temperature=0, ignore_eos=True)


def add(box: Box, name: str, *, base: str = "tiny", seed: int = 0, gain: float = 1.0) -> Path:
    model = box.registry.resolve(base)
    path = write_tiny_lora(box.folder / f"{base}-{name}.gguf", model.files[0].path, seed=seed, gain=gain)
    import_adapter(path, box.registry, base=base, name=name, licence="MIT")
    return path


async def ask(floor: ServingFloor, model: str, sampling: SamplingParams = GREEDY) -> Generation:
    return await floor.text.generate(GenerationRequest(model, "the quick brown fox", sampling))


async def answer(floor: ServingFloor, model: str) -> str:
    return await text_of(await ask(floor, model))


async def first_text(generation: Generation) -> None:
    async for delta in deltas_of(generation):
        if delta.text:
            return


async def until_names(floor: ServingFloor, names: set[str]) -> None:
    async with asyncio.timeout(20):
        while floor.models.names != names:  # noqa: ASYNC110  (a state without an event)
            await asyncio.sleep(0.01)


async def test_an_adapter_is_loaded_with_its_base_by_the_first_request_for_it(box: Box, tmp_path: Path) -> None:
    lora = add(box, "legal")
    base = box.registry.resolve("tiny").files[0].path
    box.add_file("merged", write_merged(tmp_path / "merged.gguf", base, lora))
    async with serving(box, max_loaded_models=2) as floor:
        generation = await ask(floor, "tiny:legal")
        assert generation.model == "tiny:1:legal"
        adapted = await text_of(generation)
        assert floor.models.names == {"tiny:1", "tiny:1:legal"}
        assert await answer(floor, "tiny:1:legal") == adapted == await answer(floor, "merged")
        assert await answer(floor, "tiny") != adapted


async def test_chats_with_an_adapter_use_the_template_of_its_base(box: Box) -> None:
    add(box, "legal")
    async with serving(box) as floor:
        request = GenerationRequest("tiny:legal", (ChatMessage("user", "hello"),), GREEDY)
        assert await text_of(await floor.text.generate(request))
        assert (await floor.text.tokenize("tiny:legal", "hello")).tokens


async def test_cards_tell_base_and_adapter_apart_and_what_is_loaded(box: Box) -> None:
    add(box, "legal")
    add(box, "terse", seed=1)
    async with serving(box) as floor:
        await answer(floor, "tiny:legal")
        cards = [(each.version, each.adapter, each.kind, each.loaded) for each in floor.text.cards()]
    assert cards == [("1", "", "gguf", True), ("1", "legal", "lora", True), ("1", "terse", "lora", False)]


async def test_two_requests_at_once_load_an_adapter_once(box: Box) -> None:
    add(box, "legal")
    async with serving(box) as floor:
        first, second = await asyncio.gather(answer(floor, "tiny:legal"), answer(floor, "tiny:1:legal"))
    assert first == second


async def test_several_adapters_and_the_base_answer_at_once_as_alone(box: Box) -> None:
    names = ["tiny", "tiny:legal", "tiny:terse"]
    add(box, "legal")
    add(box, "terse", seed=1)
    async with serving(box) as floor:
        alone = [await answer(floor, name) for name in names]
        assert list(await asyncio.gather(*(answer(floor, name) for name in names))) == alone
    assert len(set(alone)) == 3


async def test_the_idle_adapter_unused_for_longest_makes_room(box: Box) -> None:
    for seed, name in enumerate(["one", "two", "three"]):
        add(box, name, seed=seed)
    async with serving(box, max_loaded_adapters=2) as floor:
        for name in ("one", "two", "one", "three"):
            await answer(floor, f"tiny:{name}")
        assert floor.models.names == {"tiny:1", "tiny:1:one", "tiny:1:three"}


async def test_adapters_in_use_are_kept_and_one_more_is_told_to_come_back(box: Box) -> None:
    add(box, "one")
    add(box, "two", seed=1)
    async with serving(box, max_loaded_adapters=1) as floor:
        expected = await text_of(await ask(floor, "tiny:one", ENDLESS))
        busy = await ask(floor, "tiny:one", ENDLESS)
        with pytest.raises(UnavailableError, match="tiny:1:one are in use") as refusal:
            await ask(floor, "tiny:two")
        assert refusal.value.retry_after_s
        assert floor.models.health().ready
        assert await text_of(busy) == expected
        assert await answer(floor, "tiny:two")
        assert floor.models.names == {"tiny:1", "tiny:1:two"}


async def test_an_adapter_that_streams_is_not_removed_and_the_stream_goes_on(box: Box) -> None:
    add(box, "legal")
    async with serving(box) as floor:
        expected = await text_of(await ask(floor, "tiny:legal", ENDLESS))
        stream = await ask(floor, "tiny:legal", ENDLESS)
        with pytest.raises(ConflictError, match="in use"):
            box.registry.remove("tiny:legal")
        with pytest.raises(ConflictError):
            box.registry.remove("tiny")
        assert await text_of(stream) == expected
        box.registry.remove("tiny:legal")
        with pytest.raises(NotFoundError, match="there are: tiny:1"):
            await ask(floor, "tiny:legal")


async def test_an_idle_adapter_is_removed_while_others_stream_who_notice_nothing(box: Box) -> None:
    add(box, "legal")
    add(box, "terse", seed=1)
    async with serving(box, context_cells=2048) as floor:
        expected = [await text_of(await ask(floor, name, ENDLESS)) for name in ("tiny", "tiny:terse")]
        await answer(floor, "tiny:legal")
        streams = [await ask(floor, name, ENDLESS) for name in ("tiny", "tiny:terse")]
        box.registry.remove("tiny:legal")
        texts = await asyncio.gather(*(text_of(each) for each in streams))
        assert list(texts) == expected
        await until_names(floor, {"tiny:1", "tiny:1:terse"})
        assert floor.models._loaded["tiny:1"].engine.adapters == {box.registry.resolve("tiny:terse").files[0].sha256}


async def test_a_cancelled_request_lets_its_adapter_go(box: Box) -> None:
    add(box, "legal")
    async with serving(box) as floor:
        generation = await ask(floor, "tiny:legal", ENDLESS)
        await first_text(generation)
        generation.cancel()
        box.registry.remove("tiny:legal")


async def test_a_refused_request_lets_its_adapter_go(box: Box) -> None:
    add(box, "legal")
    async with serving(box, max_sequences=1, queue_size=0) as floor:
        busy = await ask(floor, "tiny", ENDLESS)
        with pytest.raises(OverloadedError):
            await ask(floor, "tiny:legal")
        box.registry.remove("tiny:legal")
        assert await text_of(busy)


async def test_an_adapter_idle_for_long_is_dropped_and_loaded_again_when_asked_for(box: Box) -> None:
    add(box, "legal")
    async with serving(box, adapter_idle_s=0.01) as floor:
        first = await answer(floor, "tiny:legal")
        await until_names(floor, {"tiny:1"})
        assert await answer(floor, "tiny:legal") == first


async def test_another_file_under_the_same_name_is_used_at_once(box: Box) -> None:
    add(box, "legal")
    async with serving(box) as floor:
        old = await answer(floor, "tiny:legal")
        box.registry.remove("tiny:legal")
        add(box, "legal", seed=7)
        new = await answer(floor, "tiny:legal")
        assert new != old
        add(box, "same", seed=7)
        assert await answer(floor, "tiny:same") == new
        box.registry.remove("tiny:legal")
        await until_names(floor, {"tiny:1", "tiny:1:same"})
        assert await answer(floor, "tiny:same") == new


async def test_an_adapter_that_overflows_fails_its_own_requests_alone(box: Box) -> None:
    add(box, "huge", gain=1e30)
    async with serving(box) as floor:
        expected = await text_of(await ask(floor, "tiny", ENDLESS))
        stream = await ask(floor, "tiny", ENDLESS)
        with pytest.raises(EngineError, match="not numbers"):
            await ask(floor, "tiny:huge")
        assert await text_of(stream) == expected
        assert floor.models.names == {"tiny:1"}
        assert floor.models.health().ready


async def test_an_adapter_larger_than_the_memory_is_refused_with_both_figures(
    box: Box, monkeypatch: pytest.MonkeyPatch
) -> None:
    add(box, "legal")
    async with serving(box) as floor:
        await answer(floor, "tiny")
        scarce = type(memory())(total=2**20, available=1024)
        monkeypatch.setattr(serving_adapters, "memory", lambda: scarce)
        with pytest.raises(UnavailableError, match=r"tiny:1:legal needs 0\.\d MiB of memory; 0\.0 MiB are free"):
            await ask(floor, "tiny:legal")


async def test_an_adapter_can_be_the_model_of_the_settings(box: Box) -> None:
    add(box, "legal")
    async with serving(box, model="tiny:legal") as floor:
        await until_names(floor, {"tiny:1", "tiny:1:legal"})
        assert floor.models.health().ready


async def test_unloading_the_base_lets_its_adapters_go(box: Box) -> None:
    add(box, "legal")
    box.add("other", seed=1)
    async with serving(box, max_loaded_models=1) as floor:
        await answer(floor, "tiny:legal")
        await answer(floor, "other")
        assert floor.models.names == {"other:1"}
        box.registry.remove("tiny:legal")
        box.registry.remove("tiny")


async def test_two_models_that_push_each_other_out_are_both_answered(box: Box) -> None:
    box.add("other", seed=1)
    add(box, "legal", base="other")
    async with serving(box, max_loaded_models=1) as floor:
        names = ["tiny", "other:legal"] * 2
        answers = await asyncio.gather(*(answer(floor, name) for name in names), return_exceptions=True)
        assert any(isinstance(each, str) for each in answers)
        assert all(isinstance(each, str | UnavailableError) for each in answers), answers


async def test_metrics_count_under_registered_names_only(box: Box) -> None:
    add(box, "legal")
    async with serving(box) as floor:
        for name in ("tiny:legal", "tiny:1:legal", "tiny"):
            await answer(floor, name)
        with pytest.raises(NotFoundError):
            await ask(floor, "tiny:unheard")
        text = floor.metrics.render().decode()
    assert 'appliance_generation_tokens_total{model="tiny:1:legal"} 48.0' in text
    assert 'appliance_generation_tokens_total{model="tiny:1"} 24.0' in text
    assert "unheard" not in text
    assert 'model="tiny:legal"' not in text


async def test_an_adapter_does_not_embed_and_lending_its_base_leaves_it_as_it_is(box: Box) -> None:
    add(box, "legal")
    async with serving(box) as floor:
        expected = await answer(floor, "tiny:legal")
        with pytest.raises(InvalidRequestError, match="tiny:1:legal is an adapter") as refusal:
            await floor.embedding.embed(EmbeddingRequest("tiny:legal", ["hello"]))
        assert "tiny:1" in refusal.value.advice
        plain = await floor.embedding.embed(EmbeddingRequest("tiny", ["hello"]))
        assert await answer(floor, "tiny:legal") == expected
    async with serving(box) as floor:
        assert (await floor.embedding.embed(EmbeddingRequest("tiny", ["hello"]))).vectors == plain.vectors


def test_a_model_for_embeddings_takes_no_adapters(box: Box) -> None:
    box.add_encoder("encoder")
    path = add(box, "legal")
    with pytest.raises(InvalidRequestError, match="encoder:1 is for embeddings"):
        import_adapter(path, box.registry, base="encoder", name="legal")
    assert "encoder:1:legal" not in [each.full_name for each in box.registry.list()]
