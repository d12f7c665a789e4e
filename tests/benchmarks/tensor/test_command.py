"""`tests/benchmarks/tensors` as a person runs it, as far as that takes no environment."""

from __future__ import annotations

import re

from tests.benchmarks.peers import HERE
from tests.benchmarks.tensor.peers import PEERS, THREADS
from tests.benchmarks.tensor.suite import WORKLOADS
from tests.benchmarks.tensor.workload import Effort
from tests.benchmarks.test_command import run


def test_help_names_every_workload_and_peer_and_the_defaults() -> None:
    result = run("tensors", "--help")
    assert result.returncode == 0
    workloads = re.search(r"--workload NAME\.\.\..*?of:\n +([a-z -]+)\n", result.stdout, re.DOTALL)
    assert workloads is not None
    assert workloads[1].split() == list(WORKLOADS)
    assert f"both of: {' '.join(PEERS)}\n" in result.stdout
    assert f"the default is {Effort().runs}" in result.stdout
    assert f"Of each session; the default is {THREADS}" in result.stdout
    assert "Examples:" in result.stdout


def test_an_unknown_option_is_refused_before_anything_is_set_up() -> None:
    result = run("tensors", "--no-such-option")
    assert result.returncode == 2
    assert "--no-such-option" in result.stderr


def test_readme_explains_every_workload() -> None:
    readme = (HERE / "../../README.md").read_text(encoding="utf-8")
    _, _, section = readme.partition("tests/benchmarks/tensors ")
    names = re.findall(r"^\| `([a-z-]+)` \|", section.partition("tests/benchmarks/retrieval ")[0], re.MULTILINE)
    assert names == list(WORKLOADS)
