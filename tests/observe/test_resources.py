from __future__ import annotations

import os
import shutil
from pathlib import Path

import psutil
import pytest

from appliance.observe import resources
from appliance.observe.cgroups import MemoryLimit, cpu_quota, memory_limits
from appliance.observe.resources import (
    Gpu,
    Memory,
    board_name,
    cpu_features,
    cpu_name,
    disk,
    gpus,
    memory,
    parse_nvidia_smi,
    physical_cores,
)

MEBIBYTE = 2**20


def machine(root: Path, files: dict[str, str]) -> Path:
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content, encoding="utf-8")
    return root


def with_cores(root: Path, *, threads_of_a_core: int) -> None:
    """Describe this process's CPUs as hyper-threads: so many neighbours share a core."""
    for index, cpu in enumerate(sorted(os.sched_getaffinity(0))):
        core = index // threads_of_a_core
        machine(root, {f"sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list": f"{core},{core + 64}\n"})


# Control groups


def test_the_tightest_limit_of_a_v2_group_and_its_parents_counts(tmp_path: Path) -> None:
    machine(
        tmp_path,
        {
            "proc/self/cgroup": "0::/system.slice/appliance.service\n",
            "sys/fs/cgroup/system.slice/appliance.service/memory.max": "max\n",
            "sys/fs/cgroup/system.slice/appliance.service/memory.high": f"{600 * MEBIBYTE}\n",
            "sys/fs/cgroup/system.slice/appliance.service/memory.current": f"{500 * MEBIBYTE}\n",
            "sys/fs/cgroup/system.slice/appliance.service/memory.stat": f"anon 1\ninactive_file {100 * MEBIBYTE}\n",
            "sys/fs/cgroup/system.slice/memory.max": f"{450 * MEBIBYTE}\n",
            "sys/fs/cgroup/system.slice/memory.current": f"{400 * MEBIBYTE}\n",
            "sys/fs/cgroup/system.slice/appliance.service/cpu.max": "max 100000\n",
            "sys/fs/cgroup/system.slice/cpu.max": "150000 100000\n",
        },
    )
    assert memory_limits(tmp_path) == [
        MemoryLimit(600 * MEBIBYTE, 400 * MEBIBYTE),
        MemoryLimit(450 * MEBIBYTE, 400 * MEBIBYTE),
    ]
    assert memory(tmp_path) == Memory(450 * MEBIBYTE, 50 * MEBIBYTE)
    assert cpu_quota(tmp_path) == 1.5


def test_a_v1_group_is_limited_by_its_own_controllers(tmp_path: Path) -> None:
    machine(
        tmp_path,
        {
            "proc/self/cgroup": "4:memory:/docker/0a1b\n2:cpu,cpuacct:/docker/0a1b\n1:pids:/\n",
            "sys/fs/cgroup/memory/docker/0a1b/memory.limit_in_bytes": f"{300 * MEBIBYTE}\n",
            "sys/fs/cgroup/memory/docker/0a1b/memory.usage_in_bytes": f"{120 * MEBIBYTE}\n",
            "sys/fs/cgroup/memory/docker/0a1b/memory.stat": f"total_inactive_file {20 * MEBIBYTE}\n",
            "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712\n",
            "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1\n",
            "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n",
        },
    )
    assert memory_limits(tmp_path) == [MemoryLimit(300 * MEBIBYTE, 100 * MEBIBYTE)]
    assert cpu_quota(tmp_path) is None
    machine(
        tmp_path,
        {
            "sys/fs/cgroup/cpu/docker/0a1b/cpu.cfs_quota_us": "200000\n",
            "sys/fs/cgroup/cpu/docker/0a1b/cpu.cfs_period_us": "100000\n",
        },
    )
    assert cpu_quota(tmp_path) == 2.0


def test_in_a_container_that_shows_the_hosts_path_the_mounts_root_counts(tmp_path: Path) -> None:
    machine(
        tmp_path,
        {
            "proc/self/cgroup": "4:memory:/docker/not/mounted/here\n",
            "sys/fs/cgroup/memory/memory.limit_in_bytes": f"{300 * MEBIBYTE}\n",
        },
    )
    assert memory_limits(tmp_path) == [MemoryLimit(300 * MEBIBYTE, 0)]


@pytest.mark.parametrize(
    "files",
    [
        {},
        {"proc/self/cgroup": ""},
        {"proc/self/cgroup": "nonsense\n::\n0::/a/../../..\n"},
        {
            "proc/self/cgroup": "0::/\n",
            "sys/fs/cgroup/memory.max": "lots\n",
            "sys/fs/cgroup/memory.stat": "inactive_file many\n\n",
            "sys/fs/cgroup/cpu.max": "100000\n",
        },
        {"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "100000 0\n"},
    ],
)
def test_groups_that_say_nothing_sensible_limit_nothing(tmp_path: Path, files: dict[str, str]) -> None:
    machine(tmp_path, files)
    assert memory_limits(tmp_path) == []
    assert cpu_quota(tmp_path) is None
    assert memory(tmp_path).total == psutil.virtual_memory().total


def test_a_group_over_its_limit_has_nothing_left(tmp_path: Path) -> None:
    machine(
        tmp_path,
        {
            "proc/self/cgroup": "0::/\n",
            "sys/fs/cgroup/memory.max": f"{MEBIBYTE}\n",
            "sys/fs/cgroup/memory.current": f"{2 * MEBIBYTE}\n",
            "sys/fs/cgroup/memory.stat": "inactive_file unknown\n",
        },
    )
    assert memory(tmp_path) == Memory(MEBIBYTE, 0)


# Cores


def test_hyper_threads_of_one_core_count_once(tmp_path: Path) -> None:
    threads = len(os.sched_getaffinity(0))
    with_cores(tmp_path, threads_of_a_core=2)
    assert physical_cores(tmp_path) == (threads + 1) // 2


def test_without_a_topology_each_cpu_counts(tmp_path: Path) -> None:
    assert physical_cores(tmp_path) == len(os.sched_getaffinity(0))


def test_affinity_limits_the_cores() -> None:
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(before)})
    try:
        assert physical_cores() == 1
    finally:
        os.sched_setaffinity(0, before)


