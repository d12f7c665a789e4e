"""`appliance bench`: the figures that the appliance promises, measured on this box."""

from __future__ import annotations

import asyncio
import signal
import sys
from collections.abc import Coroutine
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import click

from appliance.cli.options import Context, verb_options
from appliance.cli.tables import print_table
from appliance.core.errors import InvalidRequestError

if TYPE_CHECKING:
    from appliance.bench.report import Effort, Figure, Report, Subject

NAMES = ("throughput", "start", "responsiveness", "overload")


@click.command(
    epilog="Examples: `appliance bench`, `appliance bench throughput --runs 9`, `appliance bench --quick --json`. "
    "Stop other programs first: they take cores from the model, and the figures with them.",
)
@click.argument("what", type=click.Choice([*NAMES, "all"]), default="all")
@click.option("--runs", type=click.IntRange(1, 1000), help="Repetitions, of which the median counts; 5 by default.")
@click.option("--quick", is_flag=True, help="Try in seconds whether it works; the figures mean little.")
@click.option("--check", is_flag=True, help="Exit with 1 if a target is missed.")
@click.option("--model", help="Model to measure, as `name` or `name:version`.")
@click.option("--context-cells", type=int, help="KV cells that all sequences share, in tokens.")
@click.option("--max-sequences", type=int, help="Sequences worked on at once.")
@click.option("--threads", type=int, help="CPU threads of the model; 0 is one per physical core.")
@verb_options
def command(context: Context, *, what: str, runs: int | None, quick: bool, check: bool, **_: Any) -> None:
    """Measure throughput, start, responsiveness and overload against a server of its own, on a free port.

    A server that runs already is left alone, but should be idle.
    """
    from appliance.bench.suite import run

    names = NAMES if what == "all" else (what,)
    measuring = run(_subject(context), names, _effort(runs, quick=quick), _say, quick=quick)
    try:
        report = asyncio.run(_until_terminated(measuring))
    except asyncio.CancelledError:
        sys.exit(128 + signal.SIGTERM)
    if context.json:
        context.print_json(report)
    else:
        _print(report)
    if check and any(figure.met is False for figure in report.figures):
        sys.exit(1)


async def _until_terminated(measuring: Coroutine[Any, Any, Report]) -> Report:
    """Await the report; SIGTERM, as Ctrl-C, ends the server and the bare loop before it ends this program."""
    task = asyncio.current_task()
    assert task is not None, "this runs in a task"
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
    return await measuring


def _subject(context: Context) -> Subject:
    from appliance.bench.report import Subject
    from appliance.registry.versions import open_registry
    from appliance.store.database import Database

    settings = context.settings
    database = Database(settings.database_path)
    try:
        model = open_registry(settings, database).resolve(settings.model)
    finally:
        database.close()
    if model.adapter:
        raise InvalidRequestError(
            f"{model.full_name} is an adapter; models are measured.",
            advice=f"Measure its base: appliance bench --model {model.base_name}",
            param="model",
        )
    return Subject(settings, model)


def _effort(runs: int | None, *, quick: bool) -> Effort:
    from appliance.bench.report import QUICK, Effort

    effort = QUICK if quick else Effort()
    return effort if runs is None else replace(effort, runs=runs)


def _say(progress: str) -> None:
    click.echo(f"{progress} ...", err=True)


def _print(report: Report) -> None:
    machine, software = report.machine, report.software
    click.echo(
        f"{software.model} ({software.quantisation}), {software.context_cells:,} KV cells, "
        f"{software.threads} threads on {machine.cores} cores of {machine.cpu}; "
        f"llama-cpp-python {software.llama_cpp}."
    )
    rows = [
        (measurement.name, figure.name, _value(figure), figure.unit, _target(figure), _verdict(figure))
        for measurement in report.measurements
        for figure in measurement.figures
    ]
    headings = ("Measurement", "Figure", "Value", "Unit", "Target", "")
    print_table(headings, rows, {"met": "green", "missed": "red"})
    for measurement in report.measurements:
        click.echo(f"\n{measurement.name}: {measurement.counted}")


def _value(figure: Figure) -> str:
    text = _number(figure.value)
    if figure.spread is None or figure.spread.count == 1:
        return text
    return f"{text} ({_number(figure.spread.least)} to {_number(figure.spread.greatest)})"


def _target(figure: Figure) -> str:
    if figure.target is None:
        return ""
    return f"{'≥' if figure.bound == 'least' else '≤'} {figure.target:g}"


def _verdict(figure: Figure) -> str:
    return {True: "met", False: "missed", None: ""}[figure.met]


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 or value == int(value) else f"{value:.3g}"
