from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from appliance.cli.doctor.findings import Finding, Status, size
from appliance.cli.doctor.judge_machine import (
    judge_cpu,
    judge_disk,
    judge_gpu,
    judge_llama,
    judge_memory,
    judge_model,
)
from appliance.cli.doctor.judge_setup import (
    EARLIEST,
    FAR_AHEAD_S,
    FolderFacts,
    PortState,
    judge_clock,
    judge_exposure,
    judge_folder,
    judge_open_files,
    judge_port,
    judge_sqlite,
    judge_systemd,
    judge_threads,
    judge_tls,
)
from appliance.observe.resources import Disk, Gpu, Memory

BYTES = st.integers(0, 2**44)
FEATURES = st.frozensets(
    st.sampled_from(["AVX", "AVX2", "FMA", "F16C", "AVX-512", "AMX", "NEON", "dotprod", "i8mm", "SVE"])
)
RANK = {Status.OK: 0, Status.WARNING: 1, Status.FAILURE: 2}


def check_form(finding: Finding) -> None:
    """Every finding tells something in one line, and what is not ok says what to do."""
    assert finding.name
    assert finding.found.isprintable()
    assert finding.found.endswith(".")
    assert (finding.advice == "") == (finding.status is Status.OK)
    assert finding.advice.isprintable()


@st.composite
def memories(draw: st.DrawFn) -> Memory:
    total = draw(BYTES)
    return Memory(total, draw(st.integers(0, total)))


# Machine


@given(st.sampled_from(["x86_64", "aarch64", "riscv64"]), FEATURES, FEATURES, st.integers(1, 256))
def test_a_feature_more_never_makes_a_cpu_worse(
    machine: str, features: frozenset[str], more: frozenset[str], cores: int
) -> None:
    less_found = judge_cpu("A CPU", machine, features, cores)
    more_found = judge_cpu("A CPU", machine, features | more, cores)
    check_form(less_found)
    assert RANK[more_found.status] <= RANK[less_found.status]
    assert less_found.status is not Status.FAILURE


def test_a_cpu_without_avx2_is_slow_and_a_foreign_one_untested() -> None:
    slow = judge_cpu("Atom", "x86_64", frozenset({"AVX"}), 1)
    assert (slow.status, "lacks AVX2, F16C, FMA" in slow.found) == (Status.WARNING, True)
    assert "1 usable physical core," in slow.found
    assert judge_cpu("Jetson", "aarch64", frozenset({"NEON", "dotprod"}), 6).status is Status.OK
    assert judge_cpu("Board", "riscv64", frozenset(), 4).status is Status.WARNING


@given(FEATURES, FEATURES)
def test_llama_cpp_must_not_use_what_the_cpu_lacks(compiled: frozenset[str], features: frozenset[str]) -> None:
    finding = judge_llama("0.3.36", compiled, features, "x86_64")
    check_form(finding)
    assert (finding.status is Status.FAILURE) == bool(compiled - features)
    assert judge_llama("0.3.36", features, features, "x86_64").status is Status.OK


def test_a_portable_build_on_a_fast_cpu_is_worth_compiling_again() -> None:
    finding = judge_llama("0.3.36", frozenset({"AVX"}), frozenset({"AVX", "AVX2", "AMX"}), "x86_64")
    assert finding.status is Status.WARNING
    assert "does not use AVX2 of" in finding.found
    assert "AVX-512" in judge_llama("1", frozenset({"AVX-512"}), frozenset(), "x86_64").found


@pytest.mark.parametrize(
    ("gpus", "uses_gpu", "layers", "status", "words"),
    [
        ([], False, -1, Status.OK, "CPU"),
        ([Gpu("Orin", None)], True, -1, Status.OK, "Orin."),
        ([Gpu("T4", 15 * 10**9)], None, -1, Status.OK, "T4 with 15.0 GB."),
        ([Gpu("T4", None), Gpu("T4", None)], False, -1, Status.WARNING, "T4, T4, but llama.cpp was compiled without"),
        ([Gpu("T4", None)], True, 0, Status.WARNING, "gpu_layers is 0"),
    ],
)
def test_a_gpu_that_lies_idle_is_told(
    gpus: list[Gpu], uses_gpu: bool | None, layers: int, status: Status, words: str
) -> None:
    finding = judge_gpu(gpus, uses_gpu, layers)
    check_form(finding)
    assert finding.status is status
    assert words in finding.found


