"""The next turn of a conversation after the server was restarted, orderly and not."""

from __future__ import annotations

import asyncio

from appliance.bench.client import Response
from appliance.bench.requests import answer_text, first_token_s, usage
from appliance.bench.streams import stream_together
from tests.benchmarks.peers import Messages, user
from tests.benchmarks.workload import Quantity, Sample, Trial, Workload

ANSWER = 40
QUESTION = 20
TERMINATED, KILLED = "TTFT after SIGTERM", "TTFT after SIGKILL"
_COUNTED = (
    "A conversation of 1,500 tokens and an answer of 40, then the server ends: by SIGTERM at once, or by SIGKILL 20 s "
    "later. It is started again in the same folder and, as soon as it is ready, gets the next turn of 20 tokens: "
    "seconds from its sending to the first text of its answer. Nothing was asked of the new server before."
)


async def measure(trial: Trial) -> Sample:
    """Restart both ways."""
    terminated = await _restarted(trial, TERMINATED, kill=False)
    killed = await _restarted(trial, KILLED, kill=True)
    return Sample(
        {TERMINATED: first_token_s(terminated), KILLED: first_token_s(killed)},
        {"usage_after_sigterm": usage(terminated), "usage_after_sigkill": usage(killed)},
    )


async def _restarted(trial: Trial, name: str, *, kill: bool) -> Response:
    """Return the answer to the next turn after a restart."""
    past = trial.ask(name, trial.effort.history)
    question = user(trial.text(f"{name}, next turn", QUESTION))
    with trial.peer.new_home() as home:
        async with trial.peer.running(home) as server:
            answer = await _answer(trial, server.port, past)
            if kill:
                await asyncio.sleep(trial.effort.idle_s)
                server.process.kill()
                await server.process.wait()
        async with trial.peer.running(home) as server:
            return await _answer(
                trial, server.port, [*past, {"role": "assistant", "content": answer_text(answer)}, question]
            )


async def _answer(trial: Trial, port: int, messages: Messages) -> Response:
    (response,) = await stream_together(port, [trial.peer.request(messages, ANSWER)], patient=False)
    trial.peer.check(response, ANSWER)
    return response


WORKLOAD = Workload(
    name="restart",
    counted=_COUNTED,
    quantities=[Quantity(TERMINATED, "s", "greatest", 0.05), Quantity(KILLED, "s", "greatest", 0.05)],
    measure=measure,
)
