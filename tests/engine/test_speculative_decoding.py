"""Speculation on real llama.cpp: answers are what they are without it, wherever they end and however they are drawn."""

from __future__ import annotations

import itertools
import math
from array import array
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from appliance.core.errors import EngineError
from appliance.core.types import FinishReason, SamplingParams
from appliance.engine.llama.context import Logits
from appliance.engine.llama.cost import StepCost
from appliance.engine.llama.step import Operation, Run, Truncate
from tests.engine.conftest import Answer, EngineUnderTest, collect, running
from tests.engine.test_engine import NOISE, close_to
from tests.tiny_gguf import Architecture, write_tiny_llama

pytestmark = pytest.mark.anyio

LETTERS = (70, 80, 90)
"""Three tokens that a bias makes the only ones, so that any answer repeats itself, and is often guessed wrongly too."""
BIAS = dict.fromkeys(LETTERS, 60.0)
PROMPT = [70, 80, 90, 80, 70, 70, 80, 80, 90, 90, 70, 80]


HOT = 3.0
"""A temperature at which every answer of a few letters is drawn often enough to be counted."""


class SteadyCost(StepCost):
    """Costs as if guesses were cheap, whatever the clock says: the same guesses are checked in every run."""

    def __init__(self) -> None:
        super().__init__()
        super().observe(decoding=1, prefill_tokens=0, seconds=0.02)
        for _ in range(16):
            super().observe(decoding=1, prefill_tokens=0, draft_tokens=1, seconds=0.02)

    def observe(
        self, *, decoding: int, prefill_tokens: int, seconds: float, cells: int = 0, draft_tokens: int = 0
    ) -> None:
        pass


@asynccontextmanager
async def engine(path: Path, speculation: str, **changes: Any) -> AsyncIterator[EngineUnderTest]:
    async with running(path, speculation=speculation, **changes) as subject:
        scheduler = subject.engine._worker.runner.scheduler
        scheduler.cost = SteadyCost()
        yield subject
        await subject.until(lambda: scheduler.idle)
        scheduler.check_integrity()


@pytest.fixture
async def plain(tiny_model_path: Path) -> AsyncIterator[EngineUnderTest]:
    async with engine(tiny_model_path, "off") as subject:
        yield subject


@pytest.fixture
async def guessing(tiny_model_path: Path) -> AsyncIterator[EngineUnderTest]:
    async with engine(tiny_model_path, "auto") as subject:
        yield subject


async def ask(
    subject: EngineUnderTest, prompt: Sequence[int] = PROMPT, *, n: int = 1, **parameters: Any
) -> list[Answer]:
    merged = {"temperature": 0, "max_tokens": 40, "top_logprobs": 2, "ignore_eos": True, "logit_bias": BIAS}
    sampling = SamplingParams(**{**merged, **parameters})
    return await collect(subject.engine.submit(list(prompt), sampling, n=n), n)


def guesses(subject: EngineUnderTest) -> tuple[int, int]:
    """Return how many guessed tokens were checked, and how many were right."""
    lines = subject.metrics.render().decode().splitlines()
    checked, right = (
        int(float(line.split()[-1]))
        for name in ("draft", "accepted")
        for line in lines
        if line.startswith(f"appliance_spec_decode_num_{name}_tokens_total{{")
    )
    return checked, right


def same(answer: Answer, expected: Answer) -> bool:
    """Return whether two answers are the same, log probabilities within what the composition of batches changes."""
    return (
        (answer.text, answer.reason, answer.token_ids) == (expected.text, expected.reason, expected.token_ids)
        and answer.logprobs == pytest.approx(expected.logprobs, abs=NOISE)
        and sum(each.token_count for each in answer.deltas) == sum(each.token_count for each in expected.deltas)
    )


@pytest.mark.parametrize("architecture", ["llama", "gemma2"])
async def test_greedy_answers_are_the_same_and_take_fewer_steps(tmp_path: Path, architecture: Architecture) -> None:
    path = write_tiny_llama(tmp_path / "m.gguf", architecture=architecture)
    prompts = [PROMPT[start:] + PROMPT[:start] for start in range(6)]
    async with engine(path, "off") as plain:
        expected = [(await ask(plain, each, max_tokens=80))[0] for each in prompts]
        assert guesses(plain) == (0, 0)
    async with engine(path, "auto") as guessing:
        answers = [(await ask(guessing, each, max_tokens=80))[0] for each in prompts]
        checked, right = guesses(guessing)
    assert all(same(a, b) or close_to(a, b) for a, b in zip(answers, expected, strict=True))
    assert 100 < right < checked
    assert sum(len(each.deltas) for each in answers) == sum(len(each.deltas) for each in expected) - right


