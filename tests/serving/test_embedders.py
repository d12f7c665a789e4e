"""Models that embed: loaded when wanted, beside those for text and never at their cost, dropped for others."""

from __future__ import annotations

import asyncio
import math
from array import array
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest

from appliance.core.errors import (
    ConflictError,
    DeadlineExceededError,
    EngineError,
    InvalidRequestError,
    ModelFileError,
    NotFoundError,
    UnavailableError,
)
from appliance.core.types import EmbeddingRequest, Embeddings, GenerationRequest, SamplingParams
from appliance.observe.resources import memory
from appliance.serving import embedders, loaded
from appliance.serving.embed import _cut
from appliance.serving.floor import ServingFloor
from appliance.serving.readiness import Readiness
from tests.serving.conftest import DEADLINE_S, Box, serving, text_of

pytestmark = pytest.mark.anyio

ENDLESS = SamplingParams(ignore_eos=True)


@pytest.fixture
def encoder_box(box: Box) -> Box:
    box.add_encoder("encoder")
    return box


async def embed(
    floor: ServingFloor, model: str, inputs: Sequence[Any] = ("the quick brown fox",), **more: Any
) -> Embeddings:
    return await floor.embedding.embed(EmbeddingRequest(model, inputs, **more))


def answer(model: str, sampling: SamplingParams) -> GenerationRequest:
    return GenerationRequest(model, "the quick brown fox", sampling)


async def test_an_encoder_is_loaded_by_its_first_request_beside_the_chat_model(encoder_box: Box) -> None:
    async with serving(encoder_box, max_loaded_models=1) as floor:
        chat = await floor.text.generate(answer("tiny", ENDLESS))
        told = await embed(floor, "encoder", ["the dog", (7, 8, 9)])
        assert told.model == "encoder:1"
        assert [len(each) for each in told.vectors] == [32, 32]
        assert all(math.hypot(*each) == pytest.approx(1) for each in told.vectors)
        assert told.token_counts == [4, 3]
        assert floor.models.names == {"tiny:1"}
        assert floor.embedders.names == {"encoder:1"}
        assert await text_of(chat)


async def test_a_chat_model_lends_its_weights_to_embed_with(encoder_box: Box) -> None:
    async with serving(encoder_box) as floor:
        await text_of(await floor.text.generate(answer("tiny", SamplingParams(max_tokens=1))))
        lent = await embed(floor, "tiny")
        engine = floor.models.find("tiny").engine
        async with floor.embedders.lease("tiny") as model:
            assert model.engine._worker.model is engine._model
    async with serving(encoder_box) as floor:
        own = await embed(floor, "tiny")
        assert floor.models.names == frozenset()
    assert lent.vectors[0] == pytest.approx(own.vectors[0], abs=0.005)


async def test_requests_at_once_load_an_embedder_once(encoder_box: Box) -> None:
    async with serving(encoder_box) as floor:
        told = await asyncio.gather(*(embed(floor, "encoder") for _ in range(5)))
        assert {each.model for each in told} == {"encoder:1"}
        assert all(each.vectors[0] == pytest.approx(told[0].vectors[0], abs=0.005) for each in told)


async def test_a_load_whose_client_leaves_is_taken_up_by_the_next_who_waits(encoder_box: Box) -> None:
    async with serving(encoder_box) as floor:
        first, second = (asyncio.ensure_future(embed(floor, "encoder")) for _ in range(2))
        await asyncio.sleep(0)
        first.cancel()
        assert (await second).model == "encoder:1"
        with pytest.raises(asyncio.CancelledError):
            await first


