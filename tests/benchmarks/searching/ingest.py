"""How fast files are taken in: many small ones by keyword, and passages with their vectors."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from itertools import islice

from appliance.bench import retrieval
from appliance.bench.client import Connection
from appliance.bench.server import running
from appliance.core.settings import Settings
from tests.benchmarks import texts
from tests.benchmarks.peers import OURS, home_like, new_home
from tests.benchmarks.searching import files
from tests.benchmarks.searching.peers import Peer
from tests.benchmarks.searching.workload import Trial, Workload
from tests.benchmarks.workload import Quantity, Sample

TAKEN_IN, EMBEDDED, SHARE = "taken in", "embedded alone", "taken in of embedded alone"
SENTENCES = 8
"""Of a passage."""
INPUTS = 32
"""Of a request, as ingest embeds them."""
WARMING = 32


async def add_files(trial: Trial) -> Sample:
    """Measure small files, with nothing that embeds them."""
    with new_home() as home:
        return Sample(await files.measure(home, trial.effort.files))


async def take_in(trial: Trial) -> Sample:
    """Measure passages through the HTTP API of a server: embedded, and others of the same kind as files of a store."""
    count = trial.effort.passages
    with home_like(trial.data) as home:
        settings = replace(Settings(), data_dir=home, model="", embedding_cache_bytes=0, log_level="warning")
        async with running(settings) as server:
            with await Connection.open(server.port) as connection:
                await _embed(connection, _passages(f"{trial.run}/warming", WARMING))
                first_s = await _embed(connection, _passages(f"{trial.run}/first", count // 2))
                taken_s = await _take_in(connection, server.port, _passages(f"{trial.run}/taken in", count))
                second_s = await _embed(connection, _passages(f"{trial.run}/second", count - count // 2))
    embedded_s = first_s + second_s  # half before and half after: what slows the machine slows both
    return Sample({TAKEN_IN: count / taken_s, EMBEDDED: count / embedded_s, SHARE: embedded_s / taken_s})


def _passages(seed: str, count: int) -> list[str]:
    sentences = texts.prose(seed)
    return [" ".join(islice(sentences, SENTENCES)) for _ in range(count)]


async def _embed(connection: Connection, passages: Sequence[str]) -> float:
    began = time.perf_counter()
    for first in range(0, len(passages), INPUTS):
        body = {"model": Settings().embedding_model, "input": passages[first : first + INPUTS]}
        await retrieval.call(connection, "POST", "/v1/embeddings", body)
    return time.perf_counter() - began


async def _take_in(connection: Connection, port: int, passages: Sequence[str]) -> float:
    store = (await retrieval.call(connection, "POST", "/v1/vector_stores", {"name": "benchmark"}))["id"]
    uploaded: dict[str, str] = {}
    documents = {str(number): each for number, each in enumerate(passages)}
    await retrieval.upload(retrieval.Server(port), documents, uploaded, lambda _: None)
    began = time.perf_counter()
    await retrieval.take_in(connection, store, list(uploaded), lambda _: None)
    return time.perf_counter() - began


def _ours_alone(peers: Sequence[Peer]) -> list[Peer]:
    return [each for each in peers if each.name == OURS]


FILES = Workload(
    name="files",
    counted="Small files of 120 words a second, with the real parser, chunker and keyword index; nothing embeds them.",
    quantities=[
        Quantity(files.UPLOADED, "files/s", "least", None, compared="value"),
        Quantity(files.QUEUED, "files/s", "least", None, compared="value"),
        Quantity(files.SEARCHABLE, "files/s", "least", 200.0, compared="value"),
    ],
    measure=add_files,
    baseline=OURS,
    contestants=_ours_alone,
)
INGEST = Workload(
    name="ingest",
    counted="Passages of eight sentences a second over HTTP: as files of a vector store, from adding them until all "
    "have their vectors, and by /v1/embeddings, 32 a request.",
    quantities=[
        Quantity(TAKEN_IN, "passages/s", "least", None, compared="value"),
        Quantity(EMBEDDED, "passages/s", "least", None, compared="value"),
        Quantity(SHARE, "", "least", 0.85, compared="value"),
    ],
    measure=take_in,
    baseline=OURS,
    contestants=_ours_alone,
)
