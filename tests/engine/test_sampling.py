"""Each sampling parameter does what OpenAI and llama.cpp say it does, on a real vocabulary and real logits."""

from __future__ import annotations

import math
import resource
import statistics
from collections import Counter
from typing import Any

import pytest

from appliance.core.types import FinishReason, SamplingParams
from tests.deltas import deltas_of
from tests.engine.conftest import Answer, EngineUnderTest
from tests.tiny_gguf import END_TOKEN_ID

pytestmark = pytest.mark.anyio

PROMPT = "the quick brown fox"


async def ask(tiny: EngineUnderTest, n: int = 1, **parameters: Any) -> list[Answer]:
    merged = {"max_tokens": 24, "top_logprobs": 0, "ignore_eos": True, **parameters}
    answers, _ = await tiny.ask(PROMPT, SamplingParams(**merged), n=n)
    return answers


async def test_a_seed_repeats_the_draw_and_another_one_does_not(tiny: EngineUnderTest) -> None:
    [first], [same], [other] = [await ask(tiny, seed=seed) for seed in (1, 1, 2)]
    assert first.token_ids == same.token_ids
    assert first.token_ids != other.token_ids


async def test_without_a_seed_draws_differ(tiny: EngineUnderTest) -> None:
    [first], [second] = [await ask(tiny) for _ in range(2)]
    assert first.token_ids != second.token_ids


async def test_choices_of_one_request_differ_but_repeat_with_their_seed(tiny: EngineUnderTest) -> None:
    first, second = [await ask(tiny, n=3, seed=5) for _ in range(2)]
    assert [each.token_ids for each in first] == [each.token_ids for each in second]
    assert len({tuple(each.token_ids) for each in first}) == 3


@pytest.mark.parametrize(
    "parameters",
    [{"top_k": 1}, {"top_p": 1e-6}, {"min_p": 1.0}, {"temperature": 1e-6}],
    ids=lambda each: next(iter(each)),
)
async def test_the_narrowest_cut_is_greedy(tiny: EngineUnderTest, parameters: dict[str, Any]) -> None:
    [greedy] = await ask(tiny, temperature=0)
    [cut] = await ask(tiny, **parameters)
    assert cut.token_ids == greedy.token_ids


async def test_typical_sampling_keeps_what_is_neither_too_likely_nor_too_unlikely(tiny: EngineUnderTest) -> None:
    [answer] = await ask(tiny, typical_p=0.1, seed=3, max_tokens=100)
    [free] = await ask(tiny, seed=3, max_tokens=100)
    assert statistics.pstdev(answer.logprobs) < 0.7 * statistics.pstdev(free.logprobs)


async def test_a_high_temperature_flattens_and_a_low_one_sharpens(tiny: EngineUnderTest) -> None:
    [hot] = await ask(tiny, temperature=2.0, seed=1, max_tokens=200)
    [cold] = await ask(tiny, temperature=0.3, seed=1, max_tokens=200)
    assert sum(hot.logprobs) < sum(cold.logprobs)


async def test_bias_forces_and_bans_tokens(tiny: EngineUnderTest) -> None:
    [forced] = await ask(tiny, temperature=0, logit_bias={70: 100.0})
    assert set(forced.token_ids) == {70}
    [free] = await ask(tiny, temperature=0)
    banned = free.token_ids[0]
    [without] = await ask(tiny, temperature=0, logit_bias={banned: -100.0})
    assert banned not in without.token_ids


async def test_a_bias_does_not_touch_the_log_probabilities(tiny: EngineUnderTest) -> None:
    [plain] = await ask(tiny, temperature=0, max_tokens=1, top_logprobs=3)
    [biased] = await ask(tiny, temperature=0, max_tokens=1, top_logprobs=3, logit_bias={70: 100.0})
    assert biased.told[0].token_id == 70
    assert [each[2] for each in biased.told[0].top] == pytest.approx([each[2] for each in plain.told[0].top], abs=1e-2)


async def test_a_bias_on_an_unknown_token_changes_nothing(tiny: EngineUnderTest) -> None:
    [plain], [biased] = await ask(tiny, temperature=0), await ask(tiny, temperature=0, logit_bias={10**6: 100.0})
    assert plain.token_ids == biased.token_ids


@pytest.mark.parametrize(
    "penalty",
    [{"frequency_penalty": 2.0}, {"presence_penalty": 2.0}, {"repeat_penalty": 1.5}],
    ids=lambda each: next(iter(each)),
)
async def test_penalties_make_repetition_rarer(tiny: EngineUnderTest, penalty: dict[str, Any]) -> None:
    bias = {70: 3.0, 71: 3.0}
    [plain] = await ask(tiny, temperature=0, logit_bias=bias, max_tokens=60)
    [penalised] = await ask(tiny, temperature=0, logit_bias=bias, max_tokens=60, **penalty)
    assert max(Counter(penalised.token_ids).values()) < max(Counter(plain.token_ids).values())


