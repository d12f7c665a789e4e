"""`appliance models quantize`: a model with weights of 8 bits, and what that costs and gains."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import closing, contextmanager
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from appliance.cli.options import Context, verb_options
from appliance.cli.tables import print_table
from appliance.core.errors import ConflictError, InvalidRequestError, ModelFileError

if TYPE_CHECKING:
    from appliance.engine.onnx.comparison import Comparison
    from appliance.engine.onnx.quantize import Quantisation
    from appliance.registry.install import Installed
    from appliance.registry.known import RegisteredModel
    from appliance.registry.versions import Registry

GRAPH_NAME = "model.onnx"
INT8 = "int8"


@click.command(
    epilog="Examples: `appliance models quantize all-minilm-l6-v2`; of pictures, with a folder of .npz files of its "
    "inputs: `appliance models quantize pp-ocrv6-det-small --static --samples pictures`; to a file: `appliance "
    "models quantize my-encoder --samples sentences.txt --output int8.onnx`.",
)
@click.argument("name")
@click.option("--static", "is_static", is_flag=True, help="Fix the ranges of activations by samples: for convolutions.")
@click.option(
    "--samples",
    "samples_path",
    metavar="PATH",
    type=click.Path(path_type=Path),
    help="Folder of .npz files of inputs, or a .txt or .jsonl file of sentences: to calibrate and measure with.",
)
@click.option(
    "--calibration",
    type=click.Choice(["percentile", "minmax", "entropy"]),
    default="percentile",
    show_default=True,
    help="How --static makes ranges of what it sees.",
)
@click.option("--per-channel/--per-tensor", default=True, show_default=True, help="Scales of weights.")
@click.option(
    "--reduce-range/--full-range",
    default=None,
    help="7 or 8 bits of weights; 7 by default where the CPU lacks int8 dot products (VNNI).",
)
@click.option("--symmetric", is_flag=True, help="Ranges around 0, as TensorRT wants them; with --static.")
@click.option("--name", "new_name", help="What to call the result; NAME-int8 if not given.")
@click.option("--version", help="Its version; a number is counted up if not given.")
@click.option("--output", metavar="FILE", type=click.Path(path_type=Path), help="Write a file instead of registering.")
@verb_options
def quantize(
    context: Context, *, name: str, samples_path: Path | None, output: Path | None, is_static: bool, **options: Any
) -> None:
    """Make an int8 model of the ONNX model NAME, and compare the two."""
    from appliance.engine.onnx.comparison import GOOD_COSINE

    _check_options(output, samples_path, is_static=is_static, **options)
    wanted = _wanted(is_static=is_static, **options)
    with _registry(context) as registry:
        original = registry.resolve(name)
        _check_onnx(original)
        with registry.hold(original):
            installed, files, comparison = _made(
                context,
                registry,
                original,
                wanted,
                samples_path=samples_path,
                output=output,
                new_name=options["new_name"],
                version=options["version"],
            )
    if context.json:
        context.print_json(_document(original, wanted, installed, files, comparison))
        return
    _print(original, wanted, comparison, GOOD_COSINE)
    if installed is None:
        click.secho(f"{files[0]} is ready.", fg="green")
    elif installed.was_present:
        click.echo(f"{installed.model.full_name} is here already; nothing to do.")
    else:
        click.secho(f"{installed.model.full_name} is ready.", fg="green")


def _check_options(output: Path | None, samples_path: Path | None, *, is_static: bool, **options: Any) -> None:
    from appliance.registry.naming import checked_name

    if is_static and samples_path is None:
        raise InvalidRequestError(
            "Static quantisation needs to see inputs like those of later use.",
            advice="Name a folder of .npz files of them, or a file of sentences, with --samples.",
            param="samples",
        )
    for param, text in (("name", options["new_name"]), ("version", options["version"])):
        if text:
            checked_name(param, text)
    if output is not None and (options["new_name"] or options["version"]):
        raise InvalidRequestError("A file that is not registered has neither name nor version.", param="output")
    if output is not None and output.exists():
        raise ConflictError(f"There is a file {output} already; nothing was changed.", advice="Name another one.")
    if output is not None and not output.parent.is_dir():
        raise InvalidRequestError(f"There is no folder {output.parent}.", param="output")
    if not is_static and (options["symmetric"] or options["calibration"] != "percentile"):
        raise InvalidRequestError(
            "Dynamic quantisation finds ranges anew in each run: --calibration and --symmetric do nothing then.",
            advice="Add --static and --samples, or leave them out.",
        )


def _wanted(*, is_static: bool, **options: Any) -> Quantisation:
    from appliance.engine.onnx.quantize import Quantisation, reduced_range_is_better

    reduce_range = options["reduce_range"]
    return Quantisation(
        mode="static" if is_static else "dynamic",
        calibration=options["calibration"],
        per_channel=options["per_channel"],
        reduce_range=reduced_range_is_better() if reduce_range is None else reduce_range,
        symmetric=options["symmetric"],
    )


def _check_onnx(model: RegisteredModel) -> None:
    if model.kind == "onnx":
        return
    raise ModelFileError(
        f"{model.full_name} is a GGUF {'adapter' if model.adapter else 'model'}, and only ONNX models are quantised "
        "here.",
        advice="llama.cpp's llama-quantize makes smaller GGUF files; import its result: appliance models import FILE",
    )


def _made(
    context: Context,
    registry: Registry,
    original: RegisteredModel,
    wanted: Quantisation,
    *,
    samples_path: Path | None,
    output: Path | None,
    new_name: str | None,
    version: str | None,
) -> tuple[Installed | None, list[Path], Comparison]:
    """Quantise, compare, and register or write; nothing is left half made."""
    from appliance.cli.progress import ProgressReport
    from appliance.engine.onnx.quantize import DISK_FACTOR, quantise
    from appliance.engine.onnx.side_by_side import Session, compare
    from appliance.engine.onnx.trials import trial_of
    from appliance.registry.derive import register_derived
    from appliance.registry.onnx_header import read_onnx
    from appliance.registry.work_folder import work_folder

    def say(activity: str) -> None:
        if not context.json:
            click.echo(f"{activity[0].upper()}{activity[1:]} ...", err=True)

    with work_folder(registry.blobs, original.size * DISK_FACTOR, f"quantise {original.full_name}") as folder:
        graph = _copied(original, folder / "original")
        data = frozenset(read_onnx(graph).external)
        threads = context.settings.onnx_threads or _cores()
        assert original.signature is not None, "every ONNX model has one"
        session = cache(lambda: Session(graph, threads))
        trial = trial_of(
            original.task,
            original.signature,
            graph,
            samples_path,
            can_run=lambda inputs: session().can_run(inputs),
        )
        calibration, measured = trial.parted() if wanted.mode == "static" else (trial, trial)
        target = folder / "quantised" / (output.name if output else GRAPH_NAME)
        target.parent.mkdir()
        files = quantise(graph, target, wanted, calibration.samples, say)
        originals = [graph, *(graph.parent / each for each in sorted(data))]
        comparison = compare(originals, files, measured, threads=threads, is_static=wanted.mode == "static", say=say)
        if output is not None:
            return None, _written(files, output), comparison
        with ProgressReport(silent=context.json) as progress:
            installed = register_derived(
                original,
                {"model" if each == target else each.name: each for each in files},
                registry,
                replaced=data,
                name=new_name or f"{original.name}-{INT8}",
                version=version,
                progress=progress,
            )
        return installed, [each.path for each in installed.model.files], comparison


def _copied(model: RegisteredModel, folder: Path) -> Path:
    """Copy the model's files into a folder of their own and return the graph; onnx reads no weights through links."""
    from appliance.registry.files import storage_errors

    with storage_errors(folder):
        for file in model.files:
            path = folder / (GRAPH_NAME if file.role == "model" else file.role)
            path.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file.path, path)
    return folder / GRAPH_NAME


