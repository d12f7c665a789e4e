"""Decoding: tokens a second of several clients at once, and the memory afterwards."""

from __future__ import annotations

from appliance.bench.requests import usage
from appliance.bench.streams import stream_together, tokens_per_second
from tests.benchmarks.peers import SEQUENCES
from tests.benchmarks.workload import Effort, Quantity, Sample, Trial, Workload, without_speculation

PROMPT = 40
MEMORY = "resident memory after 8 clients"
_COUNTED = (
    "Tokens a second of all clients together, each with a prompt of its own of 40 tokens and an answer of 128, on a "
    "fresh server for each number of clients. While all are decoding: after the answer that began last has begun and "
    "before the first one ends. Where they never all decode at once, because clients wait for a sequence: all tokens "
    "after each answer's first, from the first token of all to the last. The client reads 20 times a second. Memory: "
    "what the server's process and its children have resident after the answers of 8 clients, pages that they share "
    "counted once (PSS). Our prompt lookup is off."
)


async def measure(trial: Trial) -> Sample:
    """Measure at each number of clients."""
    values: dict[str, float] = {}
    details: dict[str, object] = {}
    for clients in trial.effort.clients:
        tokens = trial.effort.answer
        requests = [
            trial.peer.request(trial.ask(f"decode {clients} {number}", PROMPT), tokens) for number in range(clients)
        ]
        async with trial.peer.fresh() as server:
            responses = await stream_together(server.port, requests)
            memory = server.proportional_memory()
        for response in responses:
            trial.peer.check(response, tokens)
        values[_rate(clients)] = tokens_per_second(responses, tokens)
        details[f"prompt_tokens_{clients}_clients"] = [usage(each).get("prompt_tokens") for each in responses]
        if clients == SEQUENCES:
            values[MEMORY] = memory / 1e6
    return Sample(values, details)


def _rate(clients: int) -> str:
    return f"{clients} client{'s' if clients > 1 else ''}"


WORKLOAD = Workload(
    name="decode",
    counted=_COUNTED,
    quantities=[
        *(Quantity(_rate(clients), "tokens/s", "least", 1.0) for clients in Effort().clients),
        Quantity(MEMORY, "MB", "greatest", 1.1),
    ],
    measure=measure,
    contestants=without_speculation,
)
