"""What a measurement says: figures, each beside its target, and what exactly was counted."""

from __future__ import annotations

import platform
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any, Literal

import msgspec

from appliance import __version__
from appliance.bench.statistics import Spread
from appliance.core.settings import Settings
from appliance.observe.resources import cpu_features, cpu_name, memory, physical_cores
from appliance.registry.known import RegisteredModel

Progress = Callable[[str], None]
"""Told what is being measured now, in a line for a person."""


@dataclass(frozen=True, slots=True)
class Effort:
    """How much is measured.

    Attributes:
        runs: Repetitions, of which the median counts.
        tokens: Each stream's answer, where throughput is measured.
        long_prompt_tokens: The prompt that arrives while others stream.
        fill_tokens: Most tokens of a prompt that fills the KV cells.
        clients: That come at once.
        answer_tokens: Each of these clients' answer.
        waves: How often they come.
    """

    runs: int = 5
    tokens: int = 128
    long_prompt_tokens: int = 3000
    fill_tokens: int = 2**31 - 1
    clients: int = 200
    answer_tokens: int = 32
    waves: int = 3


QUICK = Effort(runs=1, tokens=192, long_prompt_tokens=256, fill_tokens=64, answer_tokens=4, waves=1)
"""Whether it works at all, in seconds; the figures mean little."""


@dataclass(frozen=True, slots=True)
class Subject:
    """What is measured: a registered model, run with these settings."""

    settings: Settings
    model: RegisteredModel

    @property
    def threads(self) -> int:
        """Return the engine's threads, as the server chooses them."""
        return self.settings.threads or physical_cores()


class Figure(msgspec.Struct, frozen=True, kw_only=True):
    """One number.

    Attributes:
        bound: Whether the target is the least or the greatest value that will do.
        met: None without a target.
        spread: Of the repetitions whose median is the value.
    """

    name: str
    value: float
    unit: str
    target: float | None = None
    bound: Literal["least", "greatest"] | None = None
    met: bool | None = None
    spread: Spread | None = None


class Measurement(msgspec.Struct, frozen=True, kw_only=True):
    """One group of figures; `counted` says in words what was counted, `details` has what else was seen."""

    name: str
    counted: str
    figures: list[Figure]
    details: dict[str, Any]


class Machine(msgspec.Struct, frozen=True, kw_only=True):
    """Where it was measured; `memory` in bytes."""

    cpu: str
    cpu_features: list[str]
    cores: int
    memory: int
    system: str


class Software(msgspec.Struct, frozen=True, kw_only=True):
    """What was measured; `llama_cpp` is the version of llama-cpp-python, which pins llama.cpp."""

    appliance: str
    llama_cpp: str
    python: str
    model: str
    quantisation: str
    context_cells: int
    max_sequences: int
    threads: int


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """Everything of one call."""

    machine: Machine
    software: Software
    quick: bool
    measurements: list[Measurement]

    @property
    def figures(self) -> list[Figure]:
        """Return the figures of all measurements."""
        return [figure for measurement in self.measurements for figure in measurement.figures]


def at_least(name: str, value: float, unit: str, target: float, spread: Spread | None = None) -> Figure:
    """Return a figure that must not be below its target."""
    met = value >= target
    return Figure(name=name, value=value, unit=unit, target=target, bound="least", met=met, spread=spread)


def at_most(name: str, value: float, unit: str, target: float, spread: Spread | None = None) -> Figure:
    """Return a figure that must not be above its target."""
    met = value <= target
    return Figure(name=name, value=value, unit=unit, target=target, bound="greatest", met=met, spread=spread)


def this_machine() -> Machine:
    """Return where this runs."""
    return Machine(
        cpu=cpu_name(),
        cpu_features=sorted(cpu_features()),
        cores=physical_cores(),
        memory=memory().total,
        system=platform.platform(),
    )


def software(subject: Subject) -> Software:
    """Return what is measured."""
    settings, model = subject.settings, subject.model
    return Software(
        appliance=__version__,
        llama_cpp=version("llama-cpp-python"),
        python=platform.python_version(),
        model=model.full_name,
        quantisation=model.quantisation,
        context_cells=settings.context_cells,
        max_sequences=settings.max_sequences,
        threads=subject.threads,
    )


def report(subject: Subject, measurements: Sequence[Measurement], *, quick: bool) -> Report:
    """Return the measurements with where and on what they were taken."""
    return Report(machine=this_machine(), software=software(subject), quick=quick, measurements=list(measurements))
