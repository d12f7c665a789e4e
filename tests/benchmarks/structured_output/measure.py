"""Schemas accepted, answers valid, and what a grammar costs, on an engine in this process."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import jsonschema
import referencing

from appliance.core.errors import ApplianceError, InvalidRequestError
from appliance.core.structured import Grammar
from appliance.core.types import FinishReason, SamplingParams
from appliance.engine.llama.engine import LlamaEngine
from appliance.serving.structured import prepared
from tests.deltas import deltas_of

PARAM = "schema"
STREAM_TOKENS = 96
REPORT = {
    "type": "array",
    "minItems": 1000,
    "items": {
        "type": "object",
        "properties": {
            "name": {"type": "string"},
            "kind": {"enum": ["pump", "valve", "motor", "sensor"]},
            "running": {"type": "boolean"},
            "pressure": {"type": "number", "minimum": 0},
            "note": {"type": "string", "maxLength": 200},
        },
        "required": ["name", "kind", "running", "pressure", "note"],
        "additionalProperties": False,
    },
}
"""What the streams write to find what a grammar costs: all that JSON has, and no end before the last token."""


@dataclass(frozen=True)
class Acceptance:
    """How many schemas compile, and in what words the others are refused."""

    accepted: int
    of: int
    refusals: list[str]
    median_s: float
    most_s: float


@dataclass
class Answers:
    """What became of the answers to a sample of schemas."""

    of: int
    finished: int = 0
    cut: int = 0
    failed: int = 0
    characters: int = 0
    blanks: int = 0
    invalid: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Cost:
    """Tokens a CPU second without and with a grammar, and the ratio of each pair of runs.

    CPU seconds are of the whole process: they tell what a grammar costs even while other programs take cores.
    """

    free: float
    constrained: float
    ratios: list[float]

    @property
    def ratio(self) -> float:
        """Return the median ratio."""
        return median(self.ratios)


async def accept(engine: LlamaEngine, schemas: Sequence[Mapping[str, Any]]) -> Acceptance:
    """Compile every schema as a request would."""
    refusals, seconds = [], []
    await engine.grammars.constrain(Grammar("json_object"), 1)
    for schema in schemas:
        started = time.perf_counter()
        try:
            await engine.grammars.constrain(prepared(_grammar(schema)), 1)
        except InvalidRequestError as error:
            refusals.append(error.message[:90])
        seconds.append(time.perf_counter() - started)
    return Acceptance(len(schemas) - len(refusals), len(schemas), refusals, median(seconds), max(seconds))


async def answer(engine: LlamaEngine, schemas: Sequence[Mapping[str, Any]], *, tokens: int) -> Answers:
    """Let the model answer within each schema, and have an independent validator look at what it finished."""
    found = Answers(len(schemas))
    async with asyncio.TaskGroup() as group:
        for schema in schemas:
            group.create_task(_answer(engine, schema, tokens, found))
    return found


async def _answer(engine: LlamaEngine, schema: Mapping[str, Any], tokens: int, found: Answers) -> None:
    sampling = SamplingParams(temperature=0.7, seed=1, max_tokens=tokens, grammar=_grammar(schema))
    question = f"Write an example of this JSON:\n{json.dumps(schema)[:1500]}"
    prompt = f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n"
    try:
        text, reason = await _text(engine, prompt, sampling)
    except ApplianceError:
        found.failed += 1
        return
    if reason != FinishReason.STOP:
        found.cut += 1
        return
    found.finished += 1
    problem = _problem(schema, text)
    if problem is not None:
        found.invalid.append(f"{problem}: {text[:100]}")
    else:
        found.characters += len(text)
        found.blanks += len(text) - len(json.dumps(json.loads(text), ensure_ascii=False, separators=(",", ":")))


def _problem(schema: Mapping[str, Any], text: str) -> str | None:
    """Return what is wrong with a finished answer, by the `jsonschema` package; references are not fetched."""
    validator = jsonschema.validators.validator_for(schema, default=jsonschema.Draft202012Validator)
    try:
        value = json.loads(text)
    except ValueError as error:
        return str(error)
    problem = next(validator(schema, registry=referencing.Registry()).iter_errors(value), None)
    return None if problem is None else str(problem.message)[:200]


async def cost(engine: LlamaEngine, *, streams: int, runs: int, temperature: float) -> Cost:
    """Run the same number of streams free and constrained, turn about, as many tokens each."""
    free, constrained, ratios = [], [], []
    grammar = prepared(_grammar(REPORT))
    await _speed(engine, streams, temperature, grammar)
    for run in range(runs):
        pair = {}
        for each in (None, grammar) if run % 2 else (grammar, None):
            pair[each] = await _speed(engine, streams, temperature, each)
        free.append(pair[None])
        constrained.append(pair[grammar])
        ratios.append(pair[grammar] / pair[None])
    return Cost(median(free), median(constrained), ratios)


async def _speed(engine: LlamaEngine, streams: int, temperature: float, grammar: Grammar | None) -> float:
    """Return the tokens a CPU second from the moment at which all streams write."""
    sampling = SamplingParams(
        temperature=temperature, seed=1, max_tokens=STREAM_TOKENS, ignore_eos=True, grammar=grammar
    )
    prompt = "<|im_start|>user\nList the machines of the plant as JSON.<|im_end|>\n<|im_start|>assistant\n"
    tokens = await engine.tokenize(prompt, add_special=False, parse_special=True)
    constraints = await engine.grammars.constrain(grammar, streams)
    generation = engine.submit(tokens, sampling, n=streams, constraints=constraints)
    first: dict[int, float] = {}
    count, ended = 0, 0.0
    async for delta in deltas_of(generation):
        ended = time.process_time()
        if delta.index in first:
            count += delta.token_count
        first.setdefault(delta.index, ended)
    return count / (ended - max(first.values()))


async def _text(engine: LlamaEngine, prompt: str, sampling: SamplingParams) -> tuple[str, FinishReason | None]:
    tokens = await engine.tokenize(prompt, add_special=False, parse_special=True)
    grammar = None if sampling.grammar is None else prepared(sampling.grammar)
    generation = engine.submit(tokens, sampling, constraints=await engine.grammars.constrain(grammar, 1))
    text, reason = "", None
    async for delta in deltas_of(generation):
        text, reason = text + delta.text, delta.finish_reason
    return text, reason


def _grammar(schema: Mapping[str, Any]) -> Grammar:
    return Grammar("json_schema", json.dumps(schema), PARAM)