async def test_an_idle_embedder_makes_room_for_another_and_a_busy_one_does_not(encoder_box: Box) -> None:
    encoder_box.add_encoder("other", seed=1)
    async with serving(encoder_box, max_loaded_embedders=1) as floor:
        await embed(floor, "encoder")
        await embed(floor, "other")
        assert floor.embedders.names == {"other:1"}
        busy = asyncio.ensure_future(embed(floor, "other", [(9,) * 100] * 100))
        await until_leased(floor, "other:1")
        with pytest.raises(UnavailableError, match="other:1 is busy") as refusal:
            await embed(floor, "encoder")
        assert refusal.value.retry_after_s
        assert len((await busy).vectors) == 100


async def test_a_model_for_text_that_lacks_memory_gets_that_of_an_idle_embedder(
    encoder_box: Box, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with serving(encoder_box) as floor:
        await embed(floor, "encoder")
        ample, scarce = memory(), replace(memory(), available=2**20)
        monkeypatch.setattr(loaded, "memory", lambda: scarce if floor.embedders.names else ample)
        assert await text_of(await floor.text.generate(answer("tiny", SamplingParams(max_tokens=2, ignore_eos=True))))
        assert floor.embedders.names == frozenset()


async def test_an_embedder_larger_than_the_memory_is_refused_with_both_figures(
    encoder_box: Box, monkeypatch: pytest.MonkeyPatch
) -> None:
    scarce = replace(memory(), available=2**20)
    monkeypatch.setattr(embedders, "memory", lambda: scarce)
    async with serving(encoder_box) as floor:
        with pytest.raises(UnavailableError, match=r"needs \d+ MiB of memory; 1 MiB are free"):
            await embed(floor, "encoder")


async def test_a_model_for_embeddings_writes_no_text(encoder_box: Box) -> None:
    async with serving(encoder_box) as floor:
        with pytest.raises(InvalidRequestError, match="for embeddings, and writes no text") as refusal:
            await floor.text.generate(answer("encoder", ENDLESS))
        assert "/v1/embeddings" in refusal.value.advice
    async with serving(encoder_box, model="encoder") as floor:
        async with asyncio.timeout(10):
            while not floor.models.attempted:  # noqa: ASYNC110  (a state without an event)
                await asyncio.sleep(0.001)
        assert "for embeddings" in floor.models.health().reason
        assert (await embed(floor, "encoder")).vectors


async def test_an_unknown_model_and_one_of_another_kind_are_refused(
    encoder_box: Box, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with serving(encoder_box) as floor:
        with pytest.raises(NotFoundError, match="encoder"):
            await embed(floor, "nobody")
        other = replace(encoder_box.registry.resolve("tiny"), task="speech")
        monkeypatch.setattr(encoder_box.registry, "resolve", lambda _: other)
        with pytest.raises(InvalidRequestError, match="is for speech"):
            await embed(floor, "tiny")


async def test_a_damaged_file_fails_its_own_request_and_leaves_the_others_alone(encoder_box: Box) -> None:
    encoder_box.add_encoder("broken", seed=2)
    path = encoder_box.registry.resolve("broken").files[0].path
    path.chmod(0o600)
    path.write_bytes(path.read_bytes()[:50_000])
    async with serving(encoder_box, max_loaded_embedders=2) as floor:
        await embed(floor, "encoder")
        with pytest.raises(ModelFileError):
            await embed(floor, "broken")
        assert floor.embedders.names == {"encoder:1"}
        assert (await embed(floor, "encoder")).vectors
        encoder_box.registry.remove("broken")


async def test_a_model_that_embeds_cannot_be_removed(encoder_box: Box) -> None:
    async with serving(encoder_box) as floor:
        await embed(floor, "encoder")
        with pytest.raises(ConflictError):
            encoder_box.registry.remove("encoder")
    encoder_box.registry.remove("encoder")


async def test_a_deadline_ends_the_work_with_an_error(encoder_box: Box) -> None:
    async with serving(encoder_box) as floor:
        await embed(floor, "encoder")
        with pytest.raises(DeadlineExceededError, match=r"after 0\.001 s"):
            await embed(floor, "encoder", [(9,) * 128] * 200, deadline_s=0.001)
        async with floor.embedders.lease("encoder") as model:
            assert model.engine.open_requests == 0


async def test_dimensions_are_the_models_own_or_refused_unless_it_was_trained_for_less(
    encoder_box: Box, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with serving(encoder_box) as floor:
        whole = (await embed(floor, "encoder", dimensions=32)).vectors[0]
        for wanted in (1, 31, 33):
            with pytest.raises(InvalidRequestError, match=f"have 32 numbers, not {wanted}") as refusal:
                await embed(floor, "encoder", dimensions=wanted)
            assert (refusal.value.param, refusal.value.code) == ("dimensions", "invalid_value")
        async with floor.embedders.lease("encoder") as model:
            monkeypatch.setattr(type(model.engine), "is_matryoshka", True)
        short = (await embed(floor, "encoder", dimensions=8)).vectors[0]
        assert math.hypot(*short) == pytest.approx(1)
        assert [each / short[0] for each in short] == pytest.approx([each / whole[0] for each in whole[:8]], rel=1e-3)
        with pytest.raises(InvalidRequestError, match="have 32 numbers, not 33"):
            await embed(floor, "encoder", dimensions=33)


def test_a_start_of_zeros_stays_as_it_is() -> None:
    assert _cut(array("f", [0.0, 0.0, 1.0]), 2) == array("f", [0.0, 0.0])


async def test_readiness_is_that_of_every_part(encoder_box: Box) -> None:
    async with serving(encoder_box, model="tiny", queue_size=0) as floor:
        readiness = Readiness(floor.models, floor.embedders)
        async with asyncio.timeout(10):
            while not readiness.health().ready:  # noqa: ASYNC110  (a state without an event)
                await asyncio.sleep(0.001)
        busy = asyncio.ensure_future(embed(floor, "encoder", [(9,) * 128] * 100))
        await until_leased(floor, "encoder:1")
        async with asyncio.timeout(10):
            while "embeddings of encoder:1 is full" not in readiness.health().reason:  # noqa: ASYNC110  (the same)
                await asyncio.sleep(0)
        await busy
        assert readiness.health().ready
        assert readiness.stalled == []


async def test_an_embedder_without_a_heartbeat_turns_readiness_red(encoder_box: Box) -> None:
    async with serving(encoder_box, stalled_engine_s=1e-9) as floor:
        await embed(floor, "encoder")
        assert "embedder of encoder:1 does not answer" in floor.embedders.health().reason
        assert Readiness(floor.models, floor.embedders).stalled == ["encoder:1"]


async def kill_an_embedder(box: Box) -> None:
    async with serving(box) as floor:
        await embed(floor, "encoder")
        async with floor.embedders.lease("encoder") as model:
            model.engine._worker._batcher = None  # type: ignore[assignment]
        with pytest.raises(EngineError, match="thread died"):
            await embed(floor, "encoder")
        await asyncio.sleep(DEADLINE_S)


async def test_an_embedder_that_dies_ends_the_task(encoder_box: Box) -> None:
    with pytest.raises(ExceptionGroup) as group:
        await kill_an_embedder(encoder_box)
    [error] = group.value.exceptions
    assert isinstance(error, EngineError)
    assert error.code == "engine_died"


async def test_draining_refuses_new_loads_and_goes_on_with_what_is_loaded(encoder_box: Box) -> None:
    async with serving(encoder_box) as floor:
        await embed(floor, "encoder")
        floor.embedders.drain()
        assert (await embed(floor, "encoder")).vectors
        with pytest.raises(UnavailableError, match="stopping"):
            await embed(floor, "tiny")


async def until_leased(floor: ServingFloor, name: str) -> None:
    """Wait until a request is being embedded."""
    async with asyncio.timeout(DEADLINE_S):
        loaded_now = floor.embedders._loaded
        while name not in loaded_now or not loaded_now[name].engine.open_requests:  # noqa: ASYNC110  (the same)
            await asyncio.sleep(0)