@pytest.mark.parametrize(("quota", "cores"), [("50000", 1), ("100000", 1), ("199999", 1)])
def test_a_quota_limits_the_cores_to_whole_ones_and_at_least_one(tmp_path: Path, quota: str, cores: int) -> None:
    machine(tmp_path, {"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": f"{quota} 100000\n"})
    assert physical_cores(tmp_path) == cores


def test_a_large_quota_limits_nothing(tmp_path: Path) -> None:
    machine(tmp_path, {"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "99900000 100000\n"})
    assert physical_cores(tmp_path) == len(os.sched_getaffinity(0))


def test_this_machine_has_what_the_kernel_says() -> None:
    assert 1 <= physical_cores() <= len(os.sched_getaffinity(0))
    now = memory()
    assert 0 < now.available <= now.total <= psutil.virtual_memory().total
    assert cpu_name()


# CPU


def test_the_features_of_an_x86_cpu_have_their_common_names(tmp_path: Path) -> None:
    text = "processor\t: 0\nmodel name\t: Test CPU @ 2.0GHz\nflags\t\t: fpu sse2 avx avx2 fma f16c avx512f amx_tile\n"
    machine(tmp_path, {"proc/cpuinfo": text * 2})
    assert cpu_features(tmp_path) == {"AVX", "AVX2", "FMA", "F16C", "AVX-512", "AMX"}
    assert cpu_name(tmp_path) == "Test CPU @ 2.0GHz"


def test_the_features_of_a_jetson_have_their_common_names(tmp_path: Path) -> None:
    machine(
        tmp_path,
        {
            "proc/cpuinfo": "processor\t: 0\nFeatures\t: fp asimd aes asimddp\n",
            "proc/device-tree/model": "NVIDIA Jetson Orin Nano Developer Kit\0",
        },
    )
    assert cpu_features(tmp_path) == {"NEON", "dotprod"}
    assert cpu_name(tmp_path) == board_name(tmp_path) == "NVIDIA Jetson Orin Nano Developer Kit"
    assert gpus(tmp_path) == (Gpu("NVIDIA Jetson Orin Nano Developer Kit", None),)


def test_an_unknown_machine_has_no_known_features(tmp_path: Path) -> None:
    machine(tmp_path, {"proc/cpuinfo": "processor : 0\nno colon here\n"})
    assert cpu_features(tmp_path) == frozenset()
    assert cpu_name(tmp_path) == os.uname().machine
    assert board_name(tmp_path) == ""
    assert gpus(tmp_path) == ()


# GPU


def test_a_tegra_release_without_a_device_tree_is_a_jetson(tmp_path: Path) -> None:
    machine(tmp_path, {"etc/nv_tegra_release": "# R36 (release), REVISION: 4.3"})
    assert gpus(tmp_path) == (Gpu("NVIDIA Jetson", None),)


def test_nvidia_smis_answer_is_read_line_by_line() -> None:
    answer = "NVIDIA H200, 143771\nNVIDIA Orin (nvgpu), [N/A]\nA, B, 8\n\nnonsense\n"
    assert parse_nvidia_smi(answer) == [
        Gpu("NVIDIA H200", 143771 * MEBIBYTE),
        Gpu("NVIDIA Orin (nvgpu)", None),
        Gpu("A, B", 8 * MEBIBYTE),
    ]


PROGRAMS = {
    "answers": ("echo 'NVIDIA T4, 15360'", (Gpu("NVIDIA T4", 15360 * MEBIBYTE),)),
    "fails": ("echo 'Failed to initialize NVML' >&2; exit 9", (Gpu("Tesla T4", None), Gpu("NVIDIA GPU", None))),
    "hangs": ("exec sleep 60", (Gpu("Tesla T4", None), Gpu("NVIDIA GPU", None))),
    "is missing": (None, (Gpu("Tesla T4", None), Gpu("NVIDIA GPU", None))),
}


@pytest.mark.parametrize("case", PROGRAMS)
def test_the_kernels_names_are_used_when_nvidia_smi_does_not_answer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    script, expected = PROGRAMS[case]
    machine(
        tmp_path,
        {
            "proc/driver/nvidia/gpus/0000:01:00.0/information": "Model: \t\t Tesla T4\nIRQ: 1\n",
            "proc/driver/nvidia/gpus/0000:02:00.0/information": "IRQ: 2\n",
        },
    )
    programs = tmp_path / "programs"
    programs.mkdir()
    for name in ("sh", "sleep"):
        (programs / name).symlink_to(str(shutil.which(name)))
    if script is not None:
        (programs / "nvidia-smi").write_text(f"#!{programs}/sh\n{script}\n")
        (programs / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", str(programs))
    monkeypatch.setattr(resources, "_NVIDIA_SMI_TIMEOUT_S", 0.2 if case == "hangs" else 10.0)
    assert gpus(tmp_path) == expected


# Disk


def test_the_disk_of_a_folder_that_is_not_made_yet_is_its_parents(tmp_path: Path) -> None:
    expected = shutil.disk_usage(tmp_path)
    found = disk(tmp_path / "not" / "yet")
    assert found.total == expected.total
    assert 0 < found.free <= found.total
    assert not (tmp_path / "not").exists()
