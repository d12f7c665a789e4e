"""Conversations: more of them than the server has sequences, turn after turn."""

from __future__ import annotations

import asyncio
from collections import deque
from dataclasses import dataclass, field

from appliance.bench.client import Response, ask
from appliance.bench.requests import CHAT, answer_text, first_token_s, usage
from appliance.bench.statistics import quantile
from appliance.bench.streams import deadline
from tests.benchmarks.peers import Messages, user
from tests.benchmarks.workload import Quantity, Sample, Trial, Workload

MEDIAN, TAIL = "TTFT, median", "TTFT, 95th percentile"
ALL_TURNS_TIMEOUT_S = 1800.0
_COUNTED = (
    "Twelve conversations of four turns on a fresh server, four requests at once: after a turn the conversation goes "
    "to the end of the line, so that all others come before its next one. A turn is the past, 100 tokens of the user "
    "and an answer of 40. Seconds from sending a turn to the first text of its answer, over all turns."
)


@dataclass(slots=True)
class _Conversation:
    """Who talks, what they will say, and what has been said."""

    turns: deque[str]
    messages: Messages = field(default_factory=list)
    responses: list[Response] = field(default_factory=list)


async def measure(trial: Trial) -> Sample:
    """Hold all conversations."""
    effort = trial.effort
    line = deque(
        _Conversation(deque(trial.text(f"conversation {number} {turn}", effort.turn) for turn in range(effort.turns)))
        for number in range(effort.conversations)
    )
    everyone = list(line)
    async with trial.peer.fresh() as server, deadline(ALL_TURNS_TIMEOUT_S), asyncio.TaskGroup() as tasks:
        for number in range(effort.at_once):
            tasks.create_task(_serve(line, trial, server.port), name=f"client {number}")
    responses = [response for each in everyone for response in each.responses]
    times = [first_token_s(each) for each in responses]
    details = {
        "ttft_s_of_each_turn": [
            [first_token_s(each.responses[turn]) for each in everyone] for turn in range(effort.turns)
        ],
        "prompt_tokens": [[usage(each).get("prompt_tokens") for each in one.responses] for one in everyone],
        "cached_tokens": [[_cached(each) for each in one.responses] for one in everyone],
    }
    return Sample({MEDIAN: quantile(times, 0.5), TAIL: quantile(times, 0.95)}, details)


async def _serve(line: deque[_Conversation], trial: Trial, port: int) -> None:
    """Take one turn after another from the line."""
    while line:
        conversation = line.popleft()
        await _turn(conversation, trial, port)
        if conversation.turns:
            line.append(conversation)


async def _turn(conversation: _Conversation, trial: Trial, port: int) -> None:
    tokens = trial.effort.turn_answer
    conversation.messages.append(user(conversation.turns.popleft()))
    response = await ask(port, "POST", CHAT, trial.peer.request(conversation.messages, tokens))
    trial.peer.check(response, tokens)
    conversation.responses.append(response)
    conversation.messages.append({"role": "assistant", "content": answer_text(response)})


def _cached(response: Response) -> int | None:
    cached: int | None = usage(response).get("prompt_tokens_details", {}).get("cached_tokens")
    return cached


WORKLOAD = Workload(
    name="conversations",
    counted=_COUNTED,
    quantities=[Quantity(MEDIAN, "s", "greatest", 0.7), Quantity(TAIL, "s", "greatest", 0.5)],
    measure=measure,
)
