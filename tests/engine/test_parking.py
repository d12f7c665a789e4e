"""Conversations that wait for their next turn are parked, and go on without their past being computed again."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from appliance.core.types import SamplingParams
from tests.engine.conftest import EngineUnderTest, collect, running

pytestmark = pytest.mark.anyio

MIB = 2**20
PAST = "It was the best of times, it was the worst of times, it was the age of wisdom. " * 3
OTHER = "Call me Ishmael. Some years ago, never mind how long precisely, having little money. " * 3
GREEDY = SamplingParams(temperature=0, max_tokens=24, top_logprobs=2, ignore_eos=True)


@contextlib.asynccontextmanager
async def parking(path: Path, folder: Path | None = None, **changes: Any) -> AsyncIterator[EngineUnderTest]:
    values = {
        "parking_ram_bytes": 16 * MIB,
        "parking_disk_bytes": 64 * MIB if folder else 0,
        "parking_delay_s": 0.01,
        "parking_dir": folder,
        "model_sha256": "00" * 32,
    }
    async with running(path, **{**values, **changes}) as subject:
        yield subject


async def ask(subject: EngineUnderTest, text: str) -> tuple[list[int], list[float], int]:
    [answer], usage = await subject.ask(text, GREEDY)
    return answer.token_ids, answer.logprobs, usage.cached_tokens


def files(folder: Path) -> list[Path]:
    return sorted(folder.glob("*/*.kv"))


async def test_a_conversation_that_made_way_goes_on_without_its_past_computed_again(tiny_model_path: Path) -> None:
    async with running(tiny_model_path) as cold:
        expected = await ask(cold, PAST + OTHER)
    async with parking(tiny_model_path) as subject:
        await ask(subject, PAST)
        keeper = subject.engine._worker.runner.keeper
        await ask(subject, OTHER)  # beside it the idle past is parked
        await subject.until(lambda: len(keeper.states) >= 1)
        tokens, logprobs, cached = await ask(subject, PAST + OTHER)
    assert cached >= len(PAST) // 8
    assert tokens == expected[0]
    assert logprobs == pytest.approx(expected[1], abs=1e-3)


async def test_a_conversation_goes_on_after_a_restart(tiny_model_path: Path, tmp_path: Path) -> None:
    async with parking(tiny_model_path, tmp_path / "kv") as first:
        expected, _, _ = await ask(first, PAST)
        prompt = len(await first.tokens(PAST))
    assert files(tmp_path / "kv")
    async with parking(tiny_model_path, tmp_path / "kv") as second:
        tokens, _, cached = await ask(second, PAST)
    assert cached == prompt - 1
    assert tokens == expected


async def test_a_quiet_conversation_is_on_disk_before_anybody_stops_the_server(
    tiny_model_path: Path, tmp_path: Path
) -> None:
    async with parking(tiny_model_path, tmp_path / "kv") as subject:
        await ask(subject, PAST)
        await subject.until(lambda: bool(files(tmp_path / "kv")))


async def test_a_state_whose_bytes_were_changed_is_dropped_and_the_past_computed_again(
    tiny_model_path: Path, tmp_path: Path
) -> None:
    async with parking(tiny_model_path, tmp_path / "kv") as first:
        expected, _, _ = await ask(first, PAST)
    for path in files(tmp_path / "kv"):
        poisoned = bytearray(path.read_bytes())
        poisoned[-100] ^= 1
        path.write_bytes(poisoned)
    async with parking(tiny_model_path, tmp_path / "kv") as second:
        tokens, _, cached = await ask(second, PAST)
    assert cached == 0
    assert tokens == expected


async def test_states_of_another_model_are_left_alone_and_never_used(tiny_model_path: Path, tmp_path: Path) -> None:
    async with parking(tiny_model_path, tmp_path / "kv") as first:
        await ask(first, PAST)
    async with parking(tiny_model_path, tmp_path / "kv", model_sha256="11" * 32) as second:
        assert (await ask(second, PAST))[2] == 0


async def test_a_folder_that_cannot_be_used_costs_the_disk_tier_and_nothing_else(
    tiny_model_path: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "kv").write_text("no folder")
    async with parking(tiny_model_path, tmp_path / "kv") as subject:
        await ask(subject, PAST)
        await ask(subject, OTHER)
        assert (await ask(subject, PAST))[2] > 0
    assert "parked in RAM only" in caplog.text


async def test_more_conversations_than_ram_come_back_from_disk(tiny_model_path: Path, tmp_path: Path) -> None:
    texts = [f"{number}: {PAST}" for number in range(6)]
    async with parking(tiny_model_path, tmp_path / "kv", parking_ram_bytes=150_000) as subject:
        expected = [(await ask(subject, text))[0] for text in texts]
        await subject.until(lambda: len(files(tmp_path / "kv")) >= 4)
        again = [await ask(subject, text) for text in texts]
    assert [tokens for tokens, _, _ in again] == expected
    assert sum(cached > 50 for _, _, cached in again) >= 4


async def test_with_three_times_more_live_context_than_cells_everybody_finishes(tiny_model_path: Path) -> None:
    texts = [f"{number} {PAST}" for number in range(12)]
    sampling = SamplingParams(temperature=0, max_tokens=100, top_logprobs=0, ignore_eos=True)
    async with running(tiny_model_path, cells=2048) as roomy:
        expected = [(await roomy.ask(text, sampling))[0][0].token_ids for text in texts]
    async with parking(tiny_model_path, cells=512, sequences=12, queue_size=12) as subject:
        answers = await asyncio.gather(*(subject.ask(text, sampling) for text in texts))
        prompts = [len(await subject.tokens(text)) for text in texts]
    assert sum(prompts) + 100 * len(texts) > 3 * 512
    assert [answer[0].token_ids for answer, _ in answers] == expected


async def test_a_cancelled_conversation_is_parked_as_far_as_it_went(tiny_model_path: Path) -> None:
    async with parking(tiny_model_path) as subject:
        generation = subject.engine.submit(await subject.tokens(PAST), SamplingParams(max_tokens=400, ignore_eos=True))
        await subject.until(lambda: generation.usage.completion_tokens > 3)
        generation.cancel()
        await ask(subject, OTHER)
        assert (await ask(subject, PAST))[2] == len(await subject.tokens(PAST)) - 1


async def test_a_pinned_prefix_stays_while_others_come_and_go(tiny_model_path: Path) -> None:
    async with parking(tiny_model_path, parking_ram_bytes=400_000) as subject:
        tokens = await subject.tokens(PAST)
        pinned = subject.engine.submit(tokens, GREEDY, pinned=True)
        await collect(pinned)
        for number in range(12):
            await ask(subject, f"{number}: {OTHER}")
        assert (await ask(subject, PAST))[2] == len(tokens) - 1


async def test_a_pin_ends_with_its_day(tiny_model_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("appliance.engine.llama.keeper.PINNED_S", 0.0)
    async with parking(tiny_model_path, parking_ram_bytes=400_000) as subject:
        await collect(subject.engine.submit(await subject.tokens(PAST), GREEDY, pinned=True))
        keeper = subject.engine._worker.runner.keeper
        await subject.until(lambda: not keeper._pinned_until)
        for number in range(12):
            await ask(subject, f"{number}: {OTHER}")
        assert (await ask(subject, PAST))[2] == 0


async def test_more_is_pinned_than_fits_and_the_rest_still_works(tiny_model_path: Path) -> None:
    async with parking(tiny_model_path, parking_ram_bytes=400_000) as subject:
        for number in range(6):
            await collect(subject.engine.submit(await subject.tokens(f"{number} {PAST}"), GREEDY, pinned=True))
        keeper = subject.engine._worker.runner.keeper
        assert 0 < sum(keeper.states[each].size for each in keeper._pinned_until) <= 200_000
        await ask(subject, OTHER)


async def test_a_state_larger_than_the_ram_for_parking_comes_back_from_disk(
    tiny_model_path: Path, tmp_path: Path
) -> None:
    async with parking(tiny_model_path, tmp_path / "kv") as first:
        expected, _, _ = await ask(first, PAST)
        prompt = len(await first.tokens(PAST))
    async with parking(tiny_model_path, tmp_path / "kv", parking_ram_bytes=4096) as second:
        tokens, _, cached = await ask(second, PAST)
    assert files(tmp_path / "kv")[0].stat().st_size > 4096
    assert cached == prompt - 1
    assert tokens == expected


async def test_without_ram_or_folder_for_parking_nothing_is_copied(tiny_model_path: Path, tmp_path: Path) -> None:
    for changes in ({"parking_ram_bytes": 0}, {"parking_dir": None}):
        async with parking(tiny_model_path, tmp_path / "kv", **changes) as subject:
            await ask(subject, PAST)
            runner = subject.engine._worker.runner
            runner.rest()
            assert len(runner.keeper.states) == 0
