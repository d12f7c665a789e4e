"""What the kernel's control groups allow this process: a container or a systemd unit may have less than the machine.

Reads cgroup v2, and v1 where a controller is still there (JetPack 5, old containers). The limits of every group from
ours up to the root count; the tightest wins. Formats: Linux Documentation/admin-guide/cgroup-v2.rst and cgroup-v1/.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

_UNLIMITED_V1 = 1 << 60
"""cgroup v1 writes "no limit" as the largest multiple of a page in 63 bits."""


@dataclass(frozen=True, slots=True)
class MemoryLimit:
    """Bytes that a group may use, and that it uses now without what the kernel would drop at once."""

    limit: int
    used: int


def memory_limits(root: Path = Path("/")) -> list[MemoryLimit]:
    """Return the memory limit of each group that has one, from ours outwards."""
    limits = []
    for folder in _folders(root, "memory"):
        v2 = [_number(folder / "memory.max"), _number(folder / "memory.high")]
        v1 = _number(folder / "memory.limit_in_bytes")
        found = [each for each in (*v2, v1) if each is not None and each < _UNLIMITED_V1]
        if found:
            used = _number(folder / "memory.current") or _number(folder / "memory.usage_in_bytes") or 0
            limits.append(MemoryLimit(min(found), max(0, used - _droppable(folder))))
    return limits


def cpu_quota(root: Path = Path("/")) -> float | None:
    """Return how many CPUs' worth of time our groups may use, or None when it is not limited."""
    quotas = []
    for folder in _folders(root, "cpu"):
        words = _read(folder / "cpu.max").split()
        quota = _number(folder / "cpu.cfs_quota_us")
        period = _number(folder / "cpu.cfs_period_us")
        if len(words) == 2 and words[0].isdecimal() and words[1].isdecimal():
            quota, period = int(words[0]), int(words[1])
        if quota is not None and quota > 0 and period:
            quotas.append(quota / period)
    return min(quotas, default=None)


def _folders(root: Path, controller: str) -> Iterator[Path]:
    """Yield our group's folder for the controller and those above it, innermost first."""
    for line in _read(root / "proc/self/cgroup").splitlines():
        number, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if number == "0":
            mount = root / "sys/fs/cgroup"
        elif controller in controllers.split(","):
            mount = root / "sys/fs/cgroup" / controller
        else:
            continue
        group = mount / path.lstrip("/")
        # Inside a container the path may be the host's, which is not mounted here: then only the mount's root is ours.
        while group != mount and mount in group.parents:
            yield group
            group = group.parent
        yield mount


def _droppable(folder: Path) -> int:
    statistics = dict(line.split(maxsplit=1) for line in _read(folder / "memory.stat").splitlines() if " " in line)
    value = statistics.get("inactive_file", statistics.get("total_inactive_file", "0"))
    return int(value) if value.isdecimal() else 0


def _number(path: Path) -> int | None:
    text = _read(path).strip()
    return int(text) if text.isdecimal() else None


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="ascii", errors="replace")
    except OSError:
        return ""  # not this version of cgroups, or not ours to read: then it sets no limit that we could know of
