"""Deltas on their way to the client."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable, Sequence
from typing import Any, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from appliance.api.choices import Arrivals, Choices, merged
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


@given(st.lists(deltas))
def test_merging_loses_nothing_and_keeps_each_choices_order(came: list[Delta]) -> None:
    whole = merged(came)
    assert [each.index for each in whole] == list(dict.fromkeys(each.index for each in came))
    for got in whole:
        given_ = [each for each in came if each.index == got.index]
        assert got.text == "".join(each.text for each in given_)
        assert got.token_count == sum(each.token_count for each in given_)
        assert got.logprobs == tuple(each for delta in given_ for each in delta.logprobs)


Timer = tuple[float, Callable[[], object]]


class HandTurnedLoop:
    """The clock and the timers of a loop, as far as a test turns them.

    Attributes:
        timers: When each that is set will fire, and what it calls.
        armed: How many were ever set.
    """

    def __init__(self) -> None:
        self.now = 0.0
        self.timers: list[Timer] = []
        self.armed = 0

    def time(self) -> float:
        return self.now

    def create_future(self) -> asyncio.Future[Any]:
        return asyncio.get_running_loop().create_future()

    def call_later(self, delay: float, callback: Callable[..., object], *args: object) -> Timer:
        return self.call_at(self.now + delay, callback, *args)

    def call_at(self, when: float, callback: Callable[..., object], *args: object) -> Timer:
        assert when > self.now
        self.armed += 1
        self.timers.append((when, lambda: callback(*args)))
        return self.timers[-1]

    def turn(self, seconds: float) -> None:
        """Let time pass."""
        end = self.now + seconds
        while due := sorted((each for each in self.timers if each[0] <= end), key=lambda each: each[0]):
            self.timers.remove(due[0])
            self.now = due[0][0]
            due[0][1]()
        self.now = end


@given(st.lists(st.tuples(st.integers(0, 25), st.integers(0, 25)), max_size=60))
def test_a_silence_is_as_long_as_it_was_set_and_arrivals_need_no_timer_each(steps: list[tuple[int, int]]) -> None:
    idle_s = 10

    async def play() -> None:
        loop = HandTurnedLoop()
        arrivals = Arrivals(cast("asyncio.AbstractEventLoop", loop), idle_s)
        for busy, gap in steps:
            loop.turn(busy)  # nobody waits while the client is written to
            wait = asyncio.ensure_future(arrivals.wait())
            await asyncio.sleep(0)
            loop.turn(min(gap, idle_s - 1))
            arrivals.note() if gap < idle_s else loop.turn(1)
            assert await wait == (gap < idle_s)
            assert len(loop.timers) <= 1
        assert loop.armed <= 2 * loop.now / idle_s + 1

    asyncio.run(play())


@pytest.mark.anyio
async def test_nothing_is_left_behind_by_a_wait_that_is_given_up() -> None:
    loop = asyncio.get_running_loop()
    arrivals = Arrivals(loop, 1000)
    wait = loop.create_task(arrivals.wait())
    await asyncio.sleep(0)
    timer = arrivals._timer
    assert timer is not None
    wait.cancel()
    await asyncio.wait([wait])
    arrivals.note()
    arrivals.close()
    assert timer.cancelled()


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
async def test_what_several_choices_gain_in_one_step_is_taken_at_once() -> None:
    models = ScriptedModels()
    go = asyncio.Event()
    models.script = lambda each: [go, *(Delta(index, "Hello", 1, (), FinishReason.STOP) for index in range(each.n))]
    choices = await choices_of(models, "One", "Two", "Three")
    taken = Taken()

    async def take(batch: Sequence[Delta]) -> None:
        await taken.take(batch)
        go.set()

    await choices.run(take, idle_s=0.01)
    assert [[each.index for each in batch] for batch in taken] == [[], [0, 1, 2]]


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
async def test_one_that_goes_on_does_not_hide_the_error_of_another() -> None:
    models = ScriptedModels()
    endless = Delta(0, "more", 1)
    models.script = lambda each: [EngineError("Broken.")] if each.prompt == "One" else itertools.repeat(endless)
    choices = await choices_of(models, "One", "Two")
    with pytest.raises(EngineError, match="Broken"):
        await choices.run(Taken().take)
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
