"""What an engine runs with is changed while it streams: the streams do not notice, and a bad value changes nothing."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path

import pytest

from appliance.core.errors import InvalidRequestError
from appliance.core.types import SamplingParams
from appliance.engine.llama.commands import Runtime
from appliance.engine.llama.native import short
from tests.engine.conftest import CONFIG, Answer, EngineUnderTest, collect, running
from tests.engine.test_engine import close_to

pytestmark = pytest.mark.anyio

SAMPLING = SamplingParams(temperature=0, max_tokens=60, top_logprobs=2, ignore_eos=True)
TEXTS = ["the quick brown fox", "why does the dog sleep", "你好，世界"]


async def streams(subject: EngineUnderTest, changes: list[Runtime]) -> list[Answer]:
    """Return the answers of three streams, under which the values change one after the other as tokens come."""
    generations = [subject.engine.submit(await subject.tokens(text), SAMPLING) for text in TEXTS]

    async def change() -> None:
        for number, each in enumerate(changes, 1):
            await subject.until(lambda enough=10 * number: generations[0].usage.completion_tokens >= enough)  # type: ignore[misc]
            subject.engine.tune(each)

    answers, _ = await asyncio.gather(asyncio.gather(*map(collect, generations)), change())
    return [answer for [answer] in answers]


async def test_streams_go_on_with_the_same_tokens_while_threads_and_steps_change_under_them(
    tiny_model_path: Path,
) -> None:
    async with running(tiny_model_path, cells=2048) as subject:
        expected = await streams(subject, [])
    async with running(tiny_model_path, cells=2048) as subject:
        start = subject.engine.runtime
        changes = [
            replace(start, threads=2),
            replace(start, threads=1, batch_tokens=8),
            Runtime(threads=1, batch_tokens=4, target_inter_token_latency_s=0.001),
            replace(start, threads=2),
        ]
        answers = await streams(subject, changes)
        assert all(close_to(ours, theirs) for ours, theirs in zip(answers, expected, strict=True))
        assert subject.engine.runtime == changes[-1]
        worker = subject.engine._worker
        await subject.until(lambda: short.llama_n_threads(worker.runner.context.handle) == 2)
        assert worker.runner.scheduler.limits.batch_tokens == CONFIG.batch_tokens


async def test_a_prompt_is_read_in_steps_of_the_new_size(tiny: EngineUnderTest) -> None:
    tiny.engine.tune(replace(tiny.engine.runtime, batch_tokens=16))
    sizes: list[int] = []
    await tiny.greedy("warm", 1)
    scheduler = tiny.engine._worker.runner.scheduler
    plan = scheduler.plan

    def noting(now: float) -> object:
        step = plan(now)
        sizes.append(sum(run.count for run in step.runs))
        return step

    scheduler.plan = noting  # type: ignore[method-assign, assignment]
    await tiny.greedy("please answer the question in one sentence " * 8, 4)
    assert max(sizes) == 16


@pytest.mark.parametrize("batch_tokens", [CONFIG.batch_tokens + 1, CONFIG.sequences - 1, 0, -5])
async def test_a_step_that_the_context_was_not_made_for_is_refused_and_changes_nothing(
    tiny: EngineUnderTest, batch_tokens: int
) -> None:
    before = tiny.engine.runtime
    with pytest.raises(InvalidRequestError, match=f"can have 4 to 64 tokens, not {batch_tokens}") as refusal:
        tiny.engine.tune(Runtime(threads=2, batch_tokens=batch_tokens, target_inter_token_latency_s=1.0))
    assert refusal.value.param == "batch_tokens"
    assert tiny.engine.runtime == before
    await tiny.greedy("still here", 4)
    assert short.llama_n_threads(tiny.engine._worker.runner.context.handle) == before.threads
