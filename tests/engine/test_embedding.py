"""The embedder on real llama.cpp with tiny models: batches, poolings, limits, failures and neighbours."""

from __future__ import annotations

import asyncio
import ctypes
from array import array
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import numpy.typing as npt
import pytest

from appliance.core.errors import EngineError, InvalidRequestError, ModelFileError, OverloadedError
from appliance.core.types import SamplingParams
from appliance.engine.llama.engine import LlamaEngine
from appliance.engine.llama.model import LlamaModel
from appliance.engine.llama.native import llama
from appliance.observe.metrics import Metrics
from tests.engine.conftest import CONFIG as ENGINE_CONFIG
from tests.engine.conftest import DEADLINE_S, EngineUnderTest, collect, running
from tests.engine.embedders import TEXTS, EmbedderUnderTest, embedding
from tests.engine.test_engine import close_to
from tests.tiny_gguf import BERT_END_TOKEN_ID, BERT_START_TOKEN_ID, write_tiny_bert, write_tiny_llama

pytestmark = pytest.mark.anyio

CLOSE = 0.005
"""What a number of a vector may differ by when a batch is composed otherwise; attention computes in 16-bit floats."""

MODELS: dict[str, Callable[[Path], Path]] = {
    "bert, mean": write_tiny_bert,
    "bert, cls": lambda path: write_tiny_bert(path, pooling=gguf.PoolingType.CLS),
    "bert, last": lambda path: write_tiny_bert(path, pooling=gguf.PoolingType.LAST),
    "bert, silent": lambda path: write_tiny_bert(path, pooling=None),
    "bert, not saying that it looks ahead": lambda path: _without_causal(write_tiny_bert(path)),
    "llama, silent": write_tiny_llama,
    "llama, mean": lambda path: write_tiny_llama(path, pooling=gguf.PoolingType.MEAN),
    "llama, last": lambda path: write_tiny_llama(path, pooling=gguf.PoolingType.LAST),
    "gemma2, silent": lambda path: write_tiny_llama(path, architecture="gemma2"),
    "gemma2, last": lambda path: write_tiny_llama(path, architecture="gemma2", pooling=gguf.PoolingType.LAST),
    "mamba, silent": lambda path: write_tiny_llama(path, architecture="mamba"),
    "mamba, last": lambda path: write_tiny_llama(path, architecture="mamba", pooling=gguf.PoolingType.LAST),
}


def _without_causal(path: Path) -> Path:
    content = path.read_bytes()
    assert b"bert.attention.causal" in content
    path.write_bytes(content.replace(b"bert.attention.causal", b"bert.attention.casual"))
    return path


