"""What the doctor thinks of the machine: pure judgements, figures in and a finding out."""

from __future__ import annotations

from collections.abc import Sequence

from appliance.cli.doctor.findings import Finding, Status, size
from appliance.observe.resources import Disk, Gpu, Memory

LEAST_MEMORY = 512 * 1024**2
"""What Linux and the smallest model need together."""

LEAST_DISK = 200 * 1000**2
"""Free beside the models for databases and logs."""

AMPLE_DISK = 1000**3
"""Free beside the models for an upgrade too."""

_FAST = {
    "x86_64": frozenset({"AVX2", "FMA", "F16C"}),
    "aarch64": frozenset({"NEON", "dotprod"}),
}
"""Without these a CPU still serves, but several times slower."""

_WORTH_COMPILING_FOR = frozenset({"AVX", "AVX2", "FMA", "F16C", "AVX-512", "NEON", "dotprod", "i8mm"})


def judge_cpu(name: str, machine: str, features: frozenset[str], cores: int) -> Finding:
    """Judge the CPU: its kernel architecture (`uname -m`), features and usable physical cores."""
    found = f"{name}, {cores} usable physical core{'s' if cores != 1 else ''}, {', '.join(sorted(features)) or 'plain'}"
    if machine not in _FAST:
        return Finding("cpu", Status.WARNING, f"{found} ({machine}).", "Only x86_64 and aarch64 are tested.")
    if missing := _FAST[machine] - features:
        return Finding(
            "cpu",
            Status.WARNING,
            f"{found}; it lacks {', '.join(sorted(missing))}.",
            "It will serve, but slowly. In a virtual machine, pass the host's CPU through.",
        )
    return Finding("cpu", Status.OK, f"{found}.")


def judge_llama(version: str, compiled: frozenset[str], features: frozenset[str], machine: str) -> Finding:
    """Judge whether llama.cpp was compiled for this CPU: features it uses against features there are."""
    found = f"llama-cpp-python {version}, compiled for {', '.join(sorted(compiled)) or f'any {machine}'}"
    rebuild = "Compile it here: install again with firmware_scripts/quickstart or firmware_scripts/install."
    if alien := compiled - features:
        return Finding(
            "llama.cpp",
            Status.FAILURE,
            f"{found}; this CPU has no {', '.join(sorted(alien))} and would stop with an illegal instruction.",
            rebuild,
        )
    if unused := (features & _WORTH_COMPILING_FOR) - compiled:
        return Finding(
            "llama.cpp", Status.WARNING, f"{found}; it does not use {', '.join(sorted(unused))} of this CPU.", rebuild
        )
    return Finding("llama.cpp", Status.OK, f"{found}.")


def judge_gpu(gpus: Sequence[Gpu], llama_uses_gpu: bool | None, gpu_layers: int) -> Finding:
    """Judge whether a GPU that is there is used; `llama_uses_gpu` is None when llama.cpp could not be asked."""
    if not gpus:
        return Finding("gpu", Status.OK, "none with a driver; models run on the CPU.")
    found = ", ".join(f"{each.name}{f' with {size(each.memory)}' if each.memory else ''}" for each in gpus)
    if llama_uses_gpu is False:
        return Finding(
            "gpu",
            Status.WARNING,
            f"{found}, but llama.cpp was compiled without GPU support; models run on the CPU.",
            "Install the CUDA toolkit, then compile again: firmware_scripts/install --accelerator cuda.",
        )
    if gpu_layers == 0:
        return Finding(
            "gpu", Status.WARNING, f"{found}, but gpu_layers is 0; models run on the CPU.", "Set gpu_layers to -1."
        )
    return Finding("gpu", Status.OK, f"{found}.")


def judge_memory(memory: Memory) -> Finding:
    """Judge main memory as such; whether the model fits is `judge_model`'s."""
    found = f"{size(memory.available)} free of {size(memory.total)}."
    if memory.total < LEAST_MEMORY:
        return Finding(
            "memory",
            Status.FAILURE,
            found,
            f"At least {size(LEAST_MEMORY)} are needed; raise the limit of the container or unit, or use a bigger box.",
        )
    if memory.available < LEAST_MEMORY // 2:
        return Finding("memory", Status.WARNING, found, "Stop other programs: `ps aux --sort=-rss | head` shows which.")
    return Finding("memory", Status.OK, found)


def judge_model(name: str, needed: int, memory: Memory, *, cells: int, is_here: bool) -> Finding:
    """Judge whether a model fits.

    Args:
        name: `name:version`.
        needed: Bytes for its weights, its KV cells and the program.
        memory: What this process may use.
        cells: KV cells that `needed` counts with.
        is_here: Whether it is registered already.
    """
    found = f"{name} with {cells:,} context cells needs {size(needed)}; {size(memory.available)} are free"
    if needed > memory.total:
        return Finding(
            "model",
            Status.FAILURE,
            f"{found} of {size(memory.total)} in all.",
            "Set model to a smaller one (`appliance models catalog`), or lower context_cells.",
        )
    if not is_here:
        return Finding(
            "model",
            Status.WARNING,
            f"{found}; it is not on this box yet.",
            f"Fetch it: appliance models pull {name.partition(':')[0]}",
        )
    if needed > memory.available:
        return Finding(
            "model",
            Status.WARNING,
            f"{found}. If it is loaded just now, that is why.",
            "Otherwise stop other programs, or set model to a smaller one.",
        )
    return Finding("model", Status.OK, f"{found}.")


def judge_disk(disk: Disk, still_to_fetch: int) -> Finding:
    """Judge the data folder's file system, given the bytes of a model that is still to be fetched."""
    found = f"{size(disk.free)} free of {size(disk.total)}"
    if still_to_fetch:
        found += f", of which the model will take {size(still_to_fetch)}"
    left = disk.free - still_to_fetch
    if left < LEAST_DISK:
        return Finding("disk", Status.FAILURE, f"{found}.", "Free some space, or name another data folder with --data.")
    if left < AMPLE_DISK:
        return Finding(
            "disk", Status.WARNING, f"{found}.", f"Have {size(AMPLE_DISK)} beside the models for logs and upgrades."
        )
    return Finding("disk", Status.OK, f"{found}.")
