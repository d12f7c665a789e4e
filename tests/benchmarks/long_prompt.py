"""A long prompt that arrives while others stream: how long they stall, and how long it waits."""

from __future__ import annotations

import asyncio

from appliance.bench.client import Connection, Response
from appliance.bench.requests import CHAT, first_token_s, text_times, usage
from appliance.bench.streams import deadline, longest_gaps
from appliance.core.errors import UnavailableError
from tests.benchmarks.workload import Quantity, Sample, Trial, Workload, without_speculation

STREAMS = 2
STREAM_PROMPT = 40
ANSWER = 8
BEGUN_TOKENS = 4
LOOK_EVERY_S = 0.02
GAP, WAIT = "longest gap of the streams", "TTFT of the long prompt"
_COUNTED = (
    "Two clients stream on a fresh server when a prompt of 3,000 tokens arrives. From its sending to the first text of "
    "its answer: the longest silence of a stream, at its client, and that time itself. A stream that ends before is "
    "looked at until its end. Our prompt lookup is off."
)


async def measure(trial: Trial) -> Sample:
    """Measure once."""
    streamed = [
        trial.peer.request(trial.ask(f"stream {number}", STREAM_PROMPT), trial.effort.streamed)
        for number in range(STREAMS)
    ]
    request = trial.peer.request(trial.ask("long prompt", trial.effort.long_prompt), ANSWER)
    async with trial.peer.fresh() as server:
        connections = [await Connection.open(server.port) for _ in range(STREAMS + 1)]
        try:
            streams = [
                connection.send("POST", CHAT, each) for connection, each in zip(connections, streamed, strict=False)
            ]
            async with deadline():
                for connection, response in zip(connections, streams, strict=False):
                    await _begin(connection, response)
                long = await connections[-1].request("POST", CHAT, request)
        finally:
            for connection in connections:
                connection.close()
    trial.peer.check(long, ANSWER)
    return _sample(long, streams)


async def _begin(connection: Connection, response: Response) -> None:
    """Wait until a stream is under way."""
    await connection.begin()
    while len(text_times(response)) < BEGUN_TOKENS and not connection.answered:  # noqa: ASYNC110 - pieces come in
        await asyncio.sleep(LOOK_EVERY_S)


def _sample(long: Response, streams: list[Response]) -> Sample:
    first = text_times(long)[0]
    longest = list(longest_gaps(streams, long.sent_at, first))
    if not longest:
        raise UnavailableError("Nothing was streamed while the long prompt was read, so there is nothing to compare.")
    details = {
        "longest_gap_s_of_each_stream": longest,
        "events_streamed_meanwhile": [sum(long.sent_at < at <= first for at in text_times(each)) for each in streams],
        "prompt_tokens": usage(long).get("prompt_tokens"),
    }
    return Sample({GAP: max(longest), WAIT: first_token_s(long)}, details)


WORKLOAD = Workload(
    name="long-prompt",
    counted=_COUNTED,
    quantities=[Quantity(GAP, "s", "greatest", 0.03), Quantity(WAIT, "s", "greatest", 1.3)],
    measure=measure,
    contestants=without_speculation,
)
