"""The hardware class of a box: what a release says it is for, and of what each kind a rollout tries some first.

Pure: what the system says of itself in, a slug out. Coarse and stable: two boxes of one class run the same native code
on the same kind of memory, and a box does not change its class by itself.

    jetson-orin-nano      a Jetson, by its device tree
    x86-64-avx512-vnni    the best of the vector instructions that inference gains from
    arm64-dotprod-cuda    with an NVIDIA GPU besides
"""

from __future__ import annotations

import re
from collections.abc import Collection

_ARCHITECTURES = {"x86_64": "x86-64", "amd64": "x86-64", "aarch64": "arm64", "arm64": "arm64"}
_BEST_FIRST = {
    "x86-64": {
        "AMX": "amx",
        "AVX-512-VNNI": "avx512-vnni",
        "AVX-512": "avx512",
        "AVX-VNNI": "avx-vnni",
        "AVX2": "avx2",
        "AVX": "avx",
    },
    "arm64": {"SVE": "sve", "i8mm": "i8mm", "dotprod": "dotprod", "NEON": "neon"},
}
_JETSON_NOISE = re.compile(r"\b(nvidia|developer kit|engineering reference|super|module|\d+ ?gb)\b")


def hardware_class(machine: str, features: Collection[str], board: str, gpus: Collection[str]) -> str:
    """Return the class.

    Args:
        machine: As `uname -m` says, for example `x86_64`.
        features: Of the CPU, as `observe.resources.cpu_features` names them.
        board: Model in the device tree, or "" where there is none.
        gpus: Names of the NVIDIA GPUs.
    """
    if "jetson" in board.lower():
        return _slug(_JETSON_NOISE.sub(" ", board.lower()))
    architecture = _ARCHITECTURES.get(machine.lower(), _slug(machine) or "unknown")
    best = next((slug for name, slug in _BEST_FIRST.get(architecture, {}).items() if name in features), "")
    return "-".join(part for part in (architecture, best, "cuda" if gpus else "") if part)


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")[:60]
