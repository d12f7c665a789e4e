"""The engine on real llama.cpp with a tiny model: batching, reuse, pressure, refusals and failures."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from appliance.core.errors import (
    DeadlineExceededError,
    EngineError,
    InvalidRequestError,
    ModelFileError,
    OverloadedError,
)
from appliance.core.types import FinishReason, SamplingParams
from tests.deltas import deltas_of
from tests.engine.conftest import Answer, EngineUnderTest, collect, running
from tests.tiny_gguf import Architecture, write_tiny_llama

pytestmark = pytest.mark.anyio

TEXTS = [
    "the quick brown fox",
    "why does the dog sleep",
    "in one sentence",
    "你好，世界",
    "a b c d e f g h",
    "please answer the question",
]


NOISE = 0.02
"""What a log probability may differ by when a batch is composed otherwise; the cells are 16-bit floats."""


def close_to(answer: Answer, expected: Answer) -> bool:
    """Return whether two greedy answers are the same, up to a choice between tokens of all but equal likelihood."""
    pairs = zip(answer.told, expected.told, strict=True)
    for ours, theirs in pairs:
        if ours.logprob != pytest.approx(theirs.logprob, abs=NOISE):
            return False
        if ours.token_id != theirs.token_id:
            return theirs.top[0][2] - theirs.top[1][2] < NOISE
    return True


async def test_answers_in_a_batch_equal_the_answers_alone(tiny: EngineUnderTest) -> None:
    alone = [await tiny.greedy(text) for text in TEXTS]
    together = await asyncio.gather(*(tiny.greedy(text) for text in TEXTS))
    assert all(close_to(a, b) for a, b in zip(alone, together, strict=True))


@pytest.mark.parametrize("architecture", ["llama", "gemma2", "mamba"])
async def test_a_reused_past_gives_the_logits_of_a_cold_run(tmp_path: Path, architecture: Architecture) -> None:
    path = write_tiny_llama(tmp_path / "m.gguf", architecture=architecture)
    first = "the quick brown fox jumps over the lazy dog and then the dog thinks about it " * 2
    sampling = SamplingParams(temperature=0, max_tokens=8, top_logprobs=2, ignore_eos=True)
    async with running(path) as cold:
        [expected], usage = await cold.ask(first + "so what?", sampling)
        assert usage.cached_tokens == 0
    async with running(path) as warm:
        await warm.ask(first, sampling)
        [answer], usage = await warm.ask(first + "so what?", sampling)
        if architecture != "mamba":  # a recurrent memory that went on generating cannot go back
            assert usage.cached_tokens > 70
        assert close_to(answer, expected)
        [branch], _ = await warm.ask(first[:90] + "so what?", sampling)
    async with running(path) as cold:
        [expected_branch], _ = await cold.ask(first[:90] + "so what?", sampling)
    assert close_to(branch, expected_branch)


async def test_requests_with_one_prompt_at_once_read_it_once_and_answer_alike(tiny: EngineUnderTest) -> None:
    text = "please answer the question in one sentence and say why the answer is the right one " * 3
    generations = [
        tiny.engine.submit(await tiny.tokens(text + tail), SamplingParams(temperature=0, max_tokens=6))
        for tail in ("A", "B", "C", "D")
    ]
    await asyncio.gather(*(collect(each) for each in generations))
    cached = [each.usage.cached_tokens for each in generations]
    shared = min(each.usage.prompt_tokens for each in generations) - 2
    assert cached[0] == 0
    assert all(each >= shared for each in cached[1:])


async def test_three_times_more_context_than_cells_finishes_with_the_same_answers(tiny_model_path: Path) -> None:
    texts = [f"{number} the lazy dog " * 5 for number in range(8)]
    async with running(tiny_model_path) as roomy:
        expected = [await roomy.greedy(text, 60) for text in texts]
    async with running(tiny_model_path, cells=256) as tight:
        answers = await asyncio.gather(*(tight.greedy(text, 60) for text in texts))
        assert tight.engine._worker.runner.scheduler.preemptions > 0
    assert all(close_to(a, b) for a, b in zip(answers, expected, strict=True))


async def test_a_cancelled_request_does_not_disturb_its_batch(tiny: EngineUnderTest) -> None:
    expected = [await tiny.greedy(text, 60) for text in TEXTS[:3]]
    doomed = tiny.engine.submit(await tiny.tokens(TEXTS[3]), SamplingParams(temperature=0, ignore_eos=True))
    others = asyncio.gather(*(tiny.greedy(text, 60) for text in TEXTS[:3]))
    async for _ in deltas_of(doomed):
        break
    doomed.cancel()
    assert all(close_to(a, b) for a, b in zip(await others, expected, strict=True))
    assert tiny.engine.open_requests == 0
    await tiny.until(lambda: tiny.engine._worker.runner.scheduler.idle)


@pytest.mark.parametrize("when", ["in the queue", "while its prompt is read"])
async def test_a_request_cancelled_early_frees_its_place(tiny_model_path: Path, when: str) -> None:
    async with running(tiny_model_path, sequences=1) as subject:
        scheduler = subject.engine._worker.runner.scheduler
        if when == "in the queue":
            subject.engine.submit([1, 2, 3], SamplingParams(ignore_eos=True))
        doomed = subject.engine.submit([5] * 500, SamplingParams())
        if when != "in the queue":
            await subject.until(lambda: bool(scheduler.running))
        doomed.cancel()
        for each in list(subject.engine._open):
            each.cancel()
        await subject.until(lambda: scheduler.idle)
        assert (await subject.greedy("still here", 4)).reason == FinishReason.LENGTH


async def test_a_full_queue_is_refused_with_figures_and_a_time_and_nobody_is_lost(tiny_model_path: Path) -> None:
    async with running(tiny_model_path, sequences=2, queue_size=3) as subject:
        sampling = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True)
        accepted = [subject.engine.submit([7, 8, number], sampling) for number in range(5)]
        with pytest.raises(OverloadedError, match=r"5 answers .* 2 at once and 3 may wait") as refusal:
            subject.engine.submit([9], sampling)
        assert refusal.value.retry_after_s is not None
        assert 1 <= refusal.value.retry_after_s <= 60
        assert subject.engine.queue_full
        answers = [await collect(each) for each in accepted]
        assert [each[0].reason for each in answers] == [FinishReason.LENGTH] * 5
        assert not subject.engine.queue_full


async def test_a_prompt_longer_than_the_context_is_refused_with_both_figures(tiny: EngineUnderTest) -> None:
    with pytest.raises(InvalidRequestError, match="600 tokens; the context of tiny:1 has 512") as refusal:
        tiny.engine.submit([1] * 600, SamplingParams())
    assert refusal.value.code == "context_length_exceeded"
    assert tiny.engine.open_requests == 0


@pytest.mark.parametrize("prompt", [[], [-1], [10**6]])
async def test_an_empty_prompt_and_unknown_token_ids_are_refused(tiny: EngineUnderTest, prompt: list[int]) -> None:
    with pytest.raises(InvalidRequestError):
        tiny.engine.submit(prompt, SamplingParams())
    assert tiny.engine.open_requests == 0


async def test_an_answer_ends_where_the_context_does(tiny: EngineUnderTest) -> None:
    generation = tiny.engine.submit([5] * 500, SamplingParams(ignore_eos=True))
    [answer] = await collect(generation)
    assert answer.reason == FinishReason.LENGTH
    assert generation.usage.completion_tokens == 12


async def test_a_deadline_ends_the_work_with_an_error(tiny: EngineUnderTest) -> None:
    generation = tiny.engine.submit([5, 6], SamplingParams(ignore_eos=True), deadline_s=0.001)
    with pytest.raises(DeadlineExceededError, match=r"0\.001 s"):
        await collect(generation)
    await tiny.until(lambda: tiny.engine._worker.runner.scheduler.idle)


async def test_a_reader_who_never_comes_costs_at_most_his_answer(tiny: EngineUnderTest) -> None:
    forgotten = tiny.engine.submit([5, 6], SamplingParams(temperature=0, max_tokens=50, ignore_eos=True))
    await tiny.greedy("another one", 60)
    await tiny.until(lambda: forgotten.ended)
    [answer] = await collect(forgotten)
    assert answer.reason == FinishReason.LENGTH
    assert sum(delta.token_count for delta in answer.deltas) == 50


async def test_one_failed_batch_fails_its_own_sequences_only(
    tiny: EngineUnderTest, monkeypatch: pytest.MonkeyPatch
) -> None:
    context = tiny.engine._worker.runner.context
    codes = iter([-3])
    decode = context.decode
    monkeypatch.setattr(context, "decode", lambda runs: next(codes, None) or decode(runs))
    with pytest.raises(EngineError, match="code -3"):
        await tiny.greedy("unlucky")
    assert (await tiny.greedy("lucky", 4)).reason == FinishReason.LENGTH
    assert not tiny.engine.ended.done()


async def test_no_room_in_native_memory_makes_someone_wait_and_nobody_fail(
    tiny: EngineUnderTest, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = [await tiny.greedy(text) for text in TEXTS[:3]]
    context = tiny.engine._worker.runner.context
    decode = context.decode
    codes = iter([0, 0, 1, 0, 0, 0, 1])
    monkeypatch.setattr(context, "decode", lambda runs: next(codes, 0) or decode(runs))
    answers = await asyncio.gather(*(tiny.greedy(text) for text in TEXTS[:3]))
    assert all(close_to(a, b) for a, b in zip(answers, expected, strict=True))


async def test_a_dead_thread_ends_every_open_request_with_an_error(
    tiny_model_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with running(tiny_model_path) as subject:
        running_one = subject.engine.submit([1, 2], SamplingParams(ignore_eos=True))
        await subject.until(lambda: running_one.first_token_at is not None)

        def die(*_: object) -> None:
            raise MemoryError("no more")

        monkeypatch.setattr(subject.engine._worker.runner.context, "decode", die)
        with pytest.raises(EngineError, match="thread died"):
            await collect(running_one)
        error = await asyncio.wait_for(subject.engine.ended, 10)
        assert error is not None
        assert error.code == "engine_died"
        assert subject.engine.heartbeat_age_s == float("inf")
        with pytest.raises(EngineError, match="has ended"):
            subject.engine.submit([1], SamplingParams())


async def test_unloading_ends_open_requests_with_an_error(tiny_model_path: Path) -> None:
    async with running(tiny_model_path) as subject:
        generation = subject.engine.submit([1, 2], SamplingParams(ignore_eos=True))
        await subject.engine.close()
        with pytest.raises(EngineError, match="unloaded"):
            await collect(generation)


async def test_the_vocabulary_of_an_unloaded_model_is_refused_not_read(tiny_model_path: Path) -> None:
    async with running(tiny_model_path) as subject:
        long = asyncio.gather(*(subject.tokens("the quick brown fox " * 20_000) for _ in range(4)))
        async with asyncio.timeout(30):
            while subject.engine._model._users < 4:  # noqa: ASYNC110  (they are on their way in threads of their own)
                await asyncio.sleep(0.001)
        await subject.engine.close()
        assert {len(each) for each in await long} == {len((await long)[0])}
        with pytest.raises(EngineError, match="unloaded"):
            await subject.tokens("hello")
        with pytest.raises(EngineError, match="unloaded"):
            subject.engine.piece(300)


async def test_a_file_that_is_no_model_is_refused(tmp_path: Path) -> None:
    bad = tmp_path / "bad.gguf"
    bad.write_bytes(b"GGUF" + bytes(100))
    with pytest.raises(ModelFileError, match=r"cannot load bad\.gguf"):
        async with running(bad):
            pass


async def test_a_model_whose_weights_are_no_numbers_is_refused_at_warm_up(tmp_path: Path) -> None:
    path = write_tiny_llama(tmp_path / "nan.gguf")
    data = bytearray(path.read_bytes())
    data[-40_000:] = b"\xff" * 40_000
    path.write_bytes(data)
    with pytest.raises(EngineError, match="not numbers"):
        async with running(path):
            pass


async def test_the_load_is_shown_as_it_changes(tiny_model_path: Path) -> None:
    async with running(tiny_model_path, sequences=1) as subject:

        def load() -> tuple[float | None, ...]:
            return tuple(
                subject.metrics.registry.get_sample_value(f"appliance_num_requests_{each}", {"model": "tiny:1"})
                for each in ("running", "waiting")
            )

        first, second = (subject.engine.submit([1, 2], SamplingParams(ignore_eos=True)) for _ in range(2))
        assert load() == (0, 2)
        await subject.until(lambda: load() == (1, 1))
        first.cancel()
        await subject.until(lambda: load() == (1, 0))
        second.cancel()
        assert load() == (0, 0)


async def test_metrics_tell_what_was_done(tiny: EngineUnderTest) -> None:
    await tiny.greedy("the quick brown fox", 10)
    text = tiny.metrics.render().decode()
    assert 'appliance_generation_tokens_total{model="tiny:1"} 10.0' in text
    assert 'appliance_request_success_total{finish_reason="length",model="tiny:1"} 1.0' in text
    assert 'appliance_num_requests_running{model="tiny:1"} 0.0' in text
    assert 'appliance_time_to_first_token_seconds_count{model="tiny:1"} 1.0' in text