@given(memories(), BYTES)
def test_more_memory_never_makes_a_finding_worse(memory: Memory, more: int) -> None:
    bigger = Memory(memory.total + more, memory.available + more)
    for judge in (judge_memory, lambda each: judge_model("m:1", 10**9, each, cells=8192, is_here=True)):
        check_form(judge(memory))
        assert RANK[judge(bigger).status] <= RANK[judge(memory).status]


@given(BYTES, memories(), st.booleans())
def test_a_model_fails_exactly_when_it_can_never_fit(needed: int, memory: Memory, is_here: bool) -> None:
    finding = judge_model("a:1", needed, memory, cells=8192, is_here=is_here)
    check_form(finding)
    assert (finding.status is Status.FAILURE) == (needed > memory.total)
    assert (finding.status is Status.OK) == (is_here and needed <= memory.available)


def test_a_model_that_is_not_here_comes_with_the_command_that_fetches_it() -> None:
    finding = judge_model("smollm2:1", 10**8, Memory(10**9, 10**9), cells=8192, is_here=False)
    assert finding.advice == "Fetch it: appliance models pull smollm2"


@pytest.mark.parametrize(
    ("total", "available", "status"),
    [
        (2**29 - 1, 2**29 - 1, Status.FAILURE),
        (2**29, 2**28 - 1, Status.WARNING),
        (2**29, 2**28, Status.OK),
    ],
)
def test_memory_is_judged_at_its_bounds(total: int, available: int, status: Status) -> None:
    assert judge_memory(Memory(total, available)).status is status


@given(BYTES, BYTES, BYTES)
def test_more_disk_never_makes_a_finding_worse(free: int, more: int, still_to_fetch: int) -> None:
    finding = judge_disk(Disk(2**45, free), still_to_fetch)
    check_form(finding)
    assert RANK[judge_disk(Disk(2**45, free + more), still_to_fetch).status] <= RANK[finding.status]
    if free < still_to_fetch:
        assert finding.status is Status.FAILURE


@pytest.mark.parametrize(
    ("free", "status"),
    [(199_999_999, Status.FAILURE), (200_000_000, Status.WARNING), (10**9 - 1, Status.WARNING), (10**9, Status.OK)],
)
def test_a_disk_is_judged_at_its_bounds(free: int, status: Status) -> None:
    assert judge_disk(Disk(10**12, free), 0).status is status
    assert judge_disk(Disk(10**12, free + 5), 5).status is status


def test_sizes_are_told_in_mega_and_gigabytes() -> None:
    assert [size(0), size(98_362_432), size(10**9), size(1_234_567_890_123)] == [
        "0 MB",
        "98 MB",
        "1.0 GB",
        "1,234.6 GB",
    ]


# Setup

FOLDER = FolderFacts(
    path="/data", nearest="/data", is_folder=True, writable=True, owner="a", user="a", database_mode="600"
)


@pytest.mark.parametrize(
    ("facts", "status", "words"),
    [
        (FOLDER, Status.OK, "/data is writable"),
        (replace(FOLDER, database_mode=""), Status.OK, "/data is writable"),
        (replace(FOLDER, nearest="/"), Status.OK, "/data will be made in /"),
        (replace(FOLDER, database_mode="644"), Status.WARNING, "mode 644"),
        (replace(FOLDER, writable=False, user="b"), Status.FAILURE, "owned by a, looked at as b"),
        (replace(FOLDER, is_folder=False), Status.FAILURE, "no folder"),
    ],
)
def test_the_data_folder_must_be_ours(facts: FolderFacts, status: Status, words: str) -> None:
    finding = judge_folder(facts)
    check_form(finding)
    assert finding.status is status
    assert words in finding.found