@pytest.fixture(params=MODELS)
def model(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return MODELS[request.param](tmp_path / "model.gguf")


@pytest.fixture
def bert(tmp_path: Path) -> Path:
    return write_tiny_bert(tmp_path / "bert.gguf")


def pooled_by_llama(path: Path, tokens: list[int], pooling: int) -> npt.NDArray[np.float32]:
    """Return the vector as llama.cpp itself makes it, of one input in one micro-batch."""
    model = LlamaModel(path, gpu_layers=0)
    parameters = llama.llama_context_default_params()
    parameters.n_ctx = parameters.n_batch = parameters.n_ubatch = 512
    parameters.n_threads = parameters.n_threads_batch = 1
    parameters.embeddings, parameters.pooling_type = True, pooling
    context = llama.llama_init_from_model(model.handle, parameters)
    try:
        native = (llama.llama_token * len(tokens))(*tokens)
        assert llama.llama_decode(context, llama.llama_batch_get_one(native, len(tokens))) == 0
        pointer = llama.llama_get_embeddings_seq(context, 0)
        vector = np.ctypeslib.as_array(ctypes.cast(pointer, ctypes.POINTER(ctypes.c_float)), (32,)).copy()
        unit: npt.NDArray[np.float32] = vector / np.linalg.norm(vector)
        return unit
    finally:
        llama.llama_free(context)
        model.close()


# What comes out


async def test_vectors_of_a_batch_equal_those_of_inputs_alone(model: Path) -> None:
    async with embedding(model) as subject:
        together = await subject.vectors(TEXTS, truncate=True)
        alone = np.vstack([await subject.vectors([text], truncate=True) for text in TEXTS])
        at_once = np.vstack(await asyncio.gather(*(subject.vectors([text], truncate=True) for text in TEXTS)))
    assert np.abs(together - alone).max() < CLOSE
    assert np.abs(at_once - alone).max() < CLOSE
    assert np.linalg.norm(together, axis=1) == pytest.approx(1, abs=1e-5)
    differences = np.abs(alone[:, np.newaxis] - alone[np.newaxis]).max(axis=2)
    assert (differences + np.eye(len(TEXTS)) > 10 * CLOSE).all(), "two texts have one vector"


@pytest.mark.parametrize("name", ["llama, mean", "llama, last", "gemma2, silent", "bert, mean", "bert, cls"])
async def test_vectors_are_those_that_llama_cpp_pools_itself(tmp_path: Path, name: str) -> None:
    path = MODELS[name](tmp_path / "model.gguf")
    pooling = {"mean": 1, "silent": 1, "cls": 2, "last": 3}[name.split(", ")[1]]
    async with embedding(path, longest_input=512) as subject:
        for text in TEXTS[0], TEXTS[3]:
            [tokens], _ = await subject.embedder.tokenize([text], truncate=False)
            expected = pooled_by_llama(path, tokens.tolist(), pooling)
            assert np.abs(await subject.vector(text) - expected).max() < CLOSE


async def test_a_batch_leaves_nothing_behind_for_the_next(model: Path) -> None:
    async with embedding(model) as subject:
        before = await subject.vector("the dog thinks")
        await subject.vectors(TEXTS, truncate=True)
        assert np.abs(await subject.vector("the dog thinks") - before).max() < 1e-6


@pytest.mark.parametrize(
    ("name", "pooling"),
    [("bert, cls", "cls"), ("bert, silent", "mean"), ("llama, last", "last"), ("llama, silent", "mean")],
)
async def test_the_file_says_how_it_is_pooled(tmp_path: Path, name: str, pooling: str) -> None:
    async with embedding(MODELS[name](tmp_path / "model.gguf")) as subject:
        assert subject.embedder.pooling == pooling
        assert subject.embedder.dimensions == 32
        assert not subject.embedder.is_matryoshka


async def test_flash_attention_may_be_off(bert: Path) -> None:
    async with embedding(bert) as on, embedding(bert, flash_attention="off") as off:
        assert np.abs(await on.vectors(TEXTS) - await off.vectors(TEXTS)).max() < CLOSE


# What goes in


async def test_token_ids_are_embedded_as_they_are_and_texts_with_the_models_ends(bert: Path) -> None:
    async with embedding(bert) as subject:
        [text, ids], truncated = await subject.embedder.tokenize(["the dog", (7, 8)], truncate=False)
        assert truncated == []
        assert (text[0], text[-1]) == (BERT_START_TOKEN_ID, BERT_END_TOKEN_ID)
        assert ids.tolist() == [7, 8]
        assert np.abs(await subject.vector("the dog") - await subject.vector(tuple(text))).max() < 1e-6


@pytest.mark.parametrize(
    ("given", "told", "code"),
    [
        (["fine", ()], r"input\[1\] has no tokens", "empty_prompt"),
        ([(5, 125)], r"input\[0\] has token ids outside 0 to 124", "invalid_request"),
        ([(-1,)], r"input\[0\] has token ids outside 0 to 124", "invalid_request"),
        ([(5,) * 129], r"input\[0\] has 129 tokens; tiny:1 embeds up to 128", "context_length_exceeded"),
        (["fine", "a " * 200], r"input\[1\] has 202 tokens; tiny:1 embeds up to 128", "context_length_exceeded"),
        (["a " * 200_000], r"input\[0\] has 200002 tokens", "context_length_exceeded"),
    ],
)
async def test_an_input_that_will_not_do_is_refused_by_its_place(
    bert: Path, given: list[str | tuple[int, ...]], told: str, code: str
) -> None:
    async with embedding(bert) as subject:
        with pytest.raises(InvalidRequestError, match=told) as refusal:
            await subject.vectors(given)
        assert (refusal.value.code, refusal.value.param) == (code, "input")
        assert subject.embedder.open_requests == 0


async def test_a_long_input_is_cut_only_when_asked_and_keeps_its_end_token(bert: Path) -> None:
    async with embedding(bert) as subject:
        inputs: list[str | tuple[int, ...]] = ["a " * 200, "a", (9,) * 200]
        [text, _, ids], truncated = await subject.embedder.tokenize(inputs, truncate=True)
        assert truncated == [0, 2]
        assert len(text) == len(ids) == subject.embedder.longest_input == 128
        assert (text[0], text[-1]) == (BERT_START_TOKEN_ID, BERT_END_TOKEN_ID)
        assert ids.tolist() == [9] * 128
        assert np.isfinite(await subject.vectors([tuple(text), tuple(ids)])).all()


@pytest.mark.parametrize("longest", [1, 63, 100, 127, 128, 257, 100_000])
async def test_the_longest_input_is_the_setting_or_what_the_model_was_trained_for(model: Path, longest: int) -> None:
    trained = 128 if subject_is_bert(model) else 512
    async with embedding(model, longest_input=longest) as subject:
        assert subject.embedder.longest_input == min(longest, trained)
        assert np.isfinite(await subject.vectors([(9,) * min(longest, trained), (9,)])).all()


def subject_is_bert(path: Path) -> bool:
    return b"bert.context_length" in path.read_bytes()


# Who else is there


async def test_a_caller_who_leaves_disturbs_nobody(bert: Path) -> None:
    async with embedding(bert) as subject:
        expected = await subject.vectors(TEXTS)
        doomed = [asyncio.ensure_future(subject.vectors([(9,) * 128] * 50)) for _ in range(3)]
        while subject.embedder.open_requests < 3:  # noqa: ASYNC110  (a state without an event)
            await asyncio.sleep(0)
        others = asyncio.gather(*(subject.vector(text) for text in TEXTS))
        await asyncio.sleep(0)
        for each in doomed:
            each.cancel()
        assert np.abs(np.array(await others) - expected).max() < CLOSE
        assert all(
            isinstance(each, asyncio.CancelledError) for each in await asyncio.gather(*doomed, return_exceptions=True)
        )
        assert subject.embedder.open_requests == 0
        await until(lambda: not subject.embedder._worker._jobs)


async def test_a_small_request_does_not_wait_for_a_large_one(bert: Path) -> None:
    async with embedding(bert) as subject:
        large = asyncio.ensure_future(subject.vectors([(9,) * 100] * 200))
        while subject.embedder.open_requests < 1:  # noqa: ASYNC110  (a state without an event)
            await asyncio.sleep(0)
        await subject.vector("small")
        assert not large.done()
        assert len(await large) == 200


async def test_a_full_queue_is_refused_with_figures_and_a_time_and_nobody_is_lost(bert: Path) -> None:
    async with embedding(bert, queue_size=2) as subject:
        accepted = [asyncio.ensure_future(subject.vectors([(9,) * 128] * 20)) for _ in range(3)]
        while subject.embedder.open_requests < 3:  # noqa: ASYNC110  (a state without an event)
            await asyncio.sleep(0)
        assert subject.embedder.open_requests > subject.embedder.config.queue_size
        with pytest.raises(OverloadedError, match="3 requests for embeddings wait; 2 may wait beside one") as refusal:
            await subject.vector("one more")
        assert refusal.value.retry_after_s is not None
        assert 1 <= refusal.value.retry_after_s <= 60
        assert [len(each) for each in await asyncio.gather(*accepted)] == [20] * 3
        assert not subject.embedder.queue_full
        assert np.isfinite(await subject.vector("one more")).all()


async def test_chats_have_the_same_tokens_with_embeddings_beside_them(tiny_model_path: Path) -> None:
    sampling = SamplingParams(temperature=0, max_tokens=150, top_logprobs=2, ignore_eos=True)

    async def chats(subject: EngineUnderTest) -> list[object]:
        first = [subject.engine.submit(await subject.tokens(text), sampling) for text in TEXTS[:3]]
        answers = [answer for [answer] in await asyncio.gather(*map(collect, first))]
        again = subject.engine.submit(await subject.tokens(TEXTS[0]), sampling)  # on cells that the first left
        return [*answers, *await collect(again), again.usage.cached_tokens]

    async with running(tiny_model_path, cells=1024) as subject:
        *expected, cached = await chats(subject)
    async with (
        running(tiny_model_path, cells=1024) as subject,
        embedding(tiny_model_path, shared=subject.engine.share_model()) as beside,
    ):
        stop = asyncio.Event()

        async def embed() -> int:
            rounds = 0
            while not stop.is_set():
                await beside.vectors(TEXTS)
                rounds += 1
            return rounds

        embedding_task = asyncio.ensure_future(embed())
        *answers, cached_beside = await chats(subject)
        stop.set()
        assert await embedding_task > 0
    assert cached_beside == cached
    assert cached
    assert all(close_to(ours, theirs) for ours, theirs in zip(answers, expected, strict=True))  # type: ignore[arg-type]


async def test_shared_weights_outlive_the_chat_that_loaded_them(tiny_model_path: Path) -> None:
    engine = await LlamaEngine.load("tiny:1", tiny_model_path, ENGINE_CONFIG, Metrics().for_model("tiny:1"))
    shared = engine.share_model()
    async with embedding(tiny_model_path, shared=shared) as subject, embedding(tiny_model_path) as own:
        await engine.close()
        assert np.abs(await subject.vectors(TEXTS) - await own.vectors(TEXTS)).max() < CLOSE
        assert shared.handle
    assert shared.handle is None
    with pytest.raises(EngineError, match="unloaded"):
        shared.share()


# What goes wrong


def failing(subject: EmbedderUnderTest, monkeypatch: pytest.MonkeyPatch, bad: int, code: int) -> None:
    """Let every batch with the token `bad` in it fail with a code, or with vectors that are not numbers for 0."""
    context = subject.embedder._worker.context
    embed = context.embed

    def broken(inputs: list[array[int]]) -> tuple[int, npt.NDArray[np.float32]]:
        if any(bad in each for each in inputs):
            return code, np.full((len(inputs), context.dimensions), np.nan, np.float32)
        return embed(inputs)

    monkeypatch.setattr(context, "embed", broken)


@pytest.mark.parametrize(("code", "told"), [(-3, "code -3"), (0, "not a number")])
async def test_an_input_that_fails_fails_its_own_request_only(
    bert: Path, monkeypatch: pytest.MonkeyPatch, code: int, told: str
) -> None:
    async with embedding(bert) as subject:
        expected = await subject.vectors(TEXTS)
        failing(subject, monkeypatch, 99, code)
        results = await asyncio.gather(
            subject.vectors(TEXTS[:3]),
            subject.vectors([(7,), (8, 99), (7,)]),
            subject.vectors(TEXTS[3:]),
            return_exceptions=True,
        )
        assert isinstance(results[1], EngineError)
        assert told in str(results[1])
        assert np.abs(np.vstack([results[0], results[2]]) - expected).max() < CLOSE  # type: ignore[list-item]
        assert subject.embedder.open_requests == 0
        assert not subject.embedder.ended.done()


async def test_failure_after_failure_ends_the_thread_and_everyone_hears_of_it(
    bert: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with embedding(bert) as subject:
        failing(subject, monkeypatch, 99, -3)
        results = await asyncio.gather(*(subject.vectors([(99,)]) for _ in range(4)), return_exceptions=True)
        assert all(isinstance(each, EngineError) for each in results)
        error = await asyncio.wait_for(asyncio.shield(subject.embedder.ended), DEADLINE_S)
        assert error is not None
        assert error.code == "engine_died"
        assert subject.embedder.heartbeat_age_s == float("inf")
        with pytest.raises(EngineError, match="has ended"):
            await subject.embedder.embed([array("i", [7])])


async def test_unloading_ends_open_requests_with_an_error(bert: Path) -> None:
    async with embedding(bert) as subject:
        waiting = asyncio.ensure_future(subject.vectors([(9,) * 128] * 400))
        while subject.embedder.open_requests < 1:  # noqa: ASYNC110  (a state without an event)
            await asyncio.sleep(0)
        await subject.embedder.close()
        with pytest.raises(EngineError, match="unloaded"):
            await waiting


async def test_a_file_that_is_no_model_is_refused(tmp_path: Path) -> None:
    bad = tmp_path / "bad.gguf"
    bad.write_bytes(b"GGUF" + bytes(100))
    with pytest.raises(ModelFileError, match=r"cannot load bad\.gguf"):
        async with embedding(bad):
            pass


async def test_a_reranker_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelFileError, match="pooling type 4"):
        async with embedding(write_tiny_bert(tmp_path / "rank.gguf", pooling=gguf.PoolingType.RANK)):
            pass


@pytest.fixture
def spoilt(bert: Path) -> Path:
    data = bytearray(bert.read_bytes())
    data[-20_000:] = b"\xff" * 20_000
    bert.write_bytes(data)
    return bert


async def test_weights_that_are_no_numbers_are_refused_at_warm_up(spoilt: Path) -> None:
    with pytest.raises(EngineError, match="not numbers"):
        async with embedding(spoilt):
            pass


async def test_the_heart_beats_between_the_pieces_of_a_long_input(tiny_model_path: Path) -> None:
    async with embedding(tiny_model_path, longest_input=512) as subject:
        worker = subject.embedder._worker
        beats: list[float] = []
        worker.context._on_piece = lambda: beats.append(subject.embedder.heartbeat_age_s)
        await subject.vector((9,) * 500)
        assert len(beats) == 4
        worker.context._on_piece = worker._beat
        assert subject.embedder.heartbeat_age_s < DEADLINE_S


async def test_metrics_tell_what_was_done(bert: Path) -> None:
    async with embedding(bert) as subject:
        await subject.vectors([(7, 8), (9,)])
        text = subject.metrics.render().decode()
    assert 'appliance_prompt_tokens_total{model="tiny:1"} 3.0' in text
    assert 'appliance_request_success_total{finish_reason="stop",model="tiny:1"} 1.0' in text
    assert 'appliance_num_requests_running{model="tiny:1"} 0.0' in text
    assert 'appliance_num_requests_waiting{model="tiny:1"} 0.0' in text
    assert 'appliance_e2e_request_latency_seconds_count{model="tiny:1"} 1.0' in text


async def until(true: Callable[[], bool]) -> None:
    """Give the loop its turns until something is true."""
    async with asyncio.timeout(DEADLINE_S):
        while not true():  # noqa: ASYNC110  (what is waited for happens in another thread, without an event)
            await asyncio.sleep(0)
