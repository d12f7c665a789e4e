"""Each peer as a real server of a tiny model; how fast it is proves nothing and is not looked at."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from appliance.bench.client import ConnectionLostError, ask
from appliance.bench.requests import CHAT, answer_text
from appliance.core.errors import UnavailableError
from appliance.engine.llama.native import llama
from tests.benchmarks import steps
from tests.benchmarks.lookup import WORKLOAD as LOOKUP
from tests.benchmarks.peers import PEERS, Appliance, LlamaServer, Model, Peer, peers, program_of, user
from tests.benchmarks.results import table_of
from tests.benchmarks.suite import WORKLOADS, run
from tests.benchmarks.workload import QUICK, Trial

TINY = replace(
    QUICK,
    clients=(1, 9),
    answer=200,
    neighbour_answer=200,
    prompt=40,
    system_prompt=60,
    sharers=3,
    streamed=3000,
    long_prompt=600,
    history=60,
    idle_s=0.1,
)
"""Too little to measure anything."""


def peer(name: str, model: Model) -> Peer:
    """Return a peer, or skip the test where it is not built."""
    if name == "appliance":
        return Appliance(model)
    program = program_of(name, build=False)
    if not program.exists():
        pytest.skip(f"{name} is not built: tests/benchmarks/build_peer {name} does so")
    (_, found) = peers(model, [name], build=False)
    return found


def left_in(folder: Path) -> list[Path]:
    return list(folder.iterdir())


@pytest.mark.slow
@pytest.mark.anyio
@pytest.mark.parametrize("name", ["appliance", *PEERS])
async def test_a_peer_starts_answers_as_long_as_asked_and_is_gone_afterwards(
    name: str, model: Model, work_folder: Path
) -> None:
    subject = peer(name, model)
    async with subject.fresh() as server:
        response = await ask(server.port, "POST", CHAT, subject.request([user("Tell me more.")], 12))
        subject.check(response, 12)
        assert answer_text(response)
        assert 10_000_000 < server.proportional_memory() <= server.memory().server + server.memory().children
        with pytest.raises(ConnectionLostError, match="12 tokens was expected"):
            subject.check(await ask(server.port, "POST", CHAT, {"messages": "wrong"}), 12)
    assert not psutil.pid_exists(server.process.pid)
    assert left_in(work_folder) == []


@pytest.mark.slow
@pytest.mark.anyio
@pytest.mark.parametrize("name", [each for each in WORKLOADS if each != LOOKUP.name])
async def test_a_workload_measures_what_it_promises(name: str, model: Model, count: Callable[[str], int]) -> None:
    told: list[str] = []
    result = await run(WORKLOADS[name], [Appliance(model)], TINY, count, told.append)
    assert told == [f"{name}, run 1 of 1: appliance"]
    measured = {each.name for each in result.comparisons}
    if name == "decode":
        assert measured == {"1 client"}
    else:
        assert measured == {each.name for each in WORKLOADS[name].quantities}
    assert all(each.values["appliance"].median > 0 for each in result.comparisons)
    headings, rows = table_of(result)
    assert all(len(row) == len(headings) for row in rows)


def test_all_servers_of_a_run_get_the_same_texts_and_those_of_the_next_run_get_others(
    model: Model, count: Callable[[str], int]
) -> None:
    ours, theirs = Appliance(model), LlamaServer(model, Path("llama-server"))
    first, same, later = (Trial(each, QUICK, run, count) for each, run in ((ours, 0), (theirs, 0), (ours, 1)))
    assert first.ask("chat", 50) == same.ask("chat", 50)
    assert first.ask("chat", 50) != later.ask("chat", 50)
    assert first.ask("chat", 50) != first.ask("another", 50)


@pytest.mark.anyio
async def test_a_peer_that_does_not_start_is_told_with_its_last_words(model: Model) -> None:
    with pytest.raises(BaseExceptionGroup) as caught:
        async with LlamaServer(model, Path("/bin/false")).fresh():
            pytest.fail("it cannot have started")
    assert caught.group_contains(UnavailableError, match="exit code 1")


@pytest.mark.slow
@pytest.mark.anyio
async def test_the_cost_of_a_step_is_measured_beside_parked_states(model: Model) -> None:
    native = llama.llama_decode
    cases = [steps.Case(1, 20, 0), steps.Case(4, 20, 40)]
    result = await steps.measure(model.path, cases, threads=1, cells=2048, progress=lambda _: None)
    assert [row[:3] for row in result.rows] == [["1", "20", "0"], ["4", "20", "40"]]
    assert all(float(row[4]) > 0 and float(row[5]) > 0 for row in result.rows)
    assert llama.llama_decode is native, "the watch is taken off again"


def test_the_environment_of_a_peer_does_not_change_what_it_does(monkeypatch: pytest.MonkeyPatch) -> None:
    from tests.benchmarks.peers import _environment

    monkeypatch.setenv("LLAMA_ARG_CTX_SIZE", "1")
    assert "LLAMA_ARG_CTX_SIZE" not in _environment("LLAMA_")
    assert _environment("LLAMA_")["PATH"] == os.environ["PATH"]
