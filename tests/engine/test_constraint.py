"""A random model under a grammar says nothing but what the grammar allows."""

from __future__ import annotations

import asyncio
import json
import math
import re
import threading
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from appliance.core.errors import InvalidRequestError
from appliance.core.structured import Grammar
from appliance.core.types import FinishReason, SamplingParams
from appliance.engine.llama import constraint
from tests.engine.conftest import DEADLINE_S, Answer, EngineUnderTest, collect, running

pytestmark = pytest.mark.anyio

PERSON = json.dumps(
    {
        "type": "object",
        "properties": {"name": {"type": "string", "maxLength": 8}, "age": {"type": "integer", "maximum": 150}},
        "required": ["name", "age"],
        "additionalProperties": False,
    }
)


async def ask(
    tiny: EngineUnderTest, grammar: Grammar, n: int = 1, prompt: str = "hello", **parameters: Any
) -> list[Answer]:
    sampling = SamplingParams(grammar=grammar, **{"max_tokens": 200, **parameters})
    constraints = await tiny.engine.grammars.constrain(grammar, n)
    return await collect(tiny.engine.submit(await tiny.tokens(prompt), sampling, n=n, constraints=constraints), n)


@pytest.mark.parametrize(
    "parameters",
    [
        {"temperature": 0},
        {"temperature": 0, "frequency_penalty": 1.0},
        {"temperature": 1.0, "seed": 1},
        {"temperature": 2.0, "top_p": 0.5, "top_k": 40, "seed": 2},
    ],
)
async def test_a_random_model_yields_valid_json(tiny: EngineUnderTest, parameters: dict[str, Any]) -> None:
    for answer in await ask(tiny, Grammar("json_schema", PERSON), n=4, **parameters):
        assert answer.reason == FinishReason.STOP, answer.text
        person = json.loads(answer.text)
        assert set(person) == {"name", "age"}
        assert isinstance(person["name"], str)
        assert isinstance(person["age"], int)
        assert person["age"] <= 150


async def test_a_lark_grammar_with_json_inside(tiny: EngineUnderTest) -> None:
    lark = f'start: "<tool_call>\\n" call "\\n</tool_call>"\ncall: %json {PERSON}\n'
    [answer] = await ask(tiny, Grammar("lark", lark), seed=1)
    assert answer.reason == FinishReason.STOP
    assert json.loads(answer.text.removeprefix("<tool_call>\n").removesuffix("\n</tool_call>"))


async def test_within_a_grammar_draws_follow_the_model_restricted_to_it(tiny: EngineUnderTest) -> None:
    """Two hundred draws of one token against the model's own probabilities of what the grammar allows."""
    letters = "abcdefgh"
    grammar = Grammar("regex", "[a-h]")
    [free] = await ask(tiny, Grammar("regex", "[a-h]"), max_tokens=1, top_logprobs=320, temperature=0)
    chances = {
        piece.decode(): math.exp(logprob) for _, piece, logprob in free.told[0].top if piece.decode("latin1") in letters
    }
    total = sum(chances.values())
    every: list[dict[str, Any]] = [{}, {"top_k": 20}, {"top_k": 1}]
    for cuts in every:
        answers = [await ask(tiny, grammar, n=8, seed=1000 * seed, max_tokens=1, **cuts) for seed in range(25)]
        found = Counter(answer.text for each in answers for answer in each)
        assert set(found) <= set(letters)
        if cuts != {}:
            continue
        distance = sum(abs(found[each] / 200 - chances[each] / total) for each in letters) / 2
        assert distance < 0.12  # so far apart are 200 draws and their law in one of a million cases


async def test_a_seed_repeats_and_log_probabilities_are_the_models_own(tiny: EngineUnderTest) -> None:
    grammar = Grammar("json_schema", PERSON)
    first, same = [await ask(tiny, grammar, n=2, seed=5, top_logprobs=1) for _ in range(2)]
    assert [each.text for each in first] == [each.text for each in same]
    assert first[0].text != first[1].text
    told = first[0].told
    assert b"".join(each.piece for each in told).decode() == first[0].text
    assert min(each.logprob for each in told) < -5.0  # the model alone would hardly say this
    assert told[0].top[0][1] != told[0].piece


async def test_what_cuts_an_answer_short_is_told(tiny: EngineUnderTest) -> None:
    [cut] = await ask(tiny, Grammar("regex", "a{50}"), max_tokens=10)
    assert cut.reason == FinishReason.LENGTH
    [whole] = await ask(tiny, Grammar("regex", "(yes|no)"), max_tokens=10)
    assert (whole.text in ("yes", "no"), whole.reason) == (True, FinishReason.STOP)
    [ignoring] = await ask(tiny, Grammar("regex", "(yes|no)"), max_tokens=10, ignore_eos=True)
    assert ignoring.reason == FinishReason.STOP


async def test_constrained_and_free_choices_share_a_step_and_the_memory(tiny_model_path: Path) -> None:
    """Eight answers of which the cells hold a few at once: some are preempted and computed again on the way."""
    async with running(tiny_model_path, cells=160, sequences=8) as tiny:
        grammar = Grammar("json_schema", PERSON)
        async with asyncio.TaskGroup() as group:
            held = [
                group.create_task(ask(tiny, grammar, prompt=f"number {i}", seed=i, max_tokens=60)) for i in range(6)
            ]
            free = [group.create_task(tiny.greedy(f"free {i}", tokens=20)) for i in range(2)]
        for task in held:
            [answer] = task.result()
            assert answer.reason == FinishReason.STOP
            assert set(json.loads(answer.text)) == {"name", "age"}
        for number, other in enumerate(free):
            assert other.result().text == (await tiny.greedy(f"free {number}", tokens=20)).text