@pytest.mark.parametrize(
    ("state", "status"),
    [
        (PortState.FREE, Status.OK),
        (PortState.OURS, Status.OK),
        (PortState.TAKEN, Status.FAILURE),
        (PortState.FORBIDDEN, Status.FAILURE),
        (PortState.NOT_HERE, Status.FAILURE),
    ],
)
def test_the_port_must_be_free_or_ours(state: PortState, status: Status) -> None:
    finding = judge_port("127.0.0.1", 8080, state)
    check_form(finding)
    assert finding.status is status
    assert "127.0.0.1" in finding.found
    assert judge_port("127.0.0.1", 0, PortState.FREE).status is Status.OK


@given(st.floats(0, 2e10), st.floats(0, 2e10), st.none() | st.booleans())
def test_the_clock_is_ok_only_within_plausible_years(now: float, built: float, synchronized: bool | None) -> None:
    finding = judge_clock(now, built, synchronized)
    check_form(finding)
    assert finding.status is not Status.FAILURE
    if finding.status is Status.OK:
        assert EARLIEST - 86_400 <= now <= EARLIEST + 2 * FAR_AHEAD_S
        assert synchronized is not False


@pytest.mark.parametrize(
    ("now", "synchronized", "status", "words"),
    [
        (0.0, True, Status.WARNING, "before this program was made"),
        (1.9e9, True, Status.OK, "kept by NTP"),
        (1.9e9, None, Status.OK, "plausible."),
        (1.9e9, False, Status.WARNING, "nothing keeps it right"),
        (1.8e9 - 86_401, None, Status.WARNING, "1 days before"),
        (1.8e9 - 86_400, None, Status.OK, "plausible"),
        (1.8e9 + FAR_AHEAD_S + 1, None, Status.WARNING, "7,300 days after"),
        (1.8e9 + FAR_AHEAD_S, None, Status.OK, "plausible"),
    ],
)
def test_the_clock_is_judged_at_its_bounds(now: float, synchronized: bool | None, status: Status, words: str) -> None:
    finding = judge_clock(now, 1.8e9, synchronized)
    assert finding.status is status
    assert words in finding.found


@pytest.mark.parametrize("is_loopback", [True, False])
@pytest.mark.parametrize("insecure", [True, False])
@pytest.mark.parametrize("has_keys", [True, False])
def test_only_what_is_open_to_others_and_insecure_is_warned_of(
    is_loopback: bool, insecure: bool, has_keys: bool
) -> None:
    finding = judge_exposure("192.168.1.2", is_loopback=is_loopback, insecure=insecure, has_keys=has_keys)
    check_form(finding)
    assert (finding.status is Status.WARNING) == (insecure and not is_loopback)


@pytest.mark.parametrize(
    ("problem", "mode", "status"),
    [("", 0o100640, Status.OK), ("", 0o100644, Status.WARNING), ("no PEM", 0, Status.FAILURE)],
)
def test_tls_files_must_work_and_the_key_be_secret(problem: str, mode: int, status: Status) -> None:
    finding = judge_tls(problem, mode)
    check_form(finding)
    assert finding.status is status


@given(st.integers(0, 1024), st.integers(1, 256))
def test_more_threads_than_cores_are_warned_of(threads: int, cores: int) -> None:
    finding = judge_threads(threads, cores)
    check_form(finding)
    assert (finding.status is Status.WARNING) == (threads > cores)


@given(st.integers(0, 2**20), st.integers(1, 2**16))
def test_a_connection_needs_an_open_file(limit: int, connections: int) -> None:
    finding = judge_open_files(limit, connections)
    check_form(finding)
    assert (finding.status is Status.OK) == (limit >= connections + 128)


def test_an_old_sqlite_and_a_machine_without_systemd_are_told() -> None:
    for finding, status in (
        (judge_sqlite((3, 31, 1), (3, 37, 0)), Status.FAILURE),
        (judge_sqlite((3, 37, 0), (3, 37, 0)), Status.OK),
        (judge_systemd(True), Status.OK),
        (judge_systemd(False), Status.WARNING),
    ):
        check_form(finding)
        assert finding.status is status
