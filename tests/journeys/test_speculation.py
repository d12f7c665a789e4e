"""Speculation on the real default model, by the official client: the same answers, in fewer steps."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

from tests.journeys.processes import ServerProcess, server_process

pytestmark = [pytest.mark.journey, pytest.mark.timeout(300)]

MODEL = "smollm2-135m-instruct"
MANUAL = (
    "1. Switch off the mains before you open the housing.\n"
    "2. Close the water valve and let the pressure fall to zero.\n"
    "3. Remove the four screws of the front panel.\n"
    "4. Take out the air filter and wash it in lukewarm water.\n"
    "5. Let the filter dry completely before you put it back.\n"
    "6. Tighten the screws, open the valve and switch on the mains.\n"
)
AGAIN = "\nThe manual once more, word for word:\n\n"
QUOTE = f"The manual says:\n\n{MANUAL}{AGAIN}{MANUAL}{AGAIN}1. Switch off"
"""Is answered by the manual. Whatever a batch is composed of, no second token is nearly as likely as the first."""
COUNT = "".join(f"Pump {n} of 40 is running at {n} bar and is in order.\n" for n in range(1, 9)) + "Pump"
"""Is answered by further lines, whose numbers are guessed wrongly each time."""
NOISE = 0.25
"""What a log probability of this model may differ by when a batch is composed otherwise."""


@pytest.fixture(scope="module")
def guessing(real_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    with server_process(real_data, tmp_path_factory.mktemp("guessing")) as subject:
        subject.wait_until_ready()
        yield subject


@pytest.fixture(scope="module")
def plain(real_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    off = {"APPLIANCE_SPECULATION": "off"}
    with server_process(real_data, tmp_path_factory.mktemp("plain"), environment=off) as subject:
        subject.wait_until_ready()
        yield subject


def ask(server: ServerProcess, prompt: str, **parameters: Any) -> openai.types.Completion:
    """Return an answer of 80 tokens, unless something else is asked for."""
    asked = {"temperature": 0, "max_tokens": 80, **parameters}
    with server.client() as client:
        answer: openai.types.Completion = client.completions.create(model=MODEL, prompt=prompt, **asked)
        return answer


def told(answer: openai.types.Completion) -> list[tuple[str, str, int]]:
    """Return what must not depend on speculation."""
    assert answer.usage is not None
    return [(each.text, each.finish_reason, answer.usage.completion_tokens) for each in answer.choices]


@pytest.mark.parametrize(
    ("prompt", "parameters"),
    [
        (QUOTE, {}),
        (QUOTE, {"max_tokens": 7}),
        (QUOTE, {"max_tokens": 38}),
        (QUOTE, {"stop": ["four screws"]}),
        (QUOTE, {"temperature": 0.3, "seed": 1}),
        (QUOTE, {"frequency_penalty": 0.1, "max_tokens": 40}),
        (COUNT, {}),
        (COUNT, {"stop": [" bar and"]}),
        (COUNT, {"temperature": 0.3, "seed": 1}),
        (COUNT, {"n": 2, "temperature": 0.3, "seed": 2, "max_tokens": 40}),
    ],
    ids=lambda each: {QUOTE: "quote", COUNT: "count"}.get(each, each) if isinstance(each, str) else str(each),
)
def test_an_answer_is_the_same_with_and_without(
    guessing: ServerProcess, plain: ServerProcess, prompt: str, parameters: dict[str, Any]
) -> None:
    expected = told(ask(plain, prompt, **parameters))
    assert told(ask(guessing, prompt, **parameters)) == expected


def test_log_probabilities_are_those_of_the_model(guessing: ServerProcess, plain: ServerProcess) -> None:
    answer, expected = [ask(each, QUOTE, logprobs=2).choices[0].logprobs for each in (guessing, plain)]
    assert answer is not None
    assert expected is not None
    assert answer.tokens == expected.tokens
    assert answer.text_offset == expected.text_offset
    assert answer.token_logprobs == pytest.approx(expected.token_logprobs, abs=NOISE)


def test_a_quoting_answer_comes_in_fewer_pieces(guessing: ServerProcess, plain: ServerProcess) -> None:
    before = guessing.metric("appliance_spec_decode_num_accepted_tokens_total")
    streams = []
    for server in (guessing, plain):
        with server.client() as client:
            pieces = client.completions.create(model=MODEL, prompt=QUOTE, temperature=0, max_tokens=80, stream=True)
            streams.append([each.choices[0].text for each in pieces if each.choices and each.choices[0].text])
    assert "".join(streams[0]) == "".join(streams[1])
    assert len(streams[0]) < 0.8 * len(streams[1])
    accepted = guessing.metric("appliance_spec_decode_num_accepted_tokens_total") - before
    assert accepted >= 20
    assert accepted <= guessing.metric("appliance_spec_decode_num_draft_tokens_total")
    assert plain.metric("appliance_spec_decode_num_draft_tokens_total") == 0
