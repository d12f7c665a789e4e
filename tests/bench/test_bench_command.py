"""`appliance bench` for real, on a tiny model; how fast it is proves nothing and is not looked at."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.bench.conftest import DEADLINE_S, Bench


def figures(report: dict[str, Any], measurement: str) -> dict[str, dict[str, Any]]:
    (found,) = [each for each in report["measurements"] if each["name"] == measurement]
    assert found["counted"]
    return {each["name"]: each for each in found["figures"]}


def test_everything_is_measured_and_reported(bench: Bench) -> None:
    report = bench.report()
    assert [each["name"] for each in report["measurements"]] == [
        "throughput",
        "start",
        "responsiveness",
        "overload",
    ]
    assert report["quick"] is True
    assert report["software"]["model"] == "tiny:1"
    assert report["software"]["context_cells"] == 2048
    assert report["software"]["threads"] >= 1
    assert report["software"]["llama_cpp"]
    assert report["machine"]["cpu"]
    assert report["machine"]["cores"] >= 1
    for measurement in report["measurements"]:
        for figure in measurement["figures"]:
            assert figure["value"] >= 0
            assert (figure["target"] is None) == (figure["met"] is None) == (figure["bound"] is None)

    throughput = figures(report, "throughput")
    for streams in (1, 4, 8):
        server, bare = throughput[f"server, {streams} streams"], throughput[f"bare loop, {streams} streams"]
        ratio = throughput[f"server / bare loop, {streams} streams"]
        assert ratio["value"] == pytest.approx(server["value"] / bare["value"])
        assert ratio["met"] == (ratio["value"] >= 0.95)

    start = figures(report, "start")
    assert 0 < start["memory without a model"]["value"] < start["memory with the KV cells in use"]["value"]
    assert start["template process"]["value"] > 0

    (responsiveness,) = [each for each in report["measurements"] if each["name"] == "responsiveness"]
    assert responsiveness["details"]["long_prompt_tokens"] == 256
    assert responsiveness["details"]["longest_gap_of_each_answer_ms"]
    assert responsiveness["details"]["health_probes"] >= 1

    overload = figures(report, "overload")
    counts = [overload[name]["value"] for name in ("answered", "refused with Retry-After", "lost")]
    assert sum(counts) == 200
    assert counts[2] == 0
    assert counts[0] >= 64  # at least those who found a place in the queue
    assert overload["memory at its peak"]["value"] >= overload["memory before"]["value"] > 0


def test_a_person_gets_a_table_and_progress_apart_from_it(bench: Bench) -> None:
    result = bench.run("responsiveness", "--quick")
    assert result.returncode == 0, result.stderr
    assert "responsiveness ..." in result.stderr
    assert "longest gap in a stream" in result.stdout
    assert "≤ 300" in result.stdout
    assert "Traceback" not in result.stdout + result.stderr


def test_the_exit_code_tells_of_a_missed_target_only_when_asked(bench: Bench) -> None:
    result = bench.run("throughput", "--quick", "--json", "--check", "--runs", "2")
    (measurement,) = json.loads(result.stdout)["measurements"]
    missed = [each for each in measurement["figures"] if each["met"] is False]
    assert result.returncode == (1 if missed else 0)
    assert measurement["details"]["runs"] == 2
    assert all(each["spread"]["count"] == 2 for each in measurement["figures"])


def test_an_unknown_model_is_refused_before_anything_is_measured(bench: Bench) -> None:
    result = bench.run("--quick", "--model", "absent")
    assert result.returncode == 3
    assert "absent" in result.stderr
    assert "tiny:1" in result.stderr
    assert result.stdout == ""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_server_too(data: Path, number: signal.Signals) -> None:
    command = [sys.executable, "-m", "appliance", "bench", "start", "--runs", "1000", "--data", str(data)]
    environment = {**os.environ, "APPLIANCE_MODEL": "tiny", "APPLIANCE_THREADS": "1"}
    with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        assert any("start, 1 of 1000" in line for line in process.stderr)
        children = psutil.Process(process.pid).children(recursive=True)
        process.send_signal(number)
        process.communicate(timeout=DEADLINE_S)
    assert process.returncode not in {0, None}
    _, alive = psutil.wait_procs(children, timeout=0)
    assert not alive
