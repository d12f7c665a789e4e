"""Prompt lookup: decoding of answers that quote the prompt and of others, with it and without."""

from __future__ import annotations

from collections.abc import Sequence

from appliance.bench.client import Response
from appliance.bench.requests import answer_text, usage
from appliance.bench.server import Server
from appliance.bench.streams import stream_together, tokens_per_second
from appliance.core.errors import UnavailableError
from tests.benchmarks.peers import Appliance, Messages, Peer, has_speculation, user
from tests.benchmarks.texts import quoted_share
from tests.benchmarks.workload import Quantity, Sample, Trial, Workload

QUOTING, OTHER = "answers that quote the prompt", "other answers"
WITHOUT = "appliance without lookup"
LEAST_QUOTED = 0.8
_REPEAT = "Repeat the following text word for word:\n\n"
_QUESTIONS = (
    "What is a heat pump and how does it work?",
    "Write a short story about a lighthouse keeper who finds a letter.",
    "Explain the difference between a lake and a sea, with examples.",
    "Give advice to someone who moves to another city for a new job.",
    "How is bread made, from the grain to the loaf?",
    "Describe a day in the life of a station master in a small town.",
    "Why do leaves change their colour in autumn?",
    "Write a letter to a friend about a journey by train through the mountains.",
    "What should one look for when buying a used bicycle?",
)
_COUNTED = (
    "Tokens a second of one client after the first token of each answer, on a fresh server: answers to the request to "
    "repeat a text of 150 tokens once more, of which at least 80 % must be found in the text, and answers of at most "
    "160 tokens to questions. Both end by themselves. With prompt lookup, and without."
)


async def measure(trial: Trial) -> Sample:
    """Ask for quotations first, then for answers of its own."""
    effort = trial.effort
    sources = [trial.text(f"quoted {number}", effort.quoted) for number in range(effort.questions)]
    questions = [
        [user(_QUESTIONS[(trial.run * effort.questions + number) % len(_QUESTIONS)])]
        for number in range(effort.questions)
    ]
    async with trial.peer.fresh() as server:
        quoting = [await _answer(trial, server, _repeat(source), 2 * effort.quoted) for source in sources]
        others = [await _answer(trial, server, question, effort.free_answer) for question in questions]
    shares = [quoted_share(answer_text(answer), source) for answer, source in zip(quoting, sources, strict=True)]
    if sum(shares) / len(shares) < LEAST_QUOTED:
        raise UnavailableError(
            f"The model quotes only {100 * sum(shares) / len(shares):.0f} % of what it was asked to repeat, "
            "so there is nothing to look up."
        )
    details = {"quoted_share": shares, "answers": [answer_text(each) for each in (*quoting, *others)]}
    return Sample({QUOTING: _rate(quoting), OTHER: _rate(others)}, details)


def _repeat(source: str) -> Messages:
    """Return a chat that makes even a small model quote: it has done so once before."""
    return [user(_REPEAT + source), {"role": "assistant", "content": source}, user(_REPEAT + source)]


async def _answer(trial: Trial, server: Server, messages: Messages, tokens: int) -> Response:
    (response,) = await stream_together(server.port, [trial.peer.free_request(messages, tokens)], patient=False)
    trial.peer.check(response, _tokens(response))
    return response


def _rate(responses: Sequence[Response]) -> float:
    """Return the tokens a second of answers that came one after another."""
    seconds = sum(_tokens(each) / tokens_per_second([each], _tokens(each)) for each in responses)
    return sum(_tokens(each) for each in responses) / seconds


def _tokens(response: Response) -> int:
    return int(usage(response).get("completion_tokens", 0))


def _with_and_without(peers: Sequence[Peer]) -> list[Peer]:
    ours = [each for each in peers if isinstance(each, Appliance)]
    return [
        *(each.with_speculation(on=True) for each in ours),
        *(each.with_speculation(on=False, label=WITHOUT) for each in ours),
    ]


def _obstacle() -> str:
    return "" if has_speculation() else "the appliance has no setting named speculation"


WORKLOAD = Workload(
    name="lookup",
    counted=_COUNTED,
    quantities=[Quantity(QUOTING, "tokens/s", "least", 1.3), Quantity(OTHER, "tokens/s", "least", 0.97)],
    measure=measure,
    baseline=WITHOUT,
    contestants=_with_and_without,
    obstacle=_obstacle,
)