def _written(files: tuple[Path, ...], output: Path) -> list[Path]:
    """Put the result where it is wanted, the graph last, and each whole or not at all."""
    from appliance.registry.files import storage_errors, sync_folder

    targets = [output.parent / each.name for each in files]
    for source, target in reversed(list(zip(files, targets, strict=True))):
        unfinished = target.with_name(f".{target.name}.{os.getpid()}.partial")
        with storage_errors(target):
            try:
                with source.open("rb") as content, unfinished.open("xb") as copy:
                    shutil.copyfileobj(content, copy)
                    copy.flush()
                    os.fsync(copy.fileno())
                unfinished.rename(target)
            finally:
                unfinished.unlink(missing_ok=True)
            sync_folder(target.parent.resolve())
    return targets


def _cores() -> int:
    from appliance.observe.resources import physical_cores

    return physical_cores()


@contextmanager
def _registry(context: Context) -> Iterator[Registry]:
    from appliance.registry.versions import open_registry
    from appliance.store.database import Database

    with closing(Database(context.settings.database_path)) as database:
        yield open_registry(context.settings, database)


def _document(
    original: RegisteredModel,
    wanted: Quantisation,
    installed: Installed | None,
    files: list[Path],
    comparison: Comparison,
) -> dict[str, Any]:
    return {
        "original": original.full_name,
        "model": installed.model.full_name if installed else None,
        "was_present": installed.was_present if installed else False,
        "files": files,
        "quantisation": wanted,
        "comparison": comparison,
    }


def _print(original: RegisteredModel, wanted: Quantisation, comparison: Comparison, good: float) -> None:
    before, after = comparison.original, comparison.quantised
    click.echo(
        f"{original.full_name}, {wanted.mode} int8{' of 7 bits' if wanted.reduce_range else ''}, on {comparison.data}: "
        f"{_span(comparison.rows, 'row')} a run"
        + (f", {_span(comparison.length, 'token')} a row" if comparison.length else "")
        + "."
    )
    rows = [
        ["Size", _size(before.bytes), _size(after.bytes), f"{after.bytes / before.bytes:.2f}"],
        [
            f"Time of a run, median of {comparison.runs}",
            f"{before.median_s * 1e3:,.2f} ms",
            f"{after.median_s * 1e3:,.2f} ms",
            f"{after.median_s / before.median_s:.2f}",
        ],
    ]
    print_table(["", "Original", "int8", "Ratio"], rows)
    click.echo()
    print_table(
        ["Output", "Cosine, mean", "Cosine, worst row", "Largest difference", "Mean difference"],
        [
            [
                each.name,
                _number(each.cosine_mean),
                _number(each.cosine_worst),
                f"{each.largest:.3g}",
                f"{each.mean:.3g}",
            ]
            for each in comparison.outputs
        ],
    )
    if comparison.is_made_up:
        click.echo(
            "\nThese figures are of made-up data: name data like that of later use with --samples to know better."
        )
    for advice in comparison.advice:
        click.secho(f"\n{advice}", fg="yellow")
    if not comparison.advice:
        click.echo(f"\nSmaller, no slower, and cosines of {good} or more.")


def _span(span: tuple[int, int], unit: str) -> str:
    least, most = span
    return f"{least:,} {unit}{'' if least == 1 else 's'}" if least == most else f"{least:,} to {most:,} {unit}s"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"


def _size(count: int) -> str:
    return f"{count / 1e6:,.1f} MB"