async def test_guessing_ahead_changes_nothing_within_a_grammar(tiny_model_path: Path) -> None:
    schema = {"type": "array", "items": {"const": "the quick brown fox"}, "minItems": 6, "maxItems": 6}
    texts = []
    for speculation in ("auto", "off"):
        async with running(tiny_model_path, speculation=speculation) as tiny:
            [answer] = await ask(tiny, Grammar("json_schema", json.dumps(schema)), temperature=0)
            texts.append(answer.text)
            assert json.loads(answer.text) == ["the quick brown fox"] * 6
    assert texts[0] == texts[1]


@pytest.mark.parametrize(
    ("grammar", "words"),
    [
        (Grammar("regex", "("), "regex"),
        (Grammar("lark", "begin: 1"), "1"),
        (Grammar("json_schema", '{"type": "thing"}'), "thing"),
        (Grammar("json_schema", '{"not": {}, "contains": {}}'), '["contains", "not"]'),
        (Grammar("json_schema", '{"oneOf": [{"minimum": 1}, {"maximum": 2}]}'), "oneOf is not supported"),
        (Grammar("json_schema", '{"$ref": "http://127.0.0.1:9/x"}'), "nothing is fetched: 'http://127.0.0.1:9/x'"),
        (Grammar("json_schema", '{"$ref": "file:///etc/passwd"}'), "nothing is fetched: 'file:///etc/passwd'"),
        (Grammar("json_schema", '{"$ref": "#"}'), "No text satisfies"),
        (Grammar("json_schema", '{"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/a"}}}'), "No text satisfies"),
        (Grammar("json_schema", "7"), "object schema"),
        (Grammar("gbnf", "root ::= (" * 400), ""),
        (Grammar("gbnf", 'root ::= "a'), ""),
        (
            Grammar("json_schema", json.dumps({"type": "object", "properties": {f"p{i}": {} for i in range(1100)}})),
            "max is 2000",
        ),
        (Grammar("json_schema", json.dumps({"multipleOf": 10**9 + 7, "type": "integer"})), "fuel"),
    ],
)
async def test_a_grammar_that_will_not_do_is_refused_in_words(
    tiny: EngineUnderTest, grammar: Grammar, words: str
) -> None:
    with pytest.raises(InvalidRequestError) as refused:
        await tiny.engine.grammars.constrain(replace(grammar, param="f"), 1)
    assert (refused.value.code, refused.value.param) == ("invalid_grammar", "f")
    assert words in refused.value.message
    assert len(refused.value.message) < 500


async def test_a_recursive_schema_is_followed(tiny: EngineUnderTest) -> None:
    tree = {"type": "object", "properties": {"next": {"$ref": "#"}}, "additionalProperties": False}
    [answer] = await ask(tiny, Grammar("json_schema", json.dumps(tree)), seed=3, max_tokens=400)
    if answer.reason == FinishReason.STOP:
        assert set(json.loads(answer.text)) <= {"next"}
    else:
        assert answer.text.startswith("{")


async def test_gbnf_is_read(tiny: EngineUnderTest) -> None:
    [answer] = await ask(tiny, Grammar("gbnf", 'root ::= "on" | "off" tail\ntail ::= [0-9] [0-9]'), seed=1)
    assert re.fullmatch("on|off[0-9][0-9]", answer.text)


async def test_compiled_grammars_are_kept_up_to_a_limit(tiny: EngineUnderTest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constraint, "CACHED_GRAMMARS", 2)
    monkeypatch.setattr(constraint, "CACHED_CHARACTERS", 100)
    grammars = tiny.engine.grammars
    for text in ("a", "b", "a", "c", "d{1,9}" + "d" * 60, "e" * 60):
        await grammars.constrain(Grammar("regex", text), 1)
    assert [text for _, text in grammars._compiled] == ["e" * 60]


async def test_a_grammar_that_takes_too_long_is_refused_and_harms_nobody(
    tiny: EngineUnderTest, monkeypatch: pytest.MonkeyPatch
) -> None:
    await tiny.engine.grammars.constrain(Grammar("regex", "a"), 1)
    gate, compile_ = threading.Event(), constraint._compile

    def slow(tokenizer: Any, grammar: Grammar) -> Any:
        assert gate.wait(DEADLINE_S)
        return compile_(tokenizer, grammar)

    monkeypatch.setattr(constraint, "_compile", slow)
    monkeypatch.setattr(constraint, "COMPILING_LIMIT_S", 0.01)
    with pytest.raises(InvalidRequestError, match="not compiled within"):
        await tiny.engine.grammars.constrain(Grammar("regex", "b"), 1)
    assert (await tiny.greedy("still here", tokens=3)).text
    gate.set()
    monkeypatch.setattr(constraint, "_compile", compile_)
    monkeypatch.setattr(constraint, "COMPILING_LIMIT_S", DEADLINE_S)
    assert len(await tiny.engine.grammars.constrain(Grammar("regex", "c"), 3)) == 3
