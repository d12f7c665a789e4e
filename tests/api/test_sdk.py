"""The official client against a box that listens, on a scripted floor and on a real engine."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import anyio.to_thread
import openai
import pytest
from openai.types.chat import ChatCompletionMessageParam

from appliance.core.errors import EngineError, OverloadedError, UnavailableError
from tests.api.boxes import Box, ScriptedBox, scripted_box
from tests.api.scripted import say

pytestmark = pytest.mark.anyio

HELLO: list[ChatCompletionMessageParam] = [{"role": "user", "content": "Hello"}]


def client_of(box: Box, key: str = "any") -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(base_url=f"{box.url}/v1", api_key=key, max_retries=0, timeout=60)


@pytest.fixture
async def client(any_box: Box) -> AsyncIterator[openai.AsyncOpenAI]:
    async with client_of(any_box) as each:
        yield each


async def test_models_are_listed_and_retrieved(client: openai.AsyncOpenAI) -> None:
    models = [each async for each in client.models.list()]
    assert [each.id for each in models] == ["tiny"]
    assert (await client.models.retrieve("tiny:1")).owned_by == "appliance"
    with pytest.raises(openai.NotFoundError, match="tiny"):
        await client.models.retrieve("no-such-model")


async def test_a_chat_answer_has_every_choice_and_true_counts(client: openai.AsyncOpenAI) -> None:
    answer = await client.chat.completions.create(model="tiny", messages=HELLO, max_completion_tokens=3, n=2, seed=1)
    assert [each.index for each in answer.choices] == [0, 1]
    assert all(each.finish_reason == "length" and each.message.role == "assistant" for each in answer.choices)
    assert all(each.message.content for each in answer.choices)
    assert answer.object == "chat.completion"
    assert answer.model == "tiny:1"
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 6
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + 6
    assert answer.usage.prompt_tokens_details is not None
    assert answer.usage.prompt_tokens_details.cached_tokens is not None
    assert answer.model_extra is not None
    assert set(answer.model_extra["timings"]) == {"queue_s", "prefill_s", "decode_s"}


async def test_a_stream_says_the_same_as_the_whole_answer(client: openai.AsyncOpenAI) -> None:
    whole = await client.chat.completions.create(model="tiny", messages=HELLO, max_tokens=4, temperature=0)
    stream = await client.chat.completions.create(
        model="tiny", messages=HELLO, max_tokens=4, temperature=0, stream=True, stream_options={"include_usage": True}
    )
    chunks = [chunk async for chunk in stream]
    assert len({chunk.id for chunk in chunks}) == len({chunk.created for chunk in chunks}) == 1
    *with_choices, last = chunks
    deltas = [chunk.choices[0].delta for chunk in with_choices]
    assert deltas[0].role == "assistant"
    assert [delta.role for delta in deltas[1:]] == [None] * (len(deltas) - 1)
    assert "".join(delta.content or "" for delta in deltas) == whole.choices[0].message.content
    assert deltas[-1].content is None
    assert [chunk.choices[0].finish_reason for chunk in with_choices][-1] == whole.choices[0].finish_reason
    assert all(chunk.choices[0].finish_reason is None for chunk in with_choices[:-1])
    assert all(chunk.usage is None for chunk in with_choices)
    assert last.choices == []
    assert last.usage is not None
    assert whole.usage is not None
    assert last.usage.completion_tokens == whole.usage.completion_tokens
    assert last.usage.prompt_tokens == whole.usage.prompt_tokens


async def test_an_answer_can_be_sent_back_as_the_next_turn(client: openai.AsyncOpenAI) -> None:
    first = await client.chat.completions.create(model="tiny", messages=HELLO, max_tokens=3, temperature=0)
    history = [*HELLO, first.choices[0].message, {"role": "user", "content": [{"type": "text", "text": "And then?"}]}]
    second = await client.chat.completions.create(model="tiny", messages=history, max_tokens=3)  # type: ignore[arg-type]
    assert second.usage is not None
    assert first.usage is not None
    assert second.usage.prompt_tokens > first.usage.prompt_tokens


async def test_text_completions_number_their_choices_through(client: openai.AsyncOpenAI) -> None:
    answer = await client.completions.create(model="tiny", prompt=["One", "Two"], n=2, max_tokens=2, echo=True)
    assert [each.index for each in answer.choices] == [0, 1, 2, 3]
    assert [each.text[:3] for each in answer.choices] == ["One", "One", "Two", "Two"]
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 8


async def test_a_text_completion_streams(client: openai.AsyncOpenAI) -> None:
    whole = await client.completions.create(model="tiny", prompt="One", max_tokens=4, temperature=0)
    stream = await client.completions.create(model="tiny", prompt="One", max_tokens=4, temperature=0, stream=True)
    chunks = [chunk async for chunk in stream]
    assert "".join(chunk.choices[0].text for chunk in chunks) == whole.choices[0].text
    assert chunks[-1].choices[0].finish_reason == whole.choices[0].finish_reason
    assert all(chunk.usage is None for chunk in chunks)


async def test_an_unknown_model_is_a_404_that_names_those_that_exist(client: openai.AsyncOpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="tiny") as refusal:
        await client.chat.completions.create(model="gpt-5", messages=HELLO)
    assert refusal.value.type == "not_found_error"


async def test_a_wrong_field_is_a_400_that_names_it(client: openai.AsyncOpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as refusal:
        await client.chat.completions.create(model="tiny", messages=HELLO, temperature=3)
    assert refusal.value.param == "temperature"
    with pytest.raises(openai.BadRequestError) as refusal:
        await client.chat.completions.create(model="tiny", messages=HELLO, functions=[{"name": "clock"}])
    assert (refusal.value.param, refusal.value.code) == ("functions", "unsupported_parameter")


async def test_the_synchronous_client_works_too(any_box: Box) -> None:
    def ask() -> tuple[str | None, list[str]]:
        with openai.OpenAI(base_url=f"{any_box.url}/v1", api_key="any", max_retries=0, timeout=60) as client:
            whole = client.chat.completions.create(model="tiny", messages=HELLO, max_tokens=4, temperature=0)
            with client.chat.completions.create(
                model="tiny", messages=HELLO, max_tokens=4, temperature=0, stream=True
            ) as stream:
                texts = [chunk.choices[0].delta.content or "" for chunk in stream]
        return whole.choices[0].message.content, texts

    whole, texts = await anyio.to_thread.run_sync(ask)
    assert whole == "".join(texts)


async def test_overload_carries_retry_after_and_is_retried_by_the_client(box: ScriptedBox) -> None:
    box.models.refusals = [OverloadedError("The queue is full: 64 requests wait.", retry_after_s=2.2)]
    async with client_of(box) as client:
        with pytest.raises(openai.RateLimitError) as refusal:
            await client.chat.completions.create(model="tiny", messages=HELLO)
        assert refusal.value.response.headers["retry-after"] == "3"
        assert refusal.value.code == "overloaded"
        box.models.refusals = [OverloadedError("The queue is full.", retry_after_s=0.0)]
        answer = await client.with_options(max_retries=1).chat.completions.create(model="tiny", messages=HELLO)
    assert answer.choices[0].message.content == "Hello, 世界!"
    assert len(box.models.generations) == 1


async def test_unavailable_is_a_503_with_retry_after(box: ScriptedBox) -> None:
    box.models.refusals = [UnavailableError("The model is loading.", advice="Try again soon.")]
    async with client_of(box) as client:
        with pytest.raises(openai.InternalServerError) as refusal:
            await client.chat.completions.create(model="tiny", messages=HELLO)
    assert refusal.value.status_code == 503
    assert refusal.value.response.headers["retry-after"] == "1"


async def test_an_error_inside_a_stream_reaches_the_client_behind_the_text(box: ScriptedBox) -> None:
    box.models.script = lambda _: [say("Half an ")[0], EngineError("The cells are gone.", code="engine_failed")]
    async with client_of(box) as client:
        texts: list[str | None] = []

        async def read() -> None:
            async for chunk in await client.chat.completions.create(model="tiny", messages=HELLO, stream=True):
                texts.extend(choice.delta.content for choice in chunk.choices)

        with pytest.raises(openai.APIError) as failure:
            await read()
    assert texts == ["", "Half an "]
    assert failure.value.code == "engine_failed"
    assert "cells" not in str(failure.value)


async def test_keys_are_asked_for_and_their_scopes_hold(tmp_path: Path) -> None:
    async with scripted_box(tmp_path, require_api_key=True) as box:
        assert box.keys is not None
        _, chat = box.keys.create("chat", ["inference"])
        _, scrape = box.keys.create("scrape", ["metrics"])
        async with client_of(box, "wrong") as client:
            with pytest.raises(openai.AuthenticationError) as refusal:
                await client.models.list()
            assert refusal.value.code == "invalid_api_key"
        async with client_of(box, scrape) as client:
            with pytest.raises(openai.PermissionDeniedError, match="inference"):
                await client.chat.completions.create(model="tiny", messages=HELLO)
        assert box.models.generations == []
        async with client_of(box, chat) as client:
            await client.chat.completions.create(model="tiny", messages=HELLO)
        assert box.models.requests[0].tenant.startswith("key_")


async def test_embeddings_come_as_the_client_asks_for_them(client: openai.AsyncOpenAI) -> None:
    texts = ["the quick brown fox", "why does the dog sleep"]
    told = await client.embeddings.create(model="tiny", input=texts)  # as base64, which the client decodes
    numbers = await client.embeddings.create(model="tiny", input=texts, encoding_format="float")
    assert [each.index for each in told.data] == [0, 1]
    assert [each.embedding for each in told.data] == [each.embedding for each in numbers.data]
    assert told.data[0].embedding != told.data[1].embedding
    assert told.model == "tiny:1"
    assert told.usage.prompt_tokens == told.usage.total_tokens > 0
    assert told.model_extra is not None
    assert told.model_extra["truncated"] == []
    long = await client.embeddings.create(model="tiny", input=["a", "a " * 20_000], extra_body={"truncate": True})
    assert long.model_extra is not None
    assert long.model_extra["truncated"] == [1]
    one = await client.embeddings.create(model="tiny", input=[5, 6, 7])
    assert (len(one.data), one.usage.prompt_tokens) == (1, 3)
    assert len((await client.embeddings.create(model="tiny", input=[[5, 6], [7]])).data) == 2
    with pytest.raises(openai.NotFoundError, match="tiny"):
        await client.embeddings.create(model="nobody", input="x")
    with pytest.raises(openai.BadRequestError) as refusal:
        await client.embeddings.create(model="tiny", input="")
    assert refusal.value.param == "input"
