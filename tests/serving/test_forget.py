"""Deleted text leaves the models, whether they are loaded, being loaded, or only have files."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

import pytest

from appliance.core.types import ChatMessage, GenerationRequest, SamplingParams, Session
from appliance.engine.llama.state_files import StateFiles
from appliance.serving.floor import ServingFloor
from tests.serving.conftest import Box, serving, text_of

pytestmark = pytest.mark.anyio

PAST = "It was the best of times, it was the worst of times, it was the age of wisdom. " * 3
DEADLINE_S = 30.0


async def ask(floor: ServingFloor, session: Session | None, prompt: str | tuple[ChatMessage, ...] = PAST) -> int:
    """Run one answer and return how many of its prompt's tokens were cached."""
    sampling = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)
    generation = await floor.text.generate(GenerationRequest("tiny", prompt, sampling, session=session))
    await text_of(generation)
    return generation.usage.cached_tokens


def now(name: str) -> Session:
    return Session(name, time.monotonic())


def states(folder: Path) -> list[Path]:
    return sorted(folder.glob("kv/*/*.kv"))


async def test_a_loaded_model_forgets_and_what_was_read_before_is_not_kept_again(box: Box) -> None:
    async with serving(box) as floor:
        early = now("gone")
        assert await ask(floor, early) == 0
        assert await ask(floor, early) > 0
        await floor.text.forget({"gone"})
        assert await ask(floor, early) == 0
        assert await ask(floor, early) == 0, "it was read before the deletion, so it leaves nothing"
        assert await ask(floor, now("gone")) == 0
        assert await ask(floor, now("gone")) > 0, "what is read from now on is kept"


async def test_files_of_a_model_that_is_not_loaded_go_and_it_computes_anew(box: Box) -> None:
    async with serving(box) as floor:
        await ask(floor, now("gone"))
    assert len(states(box.settings.data_dir)) == 1
    async with serving(box) as floor:
        await floor.text.forget({"gone"})
        assert states(box.settings.data_dir) == []
        assert not floor.models.names, "it was not loaded for that"
        assert await ask(floor, now("gone")) == 0


async def test_a_folder_that_somebody_has_is_waited_for(box: Box, caplog: pytest.LogCaptureFixture) -> None:
    async with serving(box) as floor:
        await ask(floor, now("gone"))
    [state] = states(box.settings.data_dir)
    held = StateFiles(state.parent.parent, state.parent.name)
    async with serving(box) as floor, asyncio.timeout(DEADLINE_S), asyncio.TaskGroup() as tasks:
        with caplog.at_level("INFO"):
            forgetting = tasks.create_task(floor.text.forget({"gone"}))
            while "lets it go" not in caplog.text:  # noqa: ASYNC110  (a line in the log has no event)
                await asyncio.sleep(0.001)
        assert not forgetting.done()
        assert state.exists()
        held.close()
    assert not state.exists()


async def test_a_model_that_is_loaded_meanwhile_forgets_too(box: Box) -> None:
    async with serving(box) as floor:
        await ask(floor, now("gone"))
    async with serving(box) as floor, asyncio.timeout(DEADLINE_S), asyncio.TaskGroup() as tasks:
        tasks.create_task(floor.text.forget({"gone"}))
        assert await ask(floor, None, "the quick brown fox") == 0
    assert all(b"gone" not in each.read_bytes() for each in states(box.settings.data_dir))
