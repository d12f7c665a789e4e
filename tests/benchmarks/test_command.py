"""`tests/benchmarks/engine` and `build_peer` as a person runs them, as far as that takes no environment."""

from __future__ import annotations

import re
import subprocess

import pytest

from tests.benchmarks.__main__ import NAMES
from tests.benchmarks.peers import HERE, PEERS, THREADS
from tests.benchmarks.searching.peers import CHROMADB
from tests.benchmarks.tensor.peers import MLSERVER
from tests.benchmarks.workload import Effort


def run(script: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([HERE / script, *arguments], capture_output=True, text=True, timeout=60, check=False)


def test_help_names_every_workload_and_peer_and_the_defaults() -> None:
    result = run("engine", "--help")
    assert result.returncode == 0
    workloads = re.search(r"--workload NAME\.\.\..*?of:\n +([a-z -]+)\n", result.stdout, re.DOTALL)
    assert workloads is not None
    assert workloads[1].split() == list(NAMES)
    assert all(f"{name} " in result.stdout or f"{name}\n" in result.stdout for name in PEERS)
    assert f"the default is {Effort().runs}" in result.stdout
    assert f"Of each server; the default is {THREADS}" in result.stdout
    assert "Examples:" in result.stdout


def test_help_names_every_peer_that_can_be_built() -> None:
    result = run("build_peer", "--help")
    assert result.returncode == 0
    assert all(f"\n  {name} " in result.stdout for name in (*PEERS, MLSERVER, CHROMADB))


@pytest.mark.parametrize("script", ["engine", "build_peer"])
def test_an_unknown_option_is_refused_before_anything_is_set_up(script: str) -> None:
    result = run(script, "--no-such-option")
    assert result.returncode == 2
    assert "--no-such-option" in result.stderr
    assert "--help" in result.stderr


def test_an_unknown_peer_is_refused() -> None:
    result = run("build_peer", "other-server")
    assert result.returncode == 2
    assert "no peer named other-server" in result.stderr


def test_readme_explains_every_workload() -> None:
    readme = (HERE / "../../README.md").read_text(encoding="utf-8")
    _, _, section = readme.partition("Against its peers")
    assert re.findall(r"^\| `([a-z-]+)` \|", section.partition("tests/benchmarks/tensors")[0], re.MULTILINE) == list(
        NAMES
    )