async def test_frequency_penalty_looks_at_the_answer_only_and_repeat_penalty_at_the_prompt_too(
    tiny: EngineUnderTest,
) -> None:
    [plain] = await ask(tiny, temperature=0, max_tokens=1)
    likeliest = plain.token_ids[0]
    prompt = [likeliest] * 20
    results = {}
    cases: dict[str, dict[str, Any]] = {
        "plain": {},
        "frequency": {"frequency_penalty": 2.0},
        "repeat": {"repeat_penalty": 1000.0},
    }
    for name, parameters in cases.items():
        sampling = SamplingParams(
            temperature=0, max_tokens=1, top_logprobs=0, logit_bias={likeliest: 5.0}, **parameters
        )
        generation = tiny.engine.submit(prompt, sampling)
        results[name] = [each.token_id async for delta in deltas_of(generation) for each in delta.logprobs]
    assert results["plain"] == results["frequency"] == [likeliest]
    assert results["repeat"] != [likeliest]


async def test_the_end_token_ends_the_answer_and_is_no_part_of_it(tiny: EngineUnderTest) -> None:
    [answer] = await ask(tiny, ignore_eos=False, logit_bias={END_TOKEN_ID: 100.0})
    assert (answer.text, answer.reason, answer.token_ids) == ("", FinishReason.STOP, [])
    [ignored] = await ask(tiny, logit_bias={END_TOKEN_ID: 100.0})
    assert ignored.reason == FinishReason.LENGTH
    assert END_TOKEN_ID not in ignored.token_ids


async def test_a_stop_token_ends_the_answer_before_it(tiny: EngineUnderTest) -> None:
    [free] = await ask(tiny, temperature=0)
    stop = free.token_ids[5]
    [stopped] = await ask(tiny, temperature=0, stop_token_ids=(stop,))
    assert stopped.reason == FinishReason.STOP
    assert stopped.token_ids == free.token_ids[: free.token_ids.index(stop)]


async def test_a_stop_string_ends_the_answer_and_its_log_probabilities_before_it(tiny: EngineUnderTest) -> None:
    bias = dict.fromkeys(await tiny.tokens("dog"), 60.0)
    [free] = await ask(tiny, seed=1, logit_bias=bias, max_tokens=60)
    stop = free.text[10:13]
    [stopped] = await ask(tiny, seed=1, logit_bias=bias, max_tokens=60, stop=(stop,))
    assert stopped.reason == FinishReason.STOP
    assert stopped.text == free.text[: free.text.index(stop)]
    told = b"".join(each.piece for delta in stopped.deltas for each in delta.logprobs)
    assert told.decode(errors="replace").startswith(stopped.text)


async def test_streamed_text_is_what_the_tokens_spell_and_never_half_a_character(tiny: EngineUnderTest) -> None:
    [answer] = await ask(tiny, temperature=1.5, seed=11, max_tokens=300)
    pieces = [each.piece for delta in answer.deltas for each in delta.logprobs]
    assert len(pieces) == 300
    assert answer.text == b"".join(pieces).decode(errors="replace")


async def test_log_probabilities_are_the_models_own_and_sorted(tiny: EngineUnderTest) -> None:
    [answer] = await ask(tiny, temperature=0, top_logprobs=5, max_tokens=4)
    for each in (logprob for delta in answer.deltas for logprob in delta.logprobs):
        values = [logprob for _, _, logprob in each.top]
        assert len(values) == 5
        assert values == sorted(values, reverse=True)
        assert each.top[0][0] == each.token_id
        assert values[0] == each.logprob
        assert sum(math.exp(value) for value in values) <= 1.0


async def test_sampling_follows_the_models_distribution(tiny: EngineUnderTest) -> None:
    answers = await ask(tiny, n=8, seed=0, max_tokens=1, top_logprobs=5, top_k=5)
    for seed in range(8, 160, 8):
        answers += await ask(tiny, n=8, seed=seed, max_tokens=1, top_logprobs=5, top_k=5)
    told = {token: math.exp(logprob) for token, _, logprob in answers[0].deltas[0].logprobs[0].top}
    total = sum(told.values())
    drawn = Counter(each.token_ids[0] for each in answers)
    for token, probability in told.items():
        expected = probability / total
        tolerance = 4 * math.sqrt(expected * (1 - expected) / len(answers))
        assert drawn[token] / len(answers) == pytest.approx(expected, abs=tolerance)


async def test_a_huge_window_of_a_penalty_takes_no_memory(tiny: EngineUnderTest) -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    [answer] = await ask(tiny, repeat_penalty=1.1, repeat_last_n=2**31 - 1, max_tokens=3)
    assert len(answer.token_ids) == 3
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # in KiB; 2**31 tokens would take 8 GiB
    assert peak - before < 2**20
