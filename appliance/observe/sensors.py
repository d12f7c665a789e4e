"""Temperatures, power rails and GPU load as the kernel's sysfs tells them, on a Jetson above all.

Kernel interfaces: Documentation/driver-api/thermal/sysfs-api.rst, Documentation/hwmon/sysfs-interface.rst. A file that
is not there, cannot be read at the moment (a sleeping sensor answers EAGAIN) or holds no number is left out. `root` is
for tests: a folder that holds another machine's `sys`.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

_MOST = 64
"""Of each kind; a board has about ten."""


def temperatures(root: Path = Path("/")) -> dict[str, float]:
    """Return degrees Celsius by thermal zone, such as `cpu-thermal`."""
    found: dict[str, float] = {}
    for zone in _some(root, "sys/class/thermal/thermal_zone*"):
        millidegrees = _number(zone / "temp")
        if millidegrees is not None and -100_000 < millidegrees < 300_000:  # an absent sensor tells an absurd number
            _add(found, _text(zone / "type") or zone.name, millidegrees / 1000)
    return found


def power_rails(root: Path = Path("/")) -> dict[str, float]:
    """Return watts by power rail, such as `VDD_IN`, from the INA3221 and INA238 monitors of a Jetson's board."""
    found: dict[str, float] = {}
    for monitor in _some(root, "sys/class/hwmon/hwmon*"):
        if not _text(monitor / "name").startswith("ina"):
            continue
        for label in sorted(monitor.glob("in*_label"))[:_MOST]:
            channel = label.name.removeprefix("in").removesuffix("_label")
            millivolts, milliamperes = (
                _number(monitor / f"in{channel}_input"),
                _number(monitor / f"curr{channel}_input"),
            )
            if millivolts is not None and milliamperes is not None:
                _add(found, _text(label), millivolts * milliamperes / 1e6)
    return found


def gpu_load(root: Path = Path("/")) -> float | None:
    """Return the load of a Jetson's GPU, 0 to 1, or None where there is none."""
    for place in ("sys/devices/platform/gpu.0/load", "sys/devices/gpu.0/load"):
        load = _number(root / place)
        if load is not None:
            return min(1.0, max(0.0, load / 1000))
    return None


def _some(root: Path, pattern: str) -> Iterator[Path]:
    yield from sorted(root.glob(pattern))[:_MOST]


def _add(found: dict[str, float], name: str, value: float) -> None:
    """Add a value; of two of one name, the second gets a number."""
    name = "".join(each for each in name if each.isprintable())[:40] or "unnamed"
    number = 2
    unique = name
    while unique in found:
        unique = f"{name} {number}"
        number += 1
    found[unique] = value


def _number(path: Path) -> int | None:
    try:
        return int(_text(path))
    except ValueError:
        return None


def _text(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return file.read(200).decode("utf-8", "replace").strip("\0 \n")
    except OSError:
        return ""
