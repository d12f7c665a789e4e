"""Deltas on their way to the client."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from appliance.api.choices import Choices, DeltaBuffer
from appliance.core.errors import EngineError, OverloadedError
from appliance.core.types import Delta, FinishReason, GenerationRequest, SamplingParams, Timings, TokenLogprob, Usage
from tests.api.boxes import until
from tests.api.scripted import TIMINGS, ScriptedModels, Step, say

deltas = st.builds(
    Delta,
    index=st.integers(0, 3),
    text=st.text(max_size=3),
    token_count=st.integers(0, 3),
    logprobs=st.lists(st.builds(TokenLogprob, st.integers(0, 9), st.binary(max_size=2), st.just(-1.0))).map(tuple),
)


@given(st.lists(st.tuples(deltas, st.booleans())))
def test_merging_loses_nothing_and_keeps_each_choices_order(steps: list[tuple[Delta, bool]]) -> None:
    buffer, taken = DeltaBuffer(), list[Delta]()
    for delta, drain in steps:
        buffer.add(delta)
        assert buffer
        if drain:
            batch = buffer.drain()
            assert len({each.index for each in batch}) == len(batch)
            assert not buffer
            taken += batch
    taken += buffer.drain()
    for index in range(4):
        given_, got = [d for d, _ in steps if d.index == index], [d for d in taken if d.index == index]
        assert "".join(d.text for d in got) == "".join(d.text for d in given_)
        assert sum(d.token_count for d in got) == sum(d.token_count for d in given_)
        assert [p for d in got for p in d.logprobs] == [p for d in given_ for p in d.logprobs]


def request(prompt: str = "Hello", n: int = 1) -> GenerationRequest:
    return GenerationRequest(model="tiny", prompt=prompt, sampling=SamplingParams(), n=n)


async def choices_of(models: ScriptedModels, *prompts: str, n: int = 1) -> Choices:
    return await Choices.accept(models, [request(prompt, n) for prompt in prompts])


class Taken(list[Sequence[Delta]]):
    """Remembers every batch."""

    async def take(self, batch: Sequence[Delta]) -> None:
        self.append(batch)

    @property
    def text(self) -> str:
        return "".join(delta.text for batch in self for delta in batch)


@pytest.mark.anyio
async def test_several_prompts_are_numbered_through() -> None:
    choices = await choices_of(ScriptedModels(), "One", "Two", n=2)
    whole = await choices.collect()
    assert [(each.index, each.text, each.finish_reason) for each in whole] == [
        (index, "Hello, 世界!", FinishReason.STOP) for index in range(4)
    ]
    assert choices.model == "tiny:1"
    assert choices.usage == Usage(prompt_tokens=6, completion_tokens=16, cached_tokens=2)
    assert choices.timings == TIMINGS


@pytest.mark.anyio
async def test_times_of_several_generations_are_the_longest_ones() -> None:
    models = ScriptedModels()
    choices = await choices_of(models, "One", "Two")
    models.generations[1].__class__ = type(
        "Slower", (type(models.generations[1]),), {"timings": property(lambda _: Timings(9.0, 0.1, 9.0))}
    )
    assert choices.timings == Timings(9.0, 0.5, 9.0)


@pytest.mark.anyio
async def test_if_one_prompt_is_refused_the_accepted_ones_are_cancelled() -> None:
    models = ScriptedModels()
    accepted: list[GenerationRequest] = []

    def script(each: GenerationRequest) -> list[Step]:
        accepted.append(each)
        if len(accepted) == 2:
            models.refusals.append(OverloadedError("The queue is full."))
        return list(say("Hello"))

    models.script = script
    with pytest.raises(OverloadedError):
        await choices_of(models, "One", "Two", "Three")
    assert [each.cancelled.is_set() for each in models.generations] == [True, True]


@pytest.mark.anyio
async def test_a_slow_taker_gets_what_came_meanwhile_in_one_piece() -> None:
    models = ScriptedModels()
    models.script = lambda _: say(*"abcdefgh")
    choices = await choices_of(models, "Hello")
    taken = Taken()

    async def take(batch: Sequence[Delta]) -> None:
        await taken.take(batch)
        await until(lambda: models.generations[0].ended)

    await choices.run(take)
    assert taken.text == "abcdefgh"
    assert len(taken) == 2


@pytest.mark.anyio
async def test_silence_is_told_and_the_end_is_not_taken_for_silence() -> None:
    models = ScriptedModels()
    go = asyncio.Event()
    models.script = lambda _: [go, *say("Hello")]
    choices = await choices_of(models, "Hello")
    taken = Taken()

    async def take(batch: Sequence[Delta]) -> None:
        await taken.take(batch)
        if len(taken) == 2:
            go.set()

    await choices.run(take, idle_s=0.01)
    assert taken[:2] == [(), ()]
    assert taken.text == "Hello"
    assert taken[-1]


@pytest.mark.anyio
async def test_what_came_before_an_error_is_handed_over_and_the_others_are_cancelled() -> None:
    models = ScriptedModels()
    models.script = lambda each: (
        [*say("Half")[:1], EngineError("Broken.")] if each.prompt == "One" else [*say("Other")[:1], asyncio.Event()]
    )
    choices = await choices_of(models, "One", "Two")
    taken = Taken()
    with pytest.raises(EngineError, match="Broken"):
        await choices.run(taken.take)
    assert "Half" in taken.text
    assert models.generations[1].cancelled.is_set()


@pytest.mark.anyio
async def test_a_mistake_in_an_engine_is_raised_as_itself() -> None:
    models = ScriptedModels()
    models.script = lambda each: [KeyError("mine")] if each.prompt == "One" else [asyncio.Event()]
    choices = await choices_of(models, "One", "Two")
    with pytest.raises(KeyError, match="mine"):
        await choices.collect()
    assert models.generations[1].cancelled.is_set()


@pytest.mark.anyio
async def test_a_choice_without_an_end_is_an_error_and_not_half_an_answer() -> None:
    models = ScriptedModels()
    models.script = lambda _: say("Half")[:1]
    with pytest.raises(EngineError, match="1 choices ended without a reason"):
        await (await choices_of(models, "Hello")).collect()
