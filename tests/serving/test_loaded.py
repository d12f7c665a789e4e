"""Wish and fact: models are loaded when wanted, kept while used, dropped for others, and a death is not hidden."""

from __future__ import annotations

import asyncio

import pytest

from appliance.core.errors import (
    ConflictError,
    EngineError,
    ModelFileError,
    NotFoundError,
    UnavailableError,
)
from appliance.core.types import GenerationRequest, SamplingParams
from tests.serving.conftest import DEADLINE_S, Box, serving, text_of

pytestmark = pytest.mark.anyio

ENDLESS = SamplingParams(ignore_eos=True)


def ask(model: str, sampling: SamplingParams | None = None) -> GenerationRequest:
    return GenerationRequest(model, "the quick brown fox", sampling or SamplingParams(max_tokens=4, ignore_eos=True))


async def ready(models: object) -> None:
    while not models.health().ready:  # type: ignore[attr-defined]  # noqa: ASYNC110  (readiness has no event: doors ask)
        await asyncio.sleep(0.001)


async def test_the_model_of_the_settings_is_loaded_without_being_asked(box: Box) -> None:
    async with serving(box, model="tiny") as floor:
        assert not floor.models.health().ready
        await ready(floor.models)
        assert floor.models.names == {"tiny:1"}
        assert floor.models.attempted


async def test_a_missing_model_leaves_the_server_up_and_says_what_to_do_until_it_is_pulled(box: Box) -> None:
    async with serving(box, model="late") as floor:
        async with asyncio.timeout(10):
            while not floor.models.attempted:  # noqa: ASYNC110  (a state without an event)
                await asyncio.sleep(0.001)
        assert "appliance models pull late" in floor.models.health().reason
        await text_of(await floor.text.generate(ask("tiny")))
        box.add("late", seed=3)
        await text_of(await floor.text.generate(ask("late")))
        await ready(floor.models)


async def test_two_requests_at_once_load_a_model_once(box: Box) -> None:
    async with serving(box) as floor:
        first, second = await asyncio.gather(*(floor.text.generate(ask("tiny")) for _ in range(2)))
        assert first.model == second.model == "tiny:1"
        await asyncio.gather(text_of(first), text_of(second))


async def test_an_idle_model_makes_room_for_another(box: Box) -> None:
    box.add("other", seed=1)
    async with serving(box, max_loaded_models=1) as floor:
        await text_of(await floor.text.generate(ask("tiny")))
        await text_of(await floor.text.generate(ask("other")))
        assert floor.models.names == {"other:1"}


async def test_a_busy_model_is_not_unloaded_and_the_other_request_is_told_to_come_back(box: Box) -> None:
    box.add("other", seed=1)
    async with serving(box, max_loaded_models=1) as floor:
        busy = await floor.text.generate(ask("tiny", ENDLESS))
        with pytest.raises(UnavailableError, match="tiny:1 is busy") as refusal:
            await floor.text.generate(ask("other"))
        assert refusal.value.retry_after_s
        assert floor.models.names == {"tiny:1"}
        assert await text_of(busy)


async def test_a_model_larger_than_the_memory_is_refused_with_both_figures(
    box: Box, monkeypatch: pytest.MonkeyPatch
) -> None:
    from appliance.observe.resources import memory
    from appliance.serving import loaded

    scarce = type(memory())(total=2**20, available=2**20)
    monkeypatch.setattr(loaded, "memory", lambda: scarce)
    async with serving(box) as floor:
        with pytest.raises(UnavailableError, match=r"needs \d+ MiB of memory; 1 MiB are free"):
            await floor.text.generate(ask("tiny"))
        assert floor.models.names == frozenset()


async def test_a_loaded_model_cannot_be_removed_and_an_unloaded_one_can(box: Box) -> None:
    async with serving(box) as floor:
        await text_of(await floor.text.generate(ask("tiny")))
        with pytest.raises(ConflictError):
            box.registry.remove("tiny")
        assert box.registry.resolve("tiny")
    box.registry.remove("tiny")
    with pytest.raises(NotFoundError):
        box.registry.resolve("tiny")


async def test_a_damaged_file_fails_its_own_request_and_leaves_the_others_alone(box: Box) -> None:
    box.add("broken", seed=2)
    path = box.registry.resolve("broken").files[0].path
    path.chmod(0o600)
    path.write_bytes(path.read_bytes()[:50_000])
    async with serving(box, max_loaded_models=2) as floor:
        running = await floor.text.generate(ask("tiny", ENDLESS))
        with pytest.raises(ModelFileError):
            await floor.text.generate(ask("broken"))
        assert floor.models.names == {"tiny:1"}
        assert await text_of(running)


async def test_an_unknown_model_is_answered_with_the_known_ones(box: Box) -> None:
    async with serving(box) as floor:
        with pytest.raises(NotFoundError, match="tiny"):
            await floor.text.generate(ask("nobody"))


async def kill_an_engine(box: Box) -> None:
    async with serving(box, model="tiny") as floor:
        await ready(floor.models)
        generation = await floor.text.generate(ask("tiny", ENDLESS))
        engine = floor.models._loaded["tiny:1"].engine
        engine._worker.runner.scheduler = None  # type: ignore[assignment]
        with pytest.raises(EngineError, match="thread died"):
            await text_of(generation)
        await asyncio.shield(engine.ended)
        assert floor.models.stalled == ["tiny:1"]
        assert not floor.models.health().ready
        await asyncio.sleep(DEADLINE_S)


async def test_an_engine_that_dies_turns_readiness_red_and_ends_the_task(box: Box) -> None:
    with pytest.raises(ExceptionGroup) as group:
        await kill_an_engine(box)
    [error] = group.value.exceptions
    assert isinstance(error, EngineError)
    assert error.code == "engine_died"


async def test_an_engine_without_a_heartbeat_turns_readiness_red(box: Box) -> None:
    async with serving(box, model="tiny", stalled_engine_s=1e-9) as floor:
        async with asyncio.timeout(10):
            while not floor.models.names:  # noqa: ASYNC110  (a state without an event)
                await asyncio.sleep(0.001)
        assert "does not answer" in floor.models.health().reason


async def test_draining_turns_readiness_red_and_refuses_new_loads(box: Box) -> None:
    async with serving(box) as floor:
        floor.models.drain()
        assert not floor.models.health().ready
        with pytest.raises(UnavailableError, match="stopping"):
            await floor.text.generate(ask("tiny"))


async def test_what_is_unloaded_at_the_end_is_not_loaded_again(box: Box) -> None:
    async with serving(box, model="tiny") as floor:
        await ready(floor.models)
        floor.models.drain()
        await floor.models.close()
        floor.models._attempted = False
        floor.models._wake.set()
        async with asyncio.timeout(10):
            while not floor.models.attempted:  # noqa: ASYNC110  (a state without an event)
                await asyncio.sleep(0.001)
        assert floor.models.names == frozenset()


async def test_the_end_answers_those_who_wait_for_a_load(box: Box) -> None:
    from appliance.engine.cpu_budget import CpuBudget
    from appliance.observe.metrics import Metrics
    from appliance.serving.loaded import LoadedModels

    # `run` never runs: the load is never granted
    models = LoadedModels(box.settings, box.registry, box.wishes, Metrics(), CpuBudget(1))
    async with asyncio.TaskGroup() as tasks:

        async def wait() -> None:
            with pytest.raises(UnavailableError, match="stopping"):
                async with models.lease("tiny"):
                    pass

        tasks.create_task(wait())
        while not models._wishes:  # noqa: ASYNC110  (a state without an event)
            await asyncio.sleep(0)
        await models.close()
