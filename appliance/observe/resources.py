"""What this machine has and what is left of it, as this process may use it.

Every function reads the system anew and takes at most a millisecond, `gpus` excepted. `root` is for tests: a folder
that holds another machine's `proc`, `sys` and `etc`.
"""

from __future__ import annotations

import math
import os
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import psutil

from appliance.observe.cgroups import cpu_quota, memory_limits

_FEATURES = {
    "avx": "AVX",
    "avx2": "AVX2",
    "fma": "FMA",
    "f16c": "F16C",
    "avx_vnni": "AVX-VNNI",
    "avx512f": "AVX-512",
    "avx512_vnni": "AVX-512-VNNI",
    "avx512_bf16": "AVX-512-BF16",
    "amx_tile": "AMX",
    "neon": "NEON",
    "asimd": "NEON",
    "asimddp": "dotprod",
    "i8mm": "i8mm",
    "sve": "SVE",
}
"""The kernel's names in /proc/cpuinfo, and what people call the features that make inference fast."""

_NVIDIA_SMI_TIMEOUT_S = 10.0


@dataclass(frozen=True, slots=True)
class Memory:
    """Main memory in bytes: what this process may use at most, and what is free for it now without swapping."""

    total: int
    available: int


@dataclass(frozen=True, slots=True)
class Disk:
    """A file system in bytes; `free` is what this user may still fill."""

    total: int
    free: int


@dataclass(frozen=True, slots=True)
class Gpu:
    """A GPU and its own memory in bytes; None where it shares the main memory or does not tell."""

    name: str
    memory: int | None


@dataclass(frozen=True, slots=True)
class Load:
    """How busy the machine is: share of its CPUs since the last look, 0 to 1; runnable tasks, mean of a minute; the
    bytes of main memory that this process holds.
    """

    cpu: float
    runnable: float
    resident: int


def load() -> Load:
    """Return how busy the machine is."""
    return Load(psutil.cpu_percent(None) / 100, os.getloadavg()[0], psutil.Process().memory_info().rss)


def physical_cores(root: Path = Path("/")) -> int:
    """Return the physical cores that this process may keep busy: by affinity and by cgroup quota, at least 1.

    Two hyper-threads of one core count once: inference saturates a core's vector units with one thread.
    """
    usable = os.sched_getaffinity(0)
    cores = {_siblings(root, cpu) for cpu in usable}
    quota = cpu_quota(root)
    return max(1, len(cores) if quota is None else min(len(cores), math.floor(quota)))


def memory(root: Path = Path("/")) -> Memory:
    """Return main memory as this process may use it: the machine's, or less where a cgroup limits it."""
    machine = psutil.virtual_memory()
    limits = memory_limits(root)
    return Memory(
        total=min([machine.total, *(each.limit for each in limits)]),
        available=max(0, min([machine.available, *(each.limit - each.used for each in limits)])),
    )


def resident_memory(process: int) -> int:
    """Return the bytes of memory that a process has now, mapped files included; 0 if it is gone."""
    try:
        return int(psutil.Process(process).memory_info().rss)
    except psutil.Error:
        return 0


def disk(folder: Path) -> Disk:
    """Return the file system that holds the folder, or would hold it once it is made.

    Raises:
        OSError: Not even the folder's parents can be looked at.
    """
    existing = next(each for each in (folder, *folder.parents) if each.exists())
    usage = shutil.disk_usage(existing)
    return Disk(usage.total, usage.free)


def cpu_name(root: Path = Path("/")) -> str:
    """Return the CPU's name as its maker gives it; on ARM, where the kernel does not know it, the machine's."""
    for line in _read(root / "proc/cpuinfo").splitlines():
        key, _, value = line.partition(":")
        if key.strip() == "model name":
            return value.strip()
    return board_name(root) or os.uname().machine


def cpu_features(root: Path = Path("/")) -> frozenset[str]:
    """Return those of the CPU's features that speed inference up, such as `AVX2`, `AMX`, `NEON`, `dotprod`."""
    for line in _read(root / "proc/cpuinfo").splitlines():
        key, _, value = line.partition(":")
        if key.strip() in {"flags", "Features"}:
            return frozenset(_FEATURES[each] for each in value.split() if each in _FEATURES)
    return frozenset()


def board_name(root: Path = Path("/")) -> str:
    """Return the board's name from the device tree, such as `NVIDIA Jetson Orin Nano`; empty on a PC."""
    return _read(root / "proc/device-tree/model").strip("\0 \n")


def gpus(root: Path = Path("/")) -> tuple[Gpu, ...]:
    """Return the NVIDIA GPUs that a driver is loaded for. May take seconds: it wakes a sleeping driver."""
    if (root / "etc/nv_tegra_release").exists() or "jetson" in board_name(root).lower():
        return (Gpu(board_name(root) or "NVIDIA Jetson", None),)
    known = sorted((root / "proc/driver/nvidia/gpus").glob("*/information"))
    if not known:
        return ()
    return _ask_nvidia_smi() or tuple(Gpu(_model(_read(each)), None) for each in known)


def _ask_nvidia_smi() -> tuple[Gpu, ...]:
    query = ["nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader,nounits"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, timeout=_NVIDIA_SMI_TIMEOUT_S, check=True)
    except (OSError, subprocess.SubprocessError):
        return ()  # the program is not installed, or it hangs on a broken driver: /proc still knows the names
    return tuple(parse_nvidia_smi(answer.stdout))


def parse_nvidia_smi(answer: str) -> list[Gpu]:
    """Return the GPUs in `nvidia-smi`'s answer: a line each, with the name and the memory in MiB or `[N/A]`."""
    found = []
    for line in answer.splitlines():
        name, _, mebibytes = line.rpartition(",")
        if name:
            size = mebibytes.strip()
            found.append(Gpu(name.strip(), int(size) * 2**20 if size.isdecimal() else None))
    return found


def _model(information: str) -> str:
    for line in information.splitlines():
        key, _, value = line.partition(":")
        if key.strip() == "Model":
            return value.strip()
    return "NVIDIA GPU"


def _siblings(root: Path, cpu: int) -> str:
    """Return the logical CPUs of the same core as the kernel lists them, which names the core."""
    topology = root / f"sys/devices/system/cpu/cpu{cpu}/topology"
    return _read(topology / "thread_siblings_list").strip() or str(cpu)


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""  # another kind of machine does not have the file; the callers say what they do without
