"""A chat beside embedding clients: two engines, one CPU budget."""

from __future__ import annotations

import asyncio
from itertools import pairwise

from appliance.bench.client import Response
from appliance.bench.requests import chat, check_complete, text_times
from appliance.bench.server import Server
from appliance.bench.statistics import quantile
from appliance.bench.streams import stream_together
from appliance.core.errors import UnavailableError
from appliance.core.settings import Settings
from tests.benchmarks.tensor.load import offering, once
from tests.benchmarks.tensor.payloads import ours_alone
from tests.benchmarks.tensor.peers import Appliance
from tests.benchmarks.tensor.requests import EMBEDDINGS, embeddings
from tests.benchmarks.tensor.workload import Trial, Workload
from tests.benchmarks.workload import Quantity, Sample

CLIENTS = 8
LEAD_S = 1.0
ALONE, BESIDE = "alone", "beside 8 embedding clients"
EMBEDDED = "embeddings beside the stream"
_COUNTED = (
    "Milliseconds between the tokens of a chat stream of 250 tokens, alone and beside 8 clients of /v1/embeddings with "
    "one sentence after another, and what those are answered a second meanwhile. Ours alone, prompt lookup off; "
    "nothing is promised."
)


async def measure(trial: Trial) -> Sample:
    """Measure ours."""
    assert isinstance(trial.peer, Appliance)
    bodies = [embeddings([sentence]) for sentence in trial.corpus.sentences]
    async with trial.peer.with_chat().running() as server:
        await once(server.port, EMBEDDINGS, bodies[0])
        await _stream(server, 0, 2)
        alone = await _stream(server, 1, trial.effort.streamed)
        rate, beside = await _beside(server, bodies, trial.effort.streamed)
    return Sample({**_gaps(ALONE, alone), **_gaps(BESIDE, beside), EMBEDDED: rate})


async def _beside(server: Server, bodies: list[bytes], tokens: int) -> tuple[float, Response]:
    """Stream while clients embed, who begin before; return their answers a second meanwhile, and the stream."""
    async with offering(server.port, EMBEDDINGS, bodies, CLIENTS) as load:
        await asyncio.sleep(LEAD_S)
        response = await _stream(server, 2, tokens)
    return load.rate(response.sent_at, response.ended_at), response


async def _stream(server: Server, number: int, tokens: int) -> Response:
    request = chat(Settings().model, number, tokens)
    (response,) = await stream_together(server.port, [request], patient=False)
    check_complete(response, tokens)
    return response


def _gaps(name: str, response: Response) -> dict[str, float]:
    gaps = [1e3 * (later - earlier) for earlier, later in pairwise(text_times(response))]
    if not gaps:
        raise UnavailableError("The tokens of a stream came all at once, so there is no time between them.")
    return {
        f"{name}, median": quantile(gaps, 0.5),
        f"{name}, 99th percentile": quantile(gaps, 0.99),
        f"{name}, longest": max(gaps),
    }


WORKLOAD = Workload(
    name="mixed",
    counted=_COUNTED,
    quantities=[
        *(
            Quantity(f"{name}, {which}", "ms", "greatest", None)
            for name in (ALONE, BESIDE)
            for which in ("median", "99th percentile", "longest")
        ),
        Quantity(EMBEDDED, "1/s", "least", None),
    ],
    measure=measure,
    baseline="",
    contestants=ours_alone,
)