async def test_a_recurrent_memory_guesses_nothing(tmp_path: Path) -> None:
    path = write_tiny_llama(tmp_path / "m.gguf", architecture="mamba")
    async with engine(path, "auto") as subject:
        await ask(subject)
        assert guesses(subject) == (0, 0)


@pytest.mark.parametrize("penalty", [{"frequency_penalty": 1.0}, {"presence_penalty": 1.5}, {"repeat_penalty": 1.3}])
async def test_penalties_see_the_same_past(
    plain: EngineUnderTest, guessing: EngineUnderTest, penalty: dict[str, Any]
) -> None:
    [expected], [answer] = [await ask(each, **penalty) for each in (plain, guessing)]
    assert same(answer, expected)
    assert guesses(guessing)[0] > 0


async def test_a_seed_draws_the_same_answer(plain: EngineUnderTest, guessing: EngineUnderTest) -> None:
    equal = 0
    for seed in range(8):
        [expected], [answer] = [await ask(each, temperature=1.0, seed=seed) for each in (plain, guessing)]
        equal += same(answer, expected)
    checked, right = guesses(guessing)
    assert 0 < right < checked
    assert equal >= 7  # a draw may fall between what two compositions of a batch give


async def test_choices_of_one_request_draw_the_same_answers(plain: EngineUnderTest, guessing: EngineUnderTest) -> None:
    expected, answers = [await ask(each, n=2, temperature=0.7, seed=4, max_tokens=20) for each in (plain, guessing)]
    assert all(same(a, b) for a, b in zip(answers, expected, strict=True))
    assert guesses(guessing)[0] > 0


@pytest.mark.parametrize("length", range(1, 16))
async def test_an_answer_is_as_long_as_asked_for(
    plain: EngineUnderTest, guessing: EngineUnderTest, length: int
) -> None:
    [expected], [answer] = [await ask(each, max_tokens=length) for each in (plain, guessing)]
    assert same(answer, expected)
    assert (len(answer.token_ids), answer.reason) == (length, FinishReason.LENGTH)


@pytest.mark.parametrize("at", [3, 10, 17, 24, 31])
async def test_a_stop_string_inside_right_guesses_ends_the_answer_there(
    plain: EngineUnderTest, guessing: EngineUnderTest, at: int
) -> None:
    [free] = await ask(plain)
    stop = (free.text[at : at + 3],)
    [expected], [answer] = [await ask(each, stop=stop) for each in (plain, guessing)]
    assert answer.reason == FinishReason.STOP
    assert same(answer, expected)
    [after], [expected_after] = [await ask(each, [*PROMPT, *answer.token_ids, 70]) for each in (guessing, plain)]
    assert same(after, expected_after)


@pytest.mark.parametrize("letter", LETTERS)
async def test_a_stop_token_inside_right_guesses_ends_the_answer_before_it(
    plain: EngineUnderTest, guessing: EngineUnderTest, letter: int
) -> None:
    prompt = [each for each in PROMPT if each != letter] * 3
    [expected], [answer] = [await ask(each, prompt, stop_token_ids=(letter,)) for each in (plain, guessing)]
    assert same(answer, expected)


@pytest.mark.parametrize("architecture", ["llama", "gemma2"])
async def test_after_wrong_guesses_the_past_is_that_of_a_cold_run(tmp_path: Path, architecture: Architecture) -> None:
    path = write_tiny_llama(tmp_path / "m.gguf", architecture=architecture)
    async with engine(path, "auto") as warm:
        [first] = await ask(warm, temperature=1.0, seed=1)
        checked, right = guesses(warm)
        assert right < checked
        turn = [*PROMPT, *first.token_ids, 75, 85]
        generation = warm.engine.submit(turn, SamplingParams(temperature=0, max_tokens=8, top_logprobs=2))
        [answer] = await collect(generation)
        assert generation.usage.cached_tokens >= len(PROMPT) + len(first.token_ids) - 1
    async with engine(path, "off") as cold:
        [expected] = await collect(
            cold.engine.submit(turn, SamplingParams(temperature=0, max_tokens=8, top_logprobs=2))
        )
    assert close_to(answer, expected)


