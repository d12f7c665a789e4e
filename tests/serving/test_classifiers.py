"""Texts in front of ONNX models: embeddings, reranking and classification, and what stands in where there is none."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from appliance.core.encoders import ClassificationRequest, Classifications, Ranking, RerankRequest
from appliance.core.errors import DeadlineExceededError, InvalidRequestError, ModelFileError, NotFoundError
from appliance.core.types import EmbeddingRequest, GenerationRequest, SamplingParams
from appliance.engine.similarity import cosines
from appliance.serving.floor import ServingFloor
from tests.serving.conftest import Box, serving
from tests.tiny_encoders import write_tiny_classifier, write_tiny_cross_encoder, write_tiny_encoder

pytestmark = pytest.mark.anyio

DOCUMENTS = ("the pump stops", "the valve leaks", "why is the motor hot", "the pump stops")
LONG = "the pump stops " * 60


@pytest.fixture
def text_box(box: Box) -> Box:
    """Return a box with one encoder of each task, and a GGUF encoder."""
    for name, write in (
        ("vectors", write_tiny_encoder),
        ("cross", write_tiny_cross_encoder),
        ("classes", write_tiny_classifier),
    ):
        box.add_onnx(name, write(box.folder / name))
    box.add_encoder("gguf")
    return box


async def rerank(
    floor: ServingFloor,
    model: str,
    documents: Sequence[str] = DOCUMENTS,
    query: str = "why is the pump hot",
    **more: Any,
) -> Ranking:
    return await floor.classifiers.rerank(RerankRequest(model, query, documents, **more))


async def classify(floor: ServingFloor, model: str = "classes", *inputs: str, **more: Any) -> Classifications:
    return await floor.classifiers.classify(ClassificationRequest(model, inputs or DOCUMENTS, **more))


async def test_one_session_serves_embeddings_and_tensors(text_box: Box) -> None:
    async with serving(text_box) as floor:
        told = await floor.embedding.embed(EmbeddingRequest("vectors", ["the pump stops", (2, 5, 3)]))
        assert told.model == "vectors:1"
        assert all(math.hypot(*each) == pytest.approx(1, abs=1e-5) for each in told.vectors)
        assert told.token_counts == [5, 3]
        assert [(each.name, each.execution_count > 0) for each in floor.tensors.statistics()] == [("vectors", True)]
        assert floor.tensor_models.names == {"vectors:1"}
        assert floor.embedders.names == frozenset()


async def test_an_encoder_says_which_inputs_it_cut(text_box: Box) -> None:
    async with serving(text_box) as floor:
        for model in ("vectors", "gguf"):
            with pytest.raises(InvalidRequestError, match=r"input\[1\] has \d+ tokens") as refusal:
                await floor.embedding.embed(EmbeddingRequest(model, ["the pump", LONG]))
            assert refusal.value.code == "context_length_exceeded"
            told = await floor.embedding.embed(EmbeddingRequest(model, ["the pump", LONG], truncate=True))
            assert list(told.truncated) == [1]


async def test_embeddings_are_computed_once_and_cached_apart_for_each_model(text_box: Box) -> None:
    async with serving(text_box, embedding_cache_bytes=2**24) as floor:
        first = await floor.embedding.embed(EmbeddingRequest("vectors", DOCUMENTS))
        assert floor.cache._database is not None
        floor.cache._database.write_blocking(lambda _: None)
        [statistics] = floor.tensors.statistics()
        assert statistics.inference_count == 3
        again = await floor.embedding.embed(EmbeddingRequest("vectors", DOCUMENTS))
        ranking = await rerank(floor, "vectors")
        assert statistics.inference_count == 3
        assert again.vectors == first.vectors
        assert ranking.scores[0] == pytest.approx(ranking.scores[3])
        other = await floor.embedding.embed(EmbeddingRequest("gguf", DOCUMENTS))
        assert other.vectors[0] != first.vectors[0]


async def test_a_cross_encoder_reads_query_and_document_together(text_box: Box) -> None:
    async with serving(text_box) as floor:
        ranking = await rerank(floor, "cross")
        assert (ranking.model, ranking.method) == ("cross:1", "cross-encoder")
        assert all(0 <= each <= 1 for each in ranking.scores)
        assert ranking.scores[0] == pytest.approx(ranking.scores[3], abs=1e-5)
        assert len({round(each, 6) for each in ranking.scores}) == 3
        assert list(ranking.token_counts) == [11, 11, 13, 11]
        assert list(ranking.truncated) == []
        with pytest.raises(InvalidRequestError, match=r"documents\[1\]") as refusal:
            await rerank(floor, "cross", ("the pump", LONG))
        assert refusal.value.param == "documents"
        assert list((await rerank(floor, "cross", ("the pump", LONG), truncate=True)).truncated) == [1]


@pytest.mark.parametrize("model", ["vectors", "gguf", "tiny", ""])
async def test_without_a_cross_encoder_embeddings_are_compared_and_the_answer_says_so(
    text_box: Box, model: str
) -> None:
    async with serving(text_box, embedding_model="vectors") as floor:
        ranking = await rerank(floor, model, ("why is the pump hot", *DOCUMENTS))
        assert (ranking.model, ranking.method) == (f"{model or 'vectors'}:1", "embedding")
        assert ranking.scores[0] == pytest.approx(1, abs=0.005)
        assert all(-1 <= each <= ranking.scores[0] for each in ranking.scores)
        assert ranking.scores[1] == pytest.approx(ranking.scores[4], abs=0.005)
        assert len(ranking.token_counts) == 5


async def test_comparing_embeddings_cuts_documents_that_are_too_long_and_never_the_query(text_box: Box) -> None:
    async with serving(text_box) as floor:
        ranking = await rerank(floor, "vectors", ("the pump", LONG), truncate=True)
        assert list(ranking.truncated) == [1]
        with pytest.raises(InvalidRequestError, match=r"documents\[1\] has \d+ tokens") as refusal:
            await rerank(floor, "vectors", ("the pump", LONG))
        assert (refusal.value.param, refusal.value.code) == ("documents", "context_length_exceeded")
        with pytest.raises(InvalidRequestError, match=r"query has \d+ tokens") as refusal:
            await rerank(floor, "vectors", query=LONG, truncate=True)
        assert refusal.value.param == "query"


async def test_a_classifier_gives_each_label_its_probability(text_box: Box) -> None:
    async with serving(text_box) as floor:
        told = await classify(floor)
        assert (told.model, tuple(told.labels), told.exclusive) == ("classes:1", ("calm", "loud", "broken"), True)
        assert all(sum(each) == pytest.approx(1, abs=1e-5) for each in told.probabilities)
        assert list(told.token_counts) == [5, 5, 7, 5]
        with pytest.raises(InvalidRequestError, match=r"input\[1\]"):
            await classify(floor, "classes", "the pump", LONG)
        assert list((await classify(floor, "classes", "the pump", LONG, truncate=True)).truncated) == [1]


@pytest.mark.parametrize(
    ("model", "use", "door"),
    [
        ("cross", "reranking", "/v1/rerank"),
        ("classes", "classification", "/v1/classify"),
        ("vectors", "embeddings", "/v1/embeddings"),
        ("tiny", "text", "/v1/chat/completions"),
    ],
)
async def test_a_model_for_something_else_is_refused_with_the_way_to_it(
    text_box: Box, model: str, use: str, door: str
) -> None:
    async def embed() -> None:
        await floor.embedding.embed(EmbeddingRequest(model, ["the pump"]))

    async def write() -> None:
        await floor.text.generate(GenerationRequest(model, "the pump", SamplingParams()))

    async def order() -> None:
        await rerank(floor, model)

    async def label() -> None:
        await classify(floor, model)

    fitting = {"cross": [order], "classes": [label], "vectors": [embed, order], "tiny": [embed, order, write]}[model]
    async with serving(text_box) as floor:
        for ask in {embed, write, order, label}.difference(fitting):
            with pytest.raises(InvalidRequestError, match=f"{model}:1 is for {use}, and") as refusal:
                await ask()
            assert refusal.value.param == "model"
            assert door in refusal.value.advice
        assert floor.tensor_models.names == frozenset()


async def test_an_adapter_neither_embeds_nor_reranks(box: Box, tmp_path: Path) -> None:
    from appliance.registry.install import import_adapter
    from tests.tiny_gguf import write_tiny_lora

    lora = write_tiny_lora(tmp_path / "polite.gguf", box.registry.resolve("tiny").files[0].path)
    import_adapter(lora, box.registry, base="tiny", name="polite", licence="MIT")
    async with serving(box) as floor:
        with pytest.raises(InvalidRequestError, match="is an adapter") as refusal:
            await rerank(floor, "tiny:polite")
        assert "tiny:1" in refusal.value.advice


async def test_an_unknown_model_is_told_the_names_that_exist(text_box: Box) -> None:
    async with serving(text_box, embedding_model="nobody") as floor:
        for work in (rerank(floor, ""), classify(floor, "nobody")):
            with pytest.raises(NotFoundError, match="vectors:1"):
                await work


async def test_deadlines_end_reranking_and_classification(text_box: Box) -> None:
    async with serving(text_box) as floor:
        for work in (
            rerank(floor, "cross", deadline_s=1e-6),
            rerank(floor, "vectors", deadline_s=1e-6),
            classify(floor, deadline_s=1e-6),
        ):
            with pytest.raises(DeadlineExceededError, match=r"after 1e-06 s"):
                await work
    async with serving(text_box, request_timeout_s=1e-6) as floor:
        with pytest.raises(DeadlineExceededError, match=r"after 1e-06 s"):
            await rerank(floor, "cross", deadline_s=60)


async def test_a_configuration_that_will_not_do_fails_the_load_and_leaves_no_session(text_box: Box) -> None:
    path = text_box.registry.resolve("vectors").file("sentence_bert_config.json")
    assert path is not None
    path.path.chmod(0o600)
    path.path.write_bytes(b" " * path.size)
    async with serving(text_box) as floor:
        with pytest.raises(ModelFileError, match="sentence_bert_config"):
            await floor.embedding.embed(EmbeddingRequest("vectors", ["the pump"]))
        assert floor.tensor_models.names == frozenset()
        assert (await rerank(floor, "cross")).scores
        text_box.registry.remove("vectors")


async def test_many_at_once_share_one_session(text_box: Box) -> None:
    async with serving(text_box) as floor:
        rankings = await asyncio.gather(*(rerank(floor, "cross") for _ in range(20)))
        assert all(each.scores == pytest.approx(rankings[0].scores, abs=1e-5) for each in rankings)


def test_cosines_are_never_beyond_1() -> None:
    from array import array

    long = array("f", [1.0000001, 0.0])
    assert cosines(long, [long, array("f", [-1.0000001, 0.0]), array("f", [0.0, 1.0])]) == [1.0, -1.0, 0.0]
