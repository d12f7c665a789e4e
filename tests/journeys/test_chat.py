"""The first journey on the real default model, by the official client and against llama.cpp itself."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pytest
from openai.types.chat import ChatCompletionMessageParam

from appliance.core.settings import Settings
from appliance.registry.versions import open_registry
from appliance.store.database import Database
from tests.journeys.processes import ServerProcess, server_process

pytestmark = [pytest.mark.journey, pytest.mark.timeout(300)]

MODEL = "smollm2-135m-instruct"
WATER: list[ChatCompletionMessageParam] = [
    {"role": "user", "content": "At what temperature does water boil? Answer in one sentence."}
]


@pytest.fixture(scope="module")
def server(real_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    with server_process(real_data, tmp_path_factory.mktemp("server")) as subject:
        subject.wait_until_ready()
        yield subject


@pytest.fixture(scope="module")
def client(server: ServerProcess) -> Iterator[openai.OpenAI]:
    with server.client() as subject:
        yield subject


def test_it_answers_a_question_with_true_counts(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(model=MODEL, messages=WATER, temperature=0, max_completion_tokens=60)
    text = answer.choices[0].message.content
    assert text
    assert "100" in text or "212" in text
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage is not None
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
    assert answer.usage.prompt_tokens > 20


def test_a_streamed_answer_is_the_same_text(client: openai.OpenAI) -> None:
    whole = client.chat.completions.create(model=MODEL, messages=WATER, temperature=0, max_completion_tokens=40)
    chunks = list(
        client.chat.completions.create(
            model=MODEL,
            messages=WATER,
            temperature=0,
            max_completion_tokens=40,
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    text = "".join(each.choices[0].delta.content or "" for each in chunks if each.choices)
    assert text == whole.choices[0].message.content
    assert len({each.id for each in chunks}) == 1
    assert chunks[-1].usage is not None
    assert whole.usage is not None
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens


def test_the_next_turn_reads_only_what_is_new(client: openai.OpenAI) -> None:
    messages: list[ChatCompletionMessageParam] = [
        {"role": "system", "content": "You are a careful technician. " * 20},
        {"role": "user", "content": "The pump is loud. What should I check first?"},
    ]
    first = client.chat.completions.create(model=MODEL, messages=messages, temperature=0, max_completion_tokens=30)
    text = first.choices[0].message.content
    assert text
    messages += [{"role": "assistant", "content": text}, {"role": "user", "content": "And then?"}]
    second = client.chat.completions.create(model=MODEL, messages=messages, temperature=0, max_completion_tokens=10)
    assert first.usage is not None
    assert second.usage is not None
    assert second.usage.prompt_tokens_details is not None
    assert second.usage.prompt_tokens_details.cached_tokens is not None
    assert second.usage.prompt_tokens_details.cached_tokens >= first.usage.prompt_tokens


def test_chinese_comes_back_whole(client: openai.OpenAI) -> None:
    prompt = "你好，世界。" * 4
    chunks = client.completions.create(model=MODEL, prompt=prompt, temperature=0, max_tokens=40, stream=True)
    text = "".join(each.choices[0].text for each in chunks if each.choices)
    assert text.startswith("你好")
    assert "�" not in text


def test_choices_logprobs_and_plain_completions(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model=MODEL, messages=WATER, n=3, seed=7, max_completion_tokens=12, logprobs=True, top_logprobs=2
    )
    assert [each.index for each in answer.choices] == [0, 1, 2]
    for choice in answer.choices:
        assert choice.logprobs is not None
        assert choice.logprobs.content
        assert "".join(each.token for each in choice.logprobs.content).startswith(choice.message.content or "?")
    plain = client.completions.create(model=MODEL, prompt="The capital of France is", temperature=0, max_tokens=3)
    assert "Paris" in plain.choices[0].text


def test_the_models_own_distribution_is_llama_cpps(
    server: ServerProcess, client: openai.OpenAI, real_data: Path
) -> None:
    """The reference is llama-cpp-python's own class, cold and alone."""
    import llama_cpp

    database = Database(real_data / "appliance.db", read_only=True)
    path = open_registry(Settings(data_dir=real_data), database).resolve(MODEL).files[0].path
    database.close()
    reference: Any = llama_cpp.Llama(str(path), n_ctx=256, n_threads=1, verbose=False, flash_attn=False)
    prompts = ["The capital of France is", "def fibonacci(n):\n", "水在多少度沸腾？"]
    for prompt in [*prompts, *prompts]:  # the second time from the cache
        answer = client.completions.create(model=MODEL, prompt=prompt, temperature=0, max_tokens=1, logprobs=5)
        reference.reset()
        reference.eval(reference.tokenize(prompt.encode(), add_bos=False))
        scores = np.ctypeslib.as_array(llama_cpp.llama_get_logits(reference.ctx), shape=(reference.n_vocab(),))
        scores = scores.astype(np.float64) - scores.max()
        scores -= math.log(np.exp(scores).sum())
        assert answer.choices[0].logprobs is not None
        assert answer.choices[0].logprobs.top_logprobs
        told = sorted(answer.choices[0].logprobs.top_logprobs[0].values(), reverse=True)
        assert told == pytest.approx(sorted(scores.tolist(), reverse=True)[: len(told)], abs=0.01)


def test_what_was_done_is_in_the_metrics(server: ServerProcess, client: openai.OpenAI) -> None:
    before = server.metric("appliance_generation_tokens_total")
    client.completions.create(
        model=MODEL, prompt="One, two,", temperature=0, max_tokens=5, extra_body={"ignore_eos": True}
    )
    assert server.metric("appliance_generation_tokens_total") == before + 5
    assert server.metric("appliance_kv_cache_usage_ratio") > 0
