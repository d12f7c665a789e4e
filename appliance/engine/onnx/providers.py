"""Which execution providers a session asks for, and with which options: a pure choice.

What onnxruntime makes of it may be less, when a driver or a library is missing; the session reports what it got.
Options: https://onnxruntime.ai/docs/execution-providers/
"""

from __future__ import annotations

from collections.abc import Sequence

from appliance.core.errors import SettingsError
from appliance.engine.onnx.config import SessionConfig

CPU = "CPUExecutionProvider"
CUDA = "CUDAExecutionProvider"
TENSORRT = "TensorrtExecutionProvider"

NAMES = {"tensorrt": TENSORRT, "cuda": CUDA, "cpu": CPU}
"""onnxruntime's names by those of the setting, in the order in which they are tried."""

SETTING = "execution_providers"


def choose(wish: str, available: Sequence[str]) -> tuple[str, ...]:
    """Return the providers to ask for, first choice first; the last is the CPU, which runs what the others cannot.

    Args:
        wish: The setting: `auto`, or names with commas between.
        available: What this build of onnxruntime has, in its own names.

    Raises:
        SettingsError: A name is unknown, given twice, or its provider is not there.
    """
    if wish.strip().lower() == "auto":
        return tuple(name for name in NAMES.values() if name in available or name == CPU)
    short = [each.strip().lower() for each in wish.split(",")]
    if unknown := [each for each in short if each not in NAMES]:
        raise SettingsError(
            f"{SETTING} names {unknown[0][:40]!r}; there are {', '.join(NAMES)}, or auto alone.", param=SETTING
        )
    if len(set(short)) < len(short):
        raise SettingsError(f"{SETTING} names a provider twice: {', '.join(short)}.", param=SETTING)
    chosen = [NAMES[each] for each in short]
    for each, name in zip(short, chosen, strict=True):
        if name not in available and name != CPU:
            raise SettingsError(
                f"{SETTING} asks for {each}, which the installed onnxruntime does not have.",
                advice="Install the build of onnxruntime for this device, or set it to auto.",
                param=SETTING,
            )
    return (*chosen, *((CPU,) if CPU not in chosen else ()))


def options(provider: str, config: SessionConfig) -> dict[str, str]:
    """Return the provider's options, as text, as onnxruntime takes them."""
    if provider == TENSORRT:
        return _tensorrt_options(config)
    if provider == CUDA:
        limit = {"gpu_mem_limit": str(config.gpu_memory_bytes)} if config.gpu_memory_bytes else {}
        # The default doubles the arena each time; on a device that shares its memory with the CPU that hurts others.
        return {"arena_extend_strategy": "kSameAsRequested", "cudnn_conv_algo_search": "HEURISTIC", **limit}
    return {}


def _tensorrt_options(config: SessionConfig) -> dict[str, str]:
    chosen = {
        "trt_fp16_enable": str(int(config.precision in {"fp16", "int8"})),
        "trt_int8_enable": str(int(config.precision == "int8")),
    }
    if config.gpu_memory_bytes:
        chosen["trt_max_workspace_size"] = str(config.gpu_memory_bytes)
    if config.engine_cache_dir is not None:
        folder = str(config.engine_cache_dir)
        chosen |= {
            "trt_engine_cache_enable": "1",
            "trt_engine_cache_path": folder,
            "trt_timing_cache_enable": "1",
            "trt_timing_cache_path": folder,
        }
    return chosen
