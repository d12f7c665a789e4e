"""A random model under a grammar says nothing but what the grammar allows."""

from __future__ import annotations

import json
from typing import Any

import pytest

from appliance.core.errors import InvalidRequestError
from appliance.core.structured import Grammar
from appliance.core.types import FinishReason, SamplingParams
from tests.engine.conftest import Answer, EngineUnderTest, collect

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


async def test_a_grammar_that_is_none_is_refused(tiny: EngineUnderTest) -> None:
    for grammar in (Grammar("regex", "("), Grammar("lark", "begin: 1"), Grammar("json_schema", '{"type": "thing"}')):
        with pytest.raises(InvalidRequestError) as refused:
            await tiny.engine.grammars.constrain(grammar, 1)
        assert refused.value.code == "invalid_grammar"
