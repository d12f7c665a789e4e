"""Encoders, cross-encoders and classifiers over real sessions, against the same mathematics in NumPy."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from appliance.core.errors import (
    DeadlineExceededError,
    EngineError,
    InvalidRequestError,
    ModelFileError,
)
from appliance.engine.onnx import encoder as room
from appliance.engine.onnx.encoder import OnnxEncoder
from appliance.registry.blobs import Blobs
from appliance.registry.install_onnx import import_onnx
from appliance.registry.layout import lay_out
from appliance.registry.versions import Registry
from appliance.store.database import Database
from tests.engine.text_encoders import encoding, vectors
from tests.tiny_encoders import (
    INPUTS,
    TINY,
    logits,
    mean_vector,
    random_weights,
    states,
    tokenizer_json,
    vocabulary,
    write_bert,
    write_json,
    write_safetensors,
    write_tiny_classifier,
    write_tiny_cross_encoder,
    write_tiny_encoder,
)

pytestmark = pytest.mark.anyio

TEXTS = [
    "The pump of line 7 leaks",
    "a",
    "水泵为什么停止 report",
    "the worker checks the valve and the motor and the belt and resets the alarm of the first camera at night",
    "",
    "hello world",
]
WEIGHTS = random_weights(TINY)
EXACT = 1e-5


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_encoder(tmp_path_factory.mktemp("encoder"))


@pytest.fixture(scope="module")
def cross_encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_cross_encoder(tmp_path_factory.mktemp("cross_encoder"))


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_classifier(tmp_path_factory.mktemp("classifier"))


# Embeddings


async def test_a_vector_is_what_the_mathematics_says(folder: Path) -> None:
    async with encoding(folder) as encoder:
        tokens, _ = await encoder.tokenize(TEXTS, truncate=False)
        found = await encoder.embed(tokens)
    for each, vector in zip(tokens, found, strict=True):
        assert np.array(vector) == pytest.approx(mean_vector(WEIGHTS, TINY, each), abs=EXACT)


async def test_a_model_says_what_it_is(folder: Path) -> None:
    async with encoding(folder) as encoder:
        assert (encoder.name, encoder.dimensions, encoder.longest_input) == ("tiny:1", 32, 48)
        assert (encoder.pooling, encoder.labels, encoder.exclusive) == ("mean", (), False)
        assert not encoder.is_matryoshka
        assert not encoder.scores


async def test_the_least_limit_counts(folder: Path) -> None:
    async with encoding(folder, most_tokens=20) as encoder:
        assert encoder.longest_input == 20


async def test_the_dense_layers_of_an_imported_folder_are_evaluated(tmp_path: Path) -> None:
    source = write_tiny_encoder(tmp_path / "source")
    weight = np.random.default_rng(1).standard_normal((8, TINY.hidden)).astype(np.float32)
    steps = [("", "Transformer"), ("1_Pooling", "Pooling"), ("2_Dense", "Dense"), ("3_Normalize", "Normalize")]
    write_json(source / "modules.json", [{"path": path, "type": f"models.{kind}"} for path, kind in steps])
    layer = {"in_features": TINY.hidden, "out_features": 8, "bias": False, "activation_function": "torch.nn.Tanh"}
    write_json(source / "2_Dense" / "config.json", layer)
    write_safetensors(source / "2_Dense" / "model.safetensors", {"linear.weight": weight})
    database = Database(tmp_path / "appliance.db")
    model = import_onnx(source, Registry(database, Blobs(tmp_path / "blobs"))).model
    database.close()
    async with encoding(lay_out(model, tmp_path / "onnx")) as encoder:
        assert encoder.dimensions == 8
        [tokens], _ = await encoder.tokenize([TEXTS[0]], truncate=False)
        [found] = await encoder.embed([tokens])
    wanted = np.tanh(states(WEIGHTS, TINY, tokens).mean(axis=0) @ weight.T)
    assert np.array(found) == pytest.approx(wanted / np.linalg.norm(wanted), abs=EXACT)


async def test_the_default_prompt_stands_in_front_of_a_text_and_not_of_ids(tmp_path: Path) -> None:
    folder = write_tiny_encoder(tmp_path)
    prompts = {"prompts": {"query": "the report: "}, "default_prompt_name": "query"}
    write_json(folder / "config_sentence_transformers.json", prompts)
    async with encoding(folder) as encoder:
        [with_prompt, bare], _ = await encoder.tokenize(["pump", (20,)], truncate=False)
    words = vocabulary()
    assert [words[each] for each in with_prompt] == ["[CLS]", "the", "report", "[UNK]", "pump", "[SEP]"]
    assert bare.tolist() == [20]


async def test_nothing_is_answered_with_nothing(folder: Path, cross_encoder: Path) -> None:
    async with encoding(folder) as encoder, asyncio.timeout(30):
        assert await encoder.tokenize([], truncate=False) == ([], [])
        assert await encoder.embed([]) == []
    async with encoding(cross_encoder) as encoder, asyncio.timeout(30):
        assert await encoder.score("pump", [], truncate=False) == ([], [], [])


async def test_a_text_has_the_same_vector_alone_and_in_company(folder: Path) -> None:
    async with encoding(folder) as encoder:
        together = await vectors(encoder, TEXTS)
        alone = [await vectors(encoder, [each]) for each in TEXTS]
    assert together == pytest.approx(np.concatenate(alone), abs=EXACT)


async def test_token_ids_are_used_as_they_are(folder: Path) -> None:
    async with encoding(folder) as encoder:
        [tokens], _ = await encoder.tokenize([TEXTS[0]], truncate=False)
        same, bare = await vectors(encoder, [tuple(tokens), tuple(tokens[1:-1])])
    assert same == pytest.approx(mean_vector(WEIGHTS, TINY, tokens), abs=EXACT)
    assert bare == pytest.approx(mean_vector(WEIGHTS, TINY, tokens[1:-1]), abs=EXACT)


async def test_a_long_input_is_refused_with_both_figures_or_cut_and_told(folder: Path) -> None:
    async with encoding(folder) as encoder:
        for long in ("pump " * 60, (5,) * 62):
            with pytest.raises(InvalidRequestError, match=r"input\[1\] has 62 tokens; tiny:1 reads up to 48") as caught:
                await encoder.tokenize(["pump", long], truncate=False)
            assert (caught.value.code, caught.value.param) == ("context_length_exceeded", "input")
        tokens, cut = await encoder.tokenize(["pump", "pump " * 60, (5,) * 62], truncate=True)
    assert cut == [1, 2]
    assert [len(each) for each in tokens] == [3, 48, 48]
    assert tokens[1][-1] == tokens[0][-1]  # the end token stays


@pytest.mark.parametrize("tokens", [(-1,), (len(vocabulary()),), (5, 2**31), (2**70,)])
async def test_token_ids_that_the_model_does_not_know_are_refused(folder: Path, tokens: tuple[int, ...]) -> None:
    async with encoding(folder) as encoder:
        with pytest.raises(
            InvalidRequestError, match=rf"input\[1\] has token ids outside 0 to {len(vocabulary()) - 1}"
        ):
            await encoder.tokenize(["pump", tokens], truncate=True)


async def test_an_input_without_tokens_is_refused(folder: Path) -> None:
    async with encoding(folder) as encoder:
        with pytest.raises(InvalidRequestError, match=r"input\[0\] has no tokens"):
            await encoder.tokenize([()], truncate=True)


async def test_long_texts_are_tokenized_beside_the_loop_one_request_at_a_time(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    running, most, threads = 0, 0, set()
    async with encoding(folder) as encoder:
        tokenizer: Any = encoder._is.tokenizer
        original = type(tokenizer).texts

        def watched(self: Any, *arguments: Any) -> Any:
            nonlocal running, most
            running, most = running + 1, max(most, running + 1)
            threads.add(threading.current_thread())
            try:
                return original(self, *arguments)
            finally:
                running -= 1

        monkeypatch.setattr(type(tokenizer), "texts", watched)
        await asyncio.gather(*(encoder.tokenize(["pump " * 20_000], truncate=True) for _ in range(6)))
        assert threading.main_thread() not in threads
        assert most == 1
        await encoder.tokenize(["pump"], truncate=True)
        assert threading.main_thread() in threads


async def test_a_cancelled_request_hurts_nobody(folder: Path) -> None:
    async with encoding(folder) as encoder:
        tokens, _ = await encoder.tokenize(TEXTS, truncate=False)
        left = asyncio.create_task(encoder.embed(tokens * 50))
        stays = asyncio.create_task(encoder.embed(tokens))
        await asyncio.sleep(0)
        left.cancel()
        async with asyncio.timeout(30):
            assert len(await stays) == len(TEXTS)
            with pytest.raises(asyncio.CancelledError):
                await left


async def test_a_deadline_is_handed_on(folder: Path) -> None:
    async with encoding(folder) as encoder:
        tokens, _ = await encoder.tokenize(TEXTS, truncate=False)
        with pytest.raises(DeadlineExceededError):
            await encoder.embed(tokens * 200, deadline_s=0.001)


# Graphs


@pytest.mark.parametrize(
    ("pooling", "name"),
    [(("cls_token",), "cls"), (("max_tokens", "mean_tokens"), "max+mean"), (("lasttoken",), "last")],
)
async def test_states_are_pooled_as_the_files_say(tmp_path: Path, pooling: Sequence[str], name: str) -> None:
    async with encoding(write_tiny_encoder(tmp_path, pooling=pooling)) as encoder:
        assert encoder.pooling == name
        assert encoder.dimensions == 32 * len(pooling)
        [tokens], _ = await encoder.tokenize([TEXTS[3]], truncate=False)
        found = await vectors(encoder, [tuple(tokens), "a"])
    each = states(WEIGHTS, TINY, tokens)
    ways = {"cls": each[0], "max": each.max(axis=0), "mean": each.mean(axis=0), "last": each[-1]}
    wanted = np.concatenate([ways[way] for way in name.split("+")])
    assert found[0] == pytest.approx(wanted / np.linalg.norm(wanted), abs=EXACT)


@pytest.mark.parametrize(
    ("inputs", "datatype"),
    [
        (INPUTS, "INT32"),
        (("input_ids", "attention_mask"), "INT64"),
        (("input_ids",), "INT64"),
        ((*INPUTS, "position_ids"), "INT64"),
    ],
)
async def test_a_graph_is_given_what_it_takes(
    folder: Path, tmp_path: Path, inputs: Sequence[str], datatype: str
) -> None:
    graph = write_bert(tmp_path / "other.onnx", WEIGHTS, TINY, inputs=inputs, datatype=datatype)
    async with encoding(folder, graph=graph) as encoder:
        tokens, _ = await encoder.tokenize(TEXTS, truncate=False)
        found = await vectors(encoder, TEXTS)
    wanted = [mean_vector(WEIGHTS, TINY, each) for each in tokens]
    assert found == pytest.approx(np.array(wanted), abs=EXACT)


@pytest.mark.parametrize("sizes", [(1, "sequence"), ("batch", 24), (1, 24)])
async def test_a_graph_of_a_fixed_shape_is_served(folder: Path, tmp_path: Path, sizes: tuple[Any, Any]) -> None:
    graph = write_bert(tmp_path / "fixed.onnx", WEIGHTS, TINY, sizes=sizes)
    async with encoding(folder, graph=graph) as encoder:
        assert encoder.longest_input == (24 if sizes[1] == 24 else 48)
        tokens, _ = await encoder.tokenize(TEXTS, truncate=True)
        found = await encoder.embed(tokens)
    wanted = [mean_vector(WEIGHTS, TINY, each) for each in tokens]
    assert np.array(found) == pytest.approx(np.array(wanted), abs=EXACT)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"sizes": (4, "sequence")}, "takes texts only 4 at a time"),
        ({"datatype": "FP32"}, "not whole numbers"),
    ],
)
async def test_a_graph_that_takes_no_texts_is_refused(
    folder: Path, tmp_path: Path, changes: dict[str, Any], reason: str
) -> None:
    graph = write_bert(tmp_path / "other.onnx", WEIGHTS, TINY, **changes)
    with pytest.raises(ModelFileError, match=reason):
        async with encoding(folder, graph=graph):
            pass


async def test_a_folder_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    (write_tiny_encoder(tmp_path) / "tokenizer.json").unlink()
    with pytest.raises(ModelFileError, match=r"tokenizer\.json cannot be used: No such file"):
        async with encoding(tmp_path):
            pass


async def test_a_limit_that_leaves_no_room_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelFileError, match="may have 3 tokens, of which the tokenizer adds 3"):
        async with encoding(write_tiny_encoder(tmp_path, longest=3)):
            pass


async def test_a_vector_that_is_not_a_number_fails_alone(folder: Path, tmp_path: Path) -> None:
    words = WEIGHTS["embeddings.word_embeddings.weight"].copy()
    bad = vocabulary().index("camera")
    words[bad] = np.nan
    graph = write_bert(tmp_path / "bad.onnx", WEIGHTS | {"embeddings.word_embeddings.weight": words}, TINY)
    async with encoding(folder, graph=graph) as encoder:
        [good, failing], _ = await encoder.tokenize(["pump", "camera"], truncate=False)
        first, second = await asyncio.gather(encoder.embed([good]), encoder.embed([failing]), return_exceptions=True)
        assert not isinstance(first, BaseException)
        assert np.array(first[0]) == pytest.approx(mean_vector(WEIGHTS, TINY, good), abs=EXACT)
        assert isinstance(second, EngineError)
        assert second.code == "not_a_number"


# Pairs


async def test_a_pair_has_the_sigmoid_of_its_logit(cross_encoder: Path) -> None:
    weights = random_weights(TINY, logits=1)
    documents = ["the pump leaks", "", "the camera runs", "水泵 停止"]
    async with encoding(cross_encoder) as encoder:
        assert encoder.scores
        scores, counts, cut = await encoder.score("why pump", documents, truncate=False)
        rows = encoder._is.tokenizer.pairs("why pump", documents, 64)
    assert counts == [len(each.tokens) for each in rows]
    assert cut == []
    for row, score in zip(rows, scores, strict=True):
        logit = logits(weights, TINY, row.tokens, row.types)[0]
        assert score == pytest.approx(1 / (1 + np.exp(-logit)), abs=EXACT)


async def test_a_long_pair_is_refused_with_both_figures_or_cut_and_told(cross_encoder: Path) -> None:
    async with encoding(cross_encoder) as encoder:
        documents = ["the pump", "camera " * 80]
        with pytest.raises(
            InvalidRequestError, match=r"documents\[1\] with the query has 85 tokens; tiny:1 reads up to 64"
        ) as caught:
            await encoder.score("why pump", documents, truncate=False)
        assert (caught.value.code, caught.value.param) == ("context_length_exceeded", "documents")
        scores, counts, cut = await encoder.score("why pump", documents, truncate=True)
        assert len(scores) == 2
        assert counts == [7, 64]
        assert cut == [1]


# Classes


async def test_classes_that_exclude_each_other_add_up_to_1(classifier: Path) -> None:
    weights = random_weights(TINY, logits=3)
    async with encoding(classifier) as encoder:
        assert encoder.labels == ("calm", "loud", "broken")
        assert encoder.exclusive
        tokens, _ = await encoder.tokenize(TEXTS, truncate=False)
        found, counts, cut = await encoder.classify(TEXTS, truncate=False)
    assert counts == [len(each) for each in tokens]
    assert cut == []
    for each, probabilities in zip(tokens, found, strict=True):
        powers = np.exp(logits(weights, TINY, each))
        assert sum(probabilities) == pytest.approx(1, abs=EXACT)
        assert probabilities == pytest.approx(powers / powers.sum(), abs=EXACT)


async def test_classes_that_do_not_stand_each_for_itself(tmp_path: Path) -> None:
    folder = write_tiny_classifier(tmp_path, problem_type="multi_label_classification")
    async with encoding(folder) as encoder:
        assert not encoder.exclusive
        [tokens], _ = await encoder.tokenize(["the pump"], truncate=False)
        [probabilities], _, _ = await encoder.classify(["the pump"], truncate=False)
    wanted = 1 / (1 + np.exp(-logits(random_weights(TINY, logits=3), TINY, tokens)))
    assert probabilities == pytest.approx(wanted, abs=EXACT)


async def test_a_long_text_to_classify_is_refused_or_cut_and_told(classifier: Path) -> None:
    async with encoding(classifier) as encoder:
        with pytest.raises(InvalidRequestError, match=r"input\[0\] has 92 tokens; tiny:1 reads up to 64"):
            await encoder.classify(["loud " * 90], truncate=False)
        _, counts, cut = await encoder.classify(["loud " * 90, "cold"], truncate=True)
        assert (counts, cut) == ([64, 3], [0])


@pytest.mark.parametrize(
    ("config", "labels"),
    [
        ({}, ("LABEL_0", "LABEL_1", "LABEL_2")),
        ({"id2label": {"0": "x", "1": "y", "2": "z"}}, ("x", "y", "z")),
    ],
)
async def test_labels_that_no_file_names_have_numbers(
    tmp_path: Path, config: dict[str, Any], labels: tuple[str, ...]
) -> None:
    folder = write_tiny_classifier(tmp_path)
    write_json(folder / "config.json", {"max_position_embeddings": 64} | config)
    async with encoding(folder) as encoder:
        assert encoder.labels == labels


async def test_labels_in_another_number_than_logits_are_refused(tmp_path: Path) -> None:
    folder = write_tiny_classifier(tmp_path)
    write_json(folder / "config.json", {"id2label": {"0": "x", "1": "y"}})
    with pytest.raises(ModelFileError, match="gives 3 logits, and its files name 2 labels"):
        async with encoding(folder):
            pass


# Other tasks


async def test_a_model_is_asked_only_for_what_it_is_made_for(
    folder: Path, cross_encoder: Path, classifier: Path
) -> None:
    async def refusals(encoder: OnnxEncoder) -> list[str]:
        tokens, _ = await encoder.tokenize(["pump"], truncate=False)
        outcomes: list[Any] = [
            *await asyncio.gather(encoder.embed(tokens), return_exceptions=True),
            *await asyncio.gather(encoder.score("pump", ["pump"], truncate=False), return_exceptions=True),
            *await asyncio.gather(encoder.classify(["pump"], truncate=False), return_exceptions=True),
        ]
        return [each.message for each in outcomes if isinstance(each, InvalidRequestError)]

    async with encoding(folder) as encoder:
        assert await refusals(encoder) == ["tiny:1 does not score pairs.", "tiny:1 does not classify."]
    async with encoding(classifier) as encoder:
        assert await refusals(encoder) == ["tiny:1 does not embed.", "tiny:1 does not score pairs."]
    async with encoding(cross_encoder) as encoder:
        assert await refusals(encoder) == ["tiny:1 does not embed."]


async def test_many_documents_do_not_hold_up_the_loop(cross_encoder: Path) -> None:
    assert room.INLINE_CHARACTERS < 300 * room.TEXT_CHARACTERS
    async with encoding(cross_encoder) as encoder:
        beats = 0

        async def beat() -> None:
            nonlocal beats
            while True:
                await asyncio.sleep(0.001)
                beats += 1

        beating = asyncio.create_task(beat())
        began = time.monotonic()
        scores, _, _ = await encoder.score("pump", ["valve"] * 300, truncate=False)
        beating.cancel()
        assert len(scores) == 300
        assert beats > 0, time.monotonic() - began


async def test_a_tokenizer_of_another_model_is_refused(tmp_path: Path) -> None:
    folder = write_tiny_encoder(tmp_path)
    content = tokenizer_json()
    content["post_processor"]["special_tokens"]["[SEP]"]["ids"] = [len(vocabulary())]
    write_json(folder / "tokenizer.json", content)
    with pytest.raises(ModelFileError, match="does not know"):
        async with encoding(folder):
            pass