async def test_no_room_for_guesses_in_native_memory_costs_the_guesses_only(
    plain: EngineUnderTest, guessing: EngineUnderTest, monkeypatch: pytest.MonkeyPatch
) -> None:
    context = guessing.engine._worker.runner.context
    decode = context.decode
    monkeypatch.setattr(context, "decode", lambda runs: 1 if any(run.drafts for run in runs) else decode(runs))
    [expected], [answer] = [await ask(each) for each in (plain, guessing)]
    assert same(answer, expected)
    assert guesses(guessing) == (0, 0)
    assert guessing.engine._worker.runner.scheduler.preemptions == 0


async def test_a_past_that_cannot_be_cut_back_is_computed_again(
    plain: EngineUnderTest, guessing: EngineUnderTest, monkeypatch: pytest.MonkeyPatch
) -> None:
    context = guessing.engine._worker.runner.context
    apply = context.apply
    lost: list[Operation] = []

    def lose(operation: Truncate) -> bool:
        if operation.length == 0 or lost:
            return apply(operation)
        lost.append(operation)
        apply(Truncate(operation.slot, 0))
        return False

    monkeypatch.setattr(context, "apply", lose)
    [expected], [answer] = [await ask(each) for each in (plain, guessing)]
    assert lost
    assert same(answer, expected)


async def test_what_is_no_number_behind_a_guess_fails_its_request_only(
    guessing: EngineUnderTest, monkeypatch: pytest.MonkeyPatch
) -> None:
    context = guessing.engine._worker.runner.context
    read = context.logits

    def damaged() -> Logits:
        logits = read().copy()
        logits[1:] = math.nan
        return logits

    monkeypatch.setattr(context, "logits", damaged)
    with pytest.raises(EngineError, match="not a number"):
        await ask(guessing, max_tokens=80)
    monkeypatch.undo()
    [answer] = await ask(guessing)
    assert answer.reason == FinishReason.LENGTH


async def probabilities(subject: EngineUnderTest, prompt: list[int]) -> dict[int, float]:
    """Return how likely each letter is after a prompt at `HOT`, by the model's own log probabilities."""
    everything = subject.engine.vocabulary_size
    [answer] = await ask(subject, prompt, max_tokens=1, top_logprobs=everything)
    told = {token: math.exp(logprob / HOT) for token, _, logprob in answer.told[0].top if token in LETTERS}
    total = sum(told.values())
    return {token: each / total for token, each in told.items()}


async def test_the_distribution_of_answers_is_the_models(plain: EngineUnderTest, guessing: EngineUnderTest) -> None:
    """Pearson's chi-square over all answers of three tokens; 54.05 is exceeded by chance once in a thousand."""
    expected = dict.fromkeys(itertools.product(LETTERS, repeat=3), 1.0)
    for place in range(3):
        for begun in itertools.product(LETTERS, repeat=place):
            chances = await probabilities(plain, [*PROMPT, *begun])
            for answer in expected:
                if answer[:place] == begun:
                    expected[answer] *= chances[answer[place]]
    draws = 900
    drawn: Counter[tuple[int, ...]] = Counter()
    for seed in range(draws):
        [answer_drawn] = await ask(guessing, temperature=HOT, seed=seed, max_tokens=4, top_logprobs=0)
        drawn[tuple(answer_drawn.token_ids[:3])] += 1
    checked, right = guesses(guessing)
    assert draws / 4 < right < checked
    assert min(expected.values()) * draws > 5, "the approximation needs that many of each"
    deviation = sum((drawn[each] - draws * p) ** 2 / (draws * p) for each, p in expected.items())
    assert deviation < 54.05


async def test_the_guesses_of_a_run_lie_behind_its_own_tokens(guessing: EngineUnderTest) -> None:
    """What is decoded at each position is the token in front and then the guesses; every one of them has logits."""
    seen: list[Run] = []
    context = guessing.engine._worker.runner.context
    decode = context.decode

    def watch(runs: Sequence[Run]) -> int:
        seen.extend(run for run in runs if run.drafts)
        code = decode(runs)
        for run in runs:
            if run.drafts:
                tokens = context._tokens[: run.count].tolist()
                assert tokens == [run.sequence.tokens[run.start], *run.drafts]
                assert context._positions[: run.count].tolist() == list(range(run.start, run.start + run.count))
                assert context.outputs == list(range(run.count))
        return code

    context.decode = watch  # type: ignore[method-assign]
    await ask(guessing)
    assert seen
    assert array("i", seen[0].drafts)
