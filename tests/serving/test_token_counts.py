"""Tokens are counted as the model embeds them, by either engine."""

from __future__ import annotations

import asyncio

import pytest

from appliance.core.errors import InvalidRequestError, NotFoundError
from appliance.core.types import EmbeddingRequest, TokenCounter
from appliance.serving import token_counts
from tests.serving.conftest import Box, serving
from tests.tiny_encoders import write_tiny_classifier, write_tiny_encoder

pytestmark = pytest.mark.anyio

TEXTS = ["the quick brown fox", "dog", "why is the motor hot", "the pump stops"]


@pytest.fixture
def counting_box(box: Box) -> Box:
    box.add_onnx("onnx", write_tiny_encoder(box.folder / "onnx"))
    box.add_onnx("classes", write_tiny_classifier(box.folder / "classes"))
    box.add_encoder("gguf")
    return box


@pytest.mark.parametrize("model", ["onnx", "gguf"])
async def test_counts_are_those_of_the_embedding(counting_box: Box, model: str) -> None:
    async with serving(counting_box) as floor:
        counter: TokenCounter = floor.token_counts
        told = await floor.embedding.embed(EmbeddingRequest(model, TEXTS))
        assert list(await counter.count_tokens(model, TEXTS)) == list(told.token_counts)


@pytest.mark.parametrize("model", ["onnx", "gguf"])
async def test_no_text_is_too_long_and_none_too_short(counting_box: Box, model: str) -> None:
    async with serving(counting_box) as floor:
        none, one, many = await floor.token_counts.count_tokens(model, ["", "the", "the " * 5000])
        assert many - none == 5000 * (one - none)
        assert none < one


@pytest.mark.parametrize("model", ["onnx", "gguf"])
async def test_the_longest_input_is_where_embedding_begins_to_cut(counting_box: Box, model: str) -> None:
    async with serving(counting_box) as floor:
        longest = await floor.token_counts.longest_input(model)
        none, one = await floor.token_counts.count_tokens(model, ["", "the"])
        fits = "the " * ((longest - none) // (one - none))
        told = await floor.embedding.embed(EmbeddingRequest(model, [fits, fits + "the"], truncate=True))
        assert list(told.truncated) == [1]
        assert max(told.token_counts) == longest


async def test_many_texts_are_counted_in_batches_off_the_loop(
    counting_box: Box, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(token_counts, "BATCH_CHARACTERS", 10_000)
    async with serving(counting_box) as floor:
        few = await floor.token_counts.count_tokens("onnx", TEXTS)
        texts, turns = TEXTS * 500, 0
        counting = asyncio.ensure_future(floor.token_counts.count_tokens("onnx", texts))
        while not counting.done():
            turns += 1
            await asyncio.sleep(0)
        assert list(await counting) == list(few) * 500
        assert turns > 10
        assert list(await floor.token_counts.count_tokens("onnx", [])) == []


async def test_only_models_that_embed_count(counting_box: Box) -> None:
    async with serving(counting_box) as floor:
        with pytest.raises(NotFoundError, match="gguf"):
            await floor.token_counts.count_tokens("nothing", TEXTS)
        with pytest.raises(InvalidRequestError):
            await floor.token_counts.count_tokens("classes", TEXTS)
