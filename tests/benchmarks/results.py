"""What was measured: ratios of ours to the baseline, as tables for people and as JSON."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import msgspec

from appliance.bench.report import Figure, Machine, Software, at_least, at_most
from appliance.bench.statistics import Spread, spread
from appliance.cli.tables import print_table
from tests.benchmarks.peers import OURS
from tests.benchmarks.workload import Quantity, Sample, WorkloadOf


class Comparison(msgspec.Struct, frozen=True, kw_only=True):
    """One quantity of all servers.

    Attributes:
        values: By server, over the runs; those for which it was not measured are not there.
        ratio: Ours divided by the baseline's, or what else is compared: the median over the runs. None without one
            of them, or without a target and a baseline of its own.
        baseline: With whose value ours is compared.
    """

    name: str
    unit: str
    values: dict[str, Spread]
    ratio: Figure | None
    baseline: str = ""
    compared: Literal["ratio", "difference", "value"] = "ratio"


class Result(msgspec.Struct, frozen=True, kw_only=True):
    """One workload.

    Attributes:
        counted: What exactly was counted, in words.
        skipped: Why it was not measured, or empty.
        rows: Further figures, as a table with headings.
        details: By server, one a run.
    """

    name: str
    counted: str
    baseline: str = ""
    skipped: str = ""
    comparisons: list[Comparison] = []
    headings: list[str] = []
    rows: list[list[str]] = []
    details: dict[str, list[Any]] = {}


class Results(msgspec.Struct, frozen=True, kw_only=True):
    """Everything of one call; `peers` says how each server was run."""

    machine: Machine
    software: Software
    peers: dict[str, str]
    runs: int
    quick: bool
    workloads: list[Result]


def compare(workload: WorkloadOf[Any, Any], samples: Mapping[str, Sequence[Sample]]) -> Result:
    """Return a workload's result.

    Args:
        workload: What was measured.
        samples: By server, one a run; all of one length.
    """
    comparisons = [
        _comparison(quantity, workload.baseline, samples)
        for quantity in workload.quantities
        if any(quantity.measured in sample.values for each in samples.values() for sample in each)
    ]
    details = {name: [sample.details for sample in each] for name, each in samples.items()}
    return Result(
        name=workload.name,
        counted=workload.counted,
        baseline=workload.baseline,
        comparisons=comparisons,
        details=details,
    )


def _comparison(quantity: Quantity, baseline: str, samples: Mapping[str, Sequence[Sample]]) -> Comparison:
    values = {
        name: [sample.values[quantity.measured] for sample in each]
        for name, each in samples.items()
        if all(quantity.measured in sample.values for sample in each)
    }
    baseline = quantity.baseline or baseline
    compared = _compared(quantity, values.get(OURS, []), values.get(baseline, []))
    return Comparison(
        name=quantity.name,
        unit=quantity.unit,
        values={name: spread(each) for name, each in values.items()},
        ratio=_figure(quantity, compared) if compared else None,
        baseline=baseline,
        compared=quantity.compared,
    )


def _compared(quantity: Quantity, ours: Sequence[float], others: Sequence[float]) -> list[float]:
    """Return what the target bounds, one a run."""
    if quantity.compared == "value":
        return list(ours)
    # In each run both had the same texts and came one after the other, so what slows the machine slows both.
    pairs = list(zip(ours, others, strict=True)) if ours and others else []
    return [own - other if quantity.compared == "difference" else own / other for own, other in pairs]


def _figure(quantity: Quantity, compared: Sequence[float]) -> Figure | None:
    all_runs = spread(compared)
    if quantity.target is None:
        name, value = quantity.name, all_runs.median
        return Figure(name=name, value=value, unit="", spread=all_runs) if quantity.baseline else None
    bounded = at_least if quantity.bound == "least" else at_most
    return bounded(quantity.name, all_runs.median, "", quantity.target, all_runs)


def table_of(result: Result) -> tuple[list[str], list[list[str]]]:
    """Return headings and rows of a workload's table for people."""
    if result.rows:
        return result.headings, result.rows
    names = list(dict.fromkeys(name for each in result.comparisons for name in each.values))
    alike = all((each.baseline, each.compared) == (result.baseline, "ratio") for each in result.comparisons)
    headings = ["", "Unit", *names, f"Ratio to {result.baseline}" if alike else "Compared", "Target", "Verdict"]
    rows = [_row(each, names, say_what=not alike) for each in result.comparisons]
    if not result.baseline and alike:  # nothing is compared
        return headings[:-3], [row[:-3] for row in rows]
    return headings, rows


def _row(comparison: Comparison, names: Sequence[str], *, say_what: bool) -> list[str]:
    values = [number(comparison.values[name].median) if name in comparison.values else "" for name in names]
    ratio = comparison.ratio
    if ratio is None or ratio.spread is None:
        return [comparison.name, comparison.unit, *values, "", "", ""]
    shown = number(ratio.value)
    if ratio.spread.count > 1:
        shown += f" ({number(ratio.spread.least)} to {number(ratio.spread.greatest)})"
    if say_what:
        shown += {
            "ratio": f", ratio to {comparison.baseline}",
            "difference": f" more than {comparison.baseline}",
            "value": "",
        }[comparison.compared]
    if ratio.target is None:
        return [comparison.name, comparison.unit, *values, shown, "", ""]
    target = f"{'≥' if ratio.bound == 'least' else '≤'} {ratio.target:g}"
    return [comparison.name, comparison.unit, *values, shown, target, "met" if ratio.met else "missed"]


def number(value: float) -> str:
    """Return a value with three digits that matter."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def print_results(results: Results) -> None:
    """Write everything for people to standard output."""
    machine, software = results.machine, results.software
    print(
        f"{software.model} ({software.quantisation}), {software.context_cells:,} KV cells, "
        f"{software.max_sequences} sequences, {software.threads} threads on {machine.cores} cores of {machine.cpu}; "
        f"llama.cpp of llama-cpp-python {software.llama_cpp}; median of {results.runs}."
    )
    if results.quick:
        print("Quick: the figures mean nothing.")
    print_workloads(results.peers, results.workloads)


def print_workloads(peers: Mapping[str, str], workloads: Sequence[Result]) -> None:
    """Write how each was run, and a table for each workload."""
    for name, about in peers.items():
        print(f"  {name}: {about}.")
    for result in workloads:
        print(f"\n{result.name}: {result.skipped or result.counted}")
        if not result.skipped:
            print_table(*table_of(result), {"met": "green", "missed": "red"})
