"""The first token: of one prompt that the server never saw, and of many clients that share a system prompt."""

from __future__ import annotations

from appliance.bench.requests import first_token_s, usage
from appliance.bench.statistics import quantile
from appliance.bench.streams import stream_together
from tests.benchmarks.peers import user
from tests.benchmarks.workload import Quantity, Sample, Trial, Workload

ANSWER = 16
QUESTION = 15
ONE = "TTFT"
SHARED = "TTFT, 95th percentile"


async def measure_one(trial: Trial) -> Sample:
    """Measure one client."""
    request = trial.peer.request(trial.ask("first token", trial.effort.prompt), ANSWER)
    async with trial.peer.fresh() as server:
        (response,) = await stream_together(server.port, [request], patient=False)
    trial.peer.check(response, ANSWER)
    return Sample({ONE: first_token_s(response)}, {"prompt_tokens": usage(response).get("prompt_tokens")})


async def measure_shared(trial: Trial) -> Sample:
    """Measure several clients that arrive together."""
    system = {"role": "system", "content": trial.text("system prompt", trial.effort.system_prompt)}
    requests = [
        trial.peer.request([system, user(trial.text(f"question {number}", QUESTION))], ANSWER)
        for number in range(trial.effort.sharers)
    ]
    async with trial.peer.fresh() as server:
        responses = await stream_together(server.port, requests, patient=False)
    for response in responses:
        trial.peer.check(response, ANSWER)
    times = sorted(first_token_s(each) for each in responses)
    details = {"ttft_s": times, "prompt_tokens": [usage(each).get("prompt_tokens") for each in responses]}
    return Sample({SHARED: quantile(times, 0.95)}, details)


FIRST_TOKEN = Workload(
    name="first-token",
    counted="Seconds from sending a prompt of 900 tokens, alone on a fresh server, to the first text of its answer.",
    quantities=[Quantity(ONE, "s", "greatest", 1.0)],
    measure=measure_one,
)
SHARED_PROMPT = Workload(
    name="shared-prompt",
    counted=(
        "Eight clients at once on a fresh server, with one system prompt of 850 tokens and a question of 15 tokens "
        "each: seconds from a client's sending to the first text of his answer."
    ),
    quantities=[Quantity(SHARED, "s", "greatest", 0.15)],
    measure=measure_shared,
)
