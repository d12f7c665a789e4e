"""Adapters in the engine: right beside any other, taking turns, loaded and dropped while others stream."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from appliance.core.errors import EngineError, ModelFileError
from appliance.core.types import SamplingParams, Usage
from appliance.engine.llama import lora
from appliance.engine.llama.generation import LlamaGeneration
from appliance.engine.llama.lora import Adapter
from tests.engine.conftest import Answer, EngineUnderTest, collect, running
from tests.engine.test_engine import close_to
from tests.tiny_gguf import Architecture, write_merged, write_tiny_llama, write_tiny_lora

pytestmark = pytest.mark.anyio

TEXT = "the quick brown fox jumps over the lazy dog and then the dog thinks about it"


class Bench(EngineUnderTest):
    """An engine with adapters by name."""

    def __init__(self, subject: EngineUnderTest, base: Path) -> None:
        super().__init__(subject.engine, subject.metrics)
        self.base = base

    async def load(self, name: str, path: Path | None = None, **how: float) -> Adapter:
        if path is None:
            path = write_tiny_lora(self.base.with_name(f"{name}.gguf"), self.base, **how)  # type: ignore[arg-type]
        digest = hashlib.sha256(path.read_bytes() if path.exists() else b"").hexdigest()
        adapter = Adapter(digest, f"tiny:1:{name}", path, self.metrics.for_model(f"tiny:1:{name}"))
        await self.engine.load_adapter(adapter)
        return adapter

    async def start(
        self, adapter: Adapter | None, text: str = TEXT, tokens: int = 24, **more: object
    ) -> LlamaGeneration:
        sampling = SamplingParams(temperature=0, max_tokens=tokens, top_logprobs=2, ignore_eos=True)
        return self.engine.submit(await self.tokens(text), sampling, adapter=adapter, **more)  # type: ignore[arg-type]

    async def answer(self, adapter: Adapter | None, text: str = TEXT, tokens: int = 24) -> tuple[Answer, Usage]:
        generation = await self.start(adapter, text, tokens)
        return (await collect(generation))[0], generation.usage


@asynccontextmanager
async def bench(base: Path, **changes: float) -> AsyncIterator[Bench]:
    async with running(base, **changes) as subject:
        each = Bench(subject, base)
        yield each
        if not each.engine.ended.done():
            await each.until(lambda: each.engine._worker.runner.scheduler.idle)
            each.engine._worker.runner.scheduler.check_integrity()


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return write_tiny_llama(tmp_path / "base.gguf")


@pytest.mark.parametrize("architecture", ["llama", "gemma2", "mamba"])
async def test_an_adapter_answers_as_the_model_it_is_merged_into(tmp_path: Path, architecture: Architecture) -> None:
    base = write_tiny_llama(tmp_path / "base.gguf", architecture=architecture)
    path = write_tiny_lora(tmp_path / "lora.gguf", base, seed=5)
    async with bench(base) as subject:
        adapter = await subject.load("one", path)
        plain, _ = await subject.answer(None)
        adapted, _ = await subject.answer(adapter)
    async with bench(write_merged(tmp_path / "merged.gguf", base, path)) as merged:
        expected, _ = await merged.answer(None)
    assert close_to(adapted, expected)
    assert not close_to(adapted, plain)
    assert adapted.logprobs[0] == pytest.approx(expected.logprobs[0], abs=0.002)
    assert adapted.logprobs[0] != pytest.approx(plain.logprobs[0], abs=0.05)


@pytest.mark.parametrize("matrices", [["token_embd"], ["output"], ["attn_k", "attn_output", "ffn_gate", "ffn_up"]])
async def test_every_kind_of_matrix_is_applied(tmp_path: Path, base: Path, matrices: list[str]) -> None:
    path = write_tiny_lora(tmp_path / "lora.gguf", base, matrices=matrices, rank=3, alpha=5.0)
    async with bench(base) as subject:
        adapted, _ = await subject.answer(await subject.load("one", path))
        plain, _ = await subject.answer(None)
    async with bench(write_merged(tmp_path / "merged.gguf", base, path)) as merged:
        expected, _ = await merged.answer(None)
    assert close_to(adapted, expected)
    assert not close_to(adapted, plain)


async def test_base_and_two_adapters_together_answer_as_each_alone(base: Path) -> None:
    async with bench(base, sequences=6) as subject:
        adapters = [None, await subject.load("one", seed=1), await subject.load("two", seed=2)]
        asked = [(each, text) for each in adapters for text in (TEXT, "why does the dog sleep")]
        alone = [(await subject.answer(*each, 60))[0] for each in asked]
        together = await asyncio.gather(*(subject.answer(*each, 60) for each in asked))
    assert all(close_to(one, other) for one, (other, _) in zip(alone, together, strict=True))
    assert len({each.text for each in alone}) == len(alone)


@pytest.mark.parametrize("latency", [1e-4, 0.5])
async def test_a_stream_of_the_base_is_the_same_beside_an_adapters(base: Path, latency: float) -> None:
    async with bench(base, target_inter_token_latency_s=latency) as subject:
        adapter = await subject.load("one")
        expected, _ = await subject.answer(None, tokens=100)
        beside = await subject.start(adapter, "another text", 350)
        answer, _ = await subject.answer(None, tokens=100)
        taken_turns = beside.usage.completion_tokens > 0 and not beside.ended
        assert taken_turns or latency == 0.5, "in a turn of 0.5 s all of either answer is written"
        beside.cancel()
    assert answer.token_ids == expected.token_ids
    assert close_to(answer, expected)


async def test_what_another_adapter_evaluated_is_never_reused(base: Path) -> None:
    async with bench(base) as subject:
        adapters = [None, await subject.load("one", seed=1), await subject.load("two", seed=2)]
        cold = [await subject.answer(each) for each in adapters]
        warm = [await subject.answer(each) for each in adapters]
        assert [usage.cached_tokens for _, usage in cold] == [0, 0, 0]
        assert all(usage.cached_tokens == usage.prompt_tokens - 1 for _, usage in warm)
    assert all(close_to(one, other) for (one, _), (other, _) in zip(cold, warm, strict=True))


async def test_a_common_prompt_that_arrives_at_once_is_read_once_for_each_adapter(base: Path) -> None:
    async with bench(base, sequences=4) as subject:
        adapter = await subject.load("one")
        started = [await subject.start(each, TEXT * 3, 4) for each in (None, adapter, None, adapter)]
        await asyncio.gather(*(collect(each) for each in started))
        cached = [each.usage.cached_tokens for each in started]
        shared = started[0].usage.prompt_tokens - 1
    assert sorted(cached) == [0, 0, shared, shared]


async def test_everyone_streams_while_others_of_other_adapters_do(base: Path) -> None:
    async with bench(base, sequences=3, target_inter_token_latency_s=1e-4) as subject:
        adapters = [None, await subject.load("one", seed=1), await subject.load("two", seed=2)]
        started = [await subject.start(each, TEXT, 100) for each in adapters]
        await asyncio.gather(*(collect(each) for each in started))
    ends = [each.ended_at or 0.0 for each in started]
    firsts = [each.first_token_at or 0.0 for each in started]
    assert max(firsts) < min(ends), "somebody had to wait for another's end"


async def test_an_adapter_is_loaded_and_dropped_while_others_stream(base: Path) -> None:
    paths = [write_tiny_lora(base.with_name(f"{seed}.gguf"), base, seed=seed) for seed in (2, 3, 4)]
    overlaps = 0
    async with bench(base, sequences=3, target_inter_token_latency_s=1e-4) as subject:
        one = await subject.load("one", seed=1)
        expected = [(await subject.answer(each, tokens=300))[0] for each in (None, one)]
        streams = [asyncio.ensure_future(subject.answer(each, tokens=300)) for each in (None, one)]
        await subject.until(lambda: all(each.first_token_at for each in subject.engine._open))
        for path in paths:
            two = await subject.load("two", path)
            await subject.answer(two, tokens=2)
            await subject.engine.drop_adapter(two.id)
            overlaps += not any(each.done() for each in streams)
        assert overlaps, "the streams ended before anything was loaded"
        answers = [answer for answer, _ in await asyncio.gather(*streams)]
        assert subject.engine.adapters == {one.id}
    assert all(close_to(answer, wanted) for answer, wanted in zip(answers, expected, strict=True))


async def test_an_exchanged_adapter_does_not_answer_from_the_memory_of_the_old_one(base: Path) -> None:
    async with bench(base) as subject:
        old = await subject.load("one", seed=1)
        await subject.answer(old)
        await subject.engine.drop_adapter(old.id)
        with pytest.raises(EngineError, match="tiny:1:one was unloaded"):
            await subject.answer(old)
        new = await subject.load("one", seed=2)
        answer, usage = await subject.answer(new)
        assert usage.cached_tokens == 0
    async with bench(base) as fresh:
        expected, _ = await fresh.answer(await fresh.load("one", seed=2))
    assert close_to(answer, expected)


async def test_a_loaded_adapter_does_not_need_its_file(base: Path, tmp_path: Path) -> None:
    async with bench(base) as subject:
        path = write_tiny_lora(tmp_path / "gone.gguf", base)
        adapter = await subject.load("one", path)
        path.unlink()
        expected, _ = await subject.answer(adapter)
        assert expected.text
        with pytest.raises(ModelFileError, match=r"cannot load the adapter gone\.gguf"):
            await subject.load("two", path)
        assert close_to((await subject.answer(adapter))[0], expected)


async def test_an_adapter_that_overflows_is_refused_at_its_trial_and_nobody_notices(base: Path) -> None:
    async with bench(base) as subject:
        expected, _ = await subject.answer(None, tokens=100)
        stream = asyncio.ensure_future(subject.answer(None, tokens=100))
        with pytest.raises(EngineError, match="not numbers") as refusal:
            await subject.load("huge", gain=1e30)
        assert refusal.value.code == "not_a_number"
        answer, _ = await stream
        assert subject.engine.adapters == frozenset()
    assert answer.token_ids == expected.token_ids


async def test_what_is_not_a_number_under_an_adapter_stays_with_its_own_requests(
    base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lora, "check_adapter", lambda context, adapter: None)
    async with bench(base, sequences=4, target_inter_token_latency_s=1e-4) as subject:
        sound, huge = await subject.load("sound"), await subject.load("huge", gain=1e30)
        expected = [(await subject.answer(each, tokens=100))[0] for each in (None, sound)]
        streams = [asyncio.ensure_future(subject.answer(each, tokens=100)) for each in (None, sound)]
        await subject.until(lambda: all(each.first_token_at for each in subject.engine._open))
        for text in ("short", TEXT * 4):  # the long one fails before it is sampled
            with pytest.raises(EngineError, match="not a number"):
                await subject.answer(huge, text)
        answers = [answer for answer, _ in await asyncio.gather(*streams)]
        again, _ = await subject.answer(None, tokens=100)
    assert all(
        close_to(answer, wanted) for answer, wanted in zip([*answers, again], [*expected, expected[0]], strict=True)
    )


async def test_more_context_than_cells_under_several_adapters_finishes_with_the_same_answers(base: Path) -> None:
    async def all_of(subject: Bench) -> list[Answer]:
        adapters = [None, await subject.load("one", seed=1), await subject.load("two", seed=2)]
        asked = [subject.answer(adapters[number % 3], f"{number} the lazy dog", 120) for number in range(6)]
        return [answer for answer, _ in await asyncio.gather(*asked)]

    async with bench(base) as roomy:
        expected = await all_of(roomy)
    async with bench(base, cells=256, target_inter_token_latency_s=1e-4) as tight:
        answers = await all_of(tight)
        assert tight.engine._worker.runner.scheduler.preemptions > 0
    assert all(close_to(one, other) for one, other in zip(answers, expected, strict=True))


async def test_requests_count_under_the_adapters_name_and_tell_their_end_once(base: Path) -> None:
    ended: list[str] = []
    async with bench(base) as subject:
        adapter = await subject.load("one")
        generation = await subject.start(adapter, tokens=5, on_end=lambda: ended.append("whole"))
        assert generation.model == "tiny:1:one"
        await collect(generation)
        cancelled = await subject.start(adapter, tokens=500, on_end=lambda: ended.append("cancelled"))
        cancelled.cancel()
        cancelled.cancel()
        text = subject.metrics.render().decode()
    assert ended == ["whole", "cancelled"]
    assert 'appliance_generation_tokens_total{model="tiny:1:one"} 5.0' in text
    assert 'appliance_generation_tokens_total{model="tiny:1"} 0.0' in text


async def test_unloading_the_model_ends_requests_under_adapters_and_frees_those(base: Path) -> None:
    async with bench(base) as subject:
        adapter = await subject.load("one")
        generation = await subject.start(adapter, tokens=400)
        await subject.until(lambda: generation.first_token_at is not None)
        await subject.engine.close()
        with pytest.raises(EngineError, match="unloaded"):
            await collect(generation)
        with pytest.raises(EngineError, match="has ended"):
            await subject.load("two", seed=2)


async def test_an_engine_that_is_stopping_answers_who_waits_for_an_adapter(base: Path) -> None:
    async with bench(base) as subject:
        subject.engine._worker.stop()
        with pytest.raises(EngineError, match="unloaded"):
            await subject.load("one")
        await subject.engine.close()


async def test_a_conversation_is_parked_and_resumed_under_its_own_adapter(base: Path) -> None:
    async with bench(base, sequences=1, cells=128, parking_ram_bytes=2**24) as subject:
        adapters = [None, await subject.load("one", seed=1)]
        cold = [await subject.answer(each, tokens=8) for each in adapters]
        warm = [await subject.answer(each, tokens=8) for each in adapters]
        assert [usage.cached_tokens > 0 for _, usage in cold + warm] == [False, False, True, True]
    assert all(close_to(one, other) for (one, _), (other, _) in zip(cold, warm, strict=True))


async def test_an_adapter_in_use_is_not_dropped_and_its_stream_goes_on(base: Path) -> None:
    async with bench(base) as subject:
        one = await subject.load("one")
        expected, _ = await subject.answer(one, tokens=60)
        stream = asyncio.ensure_future(subject.answer(one, tokens=60))
        await subject.until(lambda: subject.engine.open_requests == 1)
        with pytest.raises(EngineError, match="in use"):
            await subject.engine.drop_adapter(one.id)
        answer, _ = await stream
        assert close_to(answer, expected)
        await subject.engine.drop_adapter(one.id)
        assert subject.engine.adapters == frozenset()


async def test_the_same_file_under_two_names_is_loaded_once(base: Path) -> None:
    async with bench(base) as subject:
        one = await subject.load("one")
        other = await subject.load("other", one.path)
        generations = [await subject.start(each, tokens=4) for each in (one, other)]
        first, second = [(await collect(each))[0] for each in generations]
        assert [each.model for each in generations] == ["tiny:1:one", "tiny:1:other"]
        assert subject.engine.adapters == {one.id}
    assert close_to(first, second)
