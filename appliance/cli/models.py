"""`appliance models`: find, download, import, check, tune, quantize and remove models, and choose their versions."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import msgspec

from appliance.cli.model_documents import document, entry_document, finding_document, megabytes, print_fields
from appliance.cli.model_versions import activate, list_wishes, rollback, withdraw
from appliance.cli.options import Context, verb_options
from appliance.cli.quantize import quantize
from appliance.cli.server import open_client, server_options
from appliance.cli.tables import print_table
from appliance.core.errors import InvalidRequestError, NotFoundError, StorageError

if TYPE_CHECKING:
    from appliance.registry.install import Installed
    from appliance.registry.known import RegisteredModel
    from appliance.registry.versions import Registry


@click.group(epilog="Start with: appliance models pull smollm2-135m-instruct")
def command() -> None:
    """Find, download, import, check, tune, quantize and remove models."""


for verb in (quantize, activate, rollback, withdraw, list_wishes):
    command.add_command(verb)


@command.command(epilog="Example: appliance models catalog --json")
@verb_options
def catalog(context: Context) -> None:
    """List the models that can be pulled, built in or from the folder `catalog_dir`."""
    from appliance.registry.catalog import open_catalog

    entries = open_catalog(context.settings).entries
    installed = {each.full_name for each in _models(context)}
    if context.json:
        context.print_json([entry_document(each, each.manifest.full_name in installed) for each in entries])
        return
    print_table(
        ["Model", "Size", "Memory", "Licence", "Here", "Description"],
        [
            [
                each.manifest.full_name,
                megabytes(each.manifest.size),
                megabytes(each.manifest.minimum_memory),
                each.manifest.licence,
                "yes" if each.manifest.full_name in installed else "",
                each.manifest.description,
            ]
            for each in entries
        ],
    )


@command.command(
    epilog="Examples: `appliance models pull smollm2-135m-instruct`; without a network from a memory stick: "
    "`appliance models pull smollm2-135m-instruct --from /media/usb`."
)
@click.argument("name")
@click.option("--from", "only_source", metavar="WHERE", help="An https address, a file or a folder to take it from.")
@verb_options
def pull(context: Context, *, name: str, only_source: str | None) -> None:
    """Download the catalog's model NAME; repeat the command to go on after an interruption."""
    from appliance.cli.progress import ProgressReport
    from appliance.registry.catalog import open_catalog
    from appliance.registry.install import pull as pull_model

    entry = open_catalog(context.settings).find(name)
    with _registry(context) as registry, ProgressReport(silent=context.json) as progress:
        installed = pull_model(
            entry,
            registry,
            stall_timeout_s=context.settings.download_timeout_s,
            only_source=only_source,
            progress=progress,
        )
    _print_installed(context, installed)


@command.command(
    "import",
    epilog="Examples: `appliance models import ~/Qwen3-4B-Q4_K_M.gguf --name qwen3-4b --licence Apache-2.0`; a LoRA "
    "adapter: `appliance models import ~/legal-lora.gguf --name legal --base qwen3-4b`; an encoder in ONNX with its "
    "tokenizer: `appliance models import ~/bge-small-en-v1.5 --file onnx/model.onnx --licence MIT`.",
)
@click.argument("path", type=click.Path(path_type=Path))
@click.option("--name", help="What to call it; made from the file's name if not given.")
@click.option("--version", help="Its version; a number is counted up if not given.")
@click.option("--licence", "--license", help="SPDX licence expression; what the file says if not given.")
@click.option("--base", help="The model here that the file is a LoRA adapter of, with or without its version.")
@click.option("--file", help="The ONNX file in the folder PATH, where there are several.")
@click.option(
    "--task",
    type=click.Choice(["embedding", "rerank", "classification", "tensor"]),
    help="What an ONNX model is for; what its files say if not given.",
)
@verb_options
def import_file(
    context: Context,
    *,
    path: Path,
    name: str | None,
    version: str | None,
    licence: str | None,
    base: str | None,
    file: str | None,
    task: str | None,
) -> None:
    """Copy the GGUF or ONNX model PATH, a file or a folder, into the registry.

    A folder with an ONNX model is taken with its tokenizer, configuration and data files.
    """
    from appliance.cli.progress import ProgressReport
    from appliance.registry.install import import_adapter, import_model
    from appliance.registry.onnx_graph import is_onnx

    if base and version:
        raise InvalidRequestError(
            "An adapter has no version of its own.",
            advice="Give another edition of it another --name, or its base's version as --base NAME:VERSION.",
            param="version",
        )
    takes_onnx = not base and is_onnx(path)
    if not takes_onnx and (file or task):
        raise InvalidRequestError(
            "--file and --task are for ONNX models, and there is none.",
            advice=f"Check what is in {path}.",
            param="file" if file else "task",
        )
    with _registry(context) as registry, ProgressReport(silent=context.json) as progress:
        if base:
            installed = import_adapter(path, registry, base=base, name=name, licence=licence, progress=progress)
        elif takes_onnx:
            from appliance.registry.install_onnx import import_onnx  # only now: onnx takes 0.2 s

            installed = import_onnx(
                path, registry, file=file, name=name, version=version, licence=licence, task=task, progress=progress
            )
        else:
            installed = import_model(path, registry, name=name, version=version, licence=licence, progress=progress)
    _print_installed(context, installed)


@command.command("list", epilog="Example: appliance models list --json")
@verb_options
def list_models(context: Context) -> None:
    """List the models on this box."""
    models = _models(context)
    if context.json:
        context.print_json([document(each) for each in models])
    elif not models:
        click.echo("There is no model yet. Get one with: appliance models pull smollm2-135m-instruct")
    else:
        print_table(
            ["Model", "Task", "Architecture", "Quantisation", "Context", "Size", "Memory", "Licence"],
            [
                [
                    each.full_name,
                    "adapter" if each.adapter else each.task,
                    each.architecture,
                    each.quantisation,
                    f"{each.context_length:,}" if each.context_length else "",
                    megabytes(each.size),
                    megabytes(each.minimum_memory),
                    each.licence,
                ]
                for each in models
            ],
        )


@command.command(epilog="Example: appliance models show smollm2-135m-instruct:1")
@click.argument("name")
@verb_options
def show(context: Context, *, name: str) -> None:
    """Show all that is known of the model NAME, on this box or in the catalog."""
    from appliance.registry.catalog import open_catalog

    try:
        found = document(_resolve(context, name))
    except NotFoundError as not_here:
        try:
            found = entry_document(open_catalog(context.settings).find(name), installed=False)
        except NotFoundError:
            raise not_here from None
    if context.json:
        context.print_json(found)
    else:
        print_fields(found)


@command.command(epilog="Example: appliance models verify && echo all sound")
@click.argument("name", required=False)
@verb_options
def verify(context: Context, *, name: str | None) -> None:
    """Read the files of the model NAME, or of all, from the disk again and compare their hashes."""
    from appliance.cli.progress import ProgressReport
    from appliance.registry.verify import verify as verify_models

    models = _models(context)
    if name:
        models = [_resolve(context, name)]
    with ProgressReport(silent=context.json) as progress:
        findings = verify_models(models, progress)
    if context.json:
        context.print_json([finding_document(each) for each in findings])
    else:
        print_table(
            ["Model", "Role", "File", "Size", "State"],
            [
                [
                    each.model.full_name,
                    each.file.role,
                    each.file.path.name[:19],
                    megabytes(each.file.size),
                    each.problem or "sound",
                ]
                for each in findings
            ],
            {"sound": "green"},
        )
    if damaged := sorted({each.model.full_name for each in findings if each.problem}):
        raise StorageError(
            f"{len(damaged)} of {len(models)} models are damaged: {', '.join(damaged)}.",
            advice=f"Fetch each again: `appliance models remove {damaged[0]}`, then pull or import it. "
            "Look after the disk: `appliance doctor`.",
            code="damaged_model",
        )


@command.command(epilog="Example: appliance models remove smollm2-135m-instruct --yes")
@click.argument("name")
@click.option("--yes", is_flag=True, help="Do not ask.")
@verb_options
def remove(context: Context, *, name: str, yes: bool) -> None:
    """Remove the model or adapter NAME and its files, unless a process uses it."""
    from appliance.registry.layout import remove_stale_layouts

    model = _resolve(context, name)
    if not yes:
        _ask(f"Remove {model.full_name} ({megabytes(model.size)})?")
    with _registry(context) as registry:
        removed, freed = registry.remove(model.full_name)
        remove_stale_layouts(context.settings.onnx_dir, registry.list())
    if context.json:
        context.print_json({"removed": removed.full_name, "freed_bytes": freed})
    else:
        click.echo(f"Removed {removed.full_name}; {megabytes(freed)} are free again.")


@command.command(
    epilog="Example: appliance models tune smollm2-135m-instruct --threads 2. It holds until the model is unloaded; "
    "what is to hold for good belongs into the settings."
)
@click.argument("name")
@click.option("--threads", "new_threads", type=int, metavar="N", help="CPU threads; 0 is one per physical core.")
@click.option("--batch-tokens", "new_batch_tokens", type=int, metavar="N", help="Most tokens of one engine step.")
@click.option("--target-latency", type=float, metavar="SECONDS", help="Longest engine step while anyone is streaming.")
@server_options
@verb_options
def tune(
    context: Context,
    *,
    name: str,
    new_threads: int | None,
    new_batch_tokens: int | None,
    target_latency: float | None,
    **server: Any,
) -> None:
    """Show or change what a running server's loaded model NAME runs with, without a restart."""
    wanted = {
        "threads": new_threads,
        "batch_tokens": new_batch_tokens,
        "target_inter_token_latency_s": target_latency,
    }
    with open_client(context.settings, **server) as client:
        runtime = client.tune(name, {field: value for field, value in wanted.items() if value is not None})
    tuned = msgspec.structs.asdict(runtime)
    if context.json:
        context.print_json(tuned)
    else:
        print_fields(tuned)


@contextmanager
def _registry(context: Context) -> Iterator[Registry]:
    from appliance.registry.versions import open_registry
    from appliance.store.database import Database

    with closing(Database(context.settings.database_path)) as database:
        yield open_registry(context.settings, database)


def _models(context: Context) -> list[RegisteredModel]:
    """Return the models on this box; a box without a database is left without one."""
    if not context.settings.database_path.exists():
        return []
    with _registry(context) as registry:
        return registry.list()


def _resolve(context: Context, name: str) -> RegisteredModel:
    """Return the model on this box that a name means.

    Raises:
        NotFoundError: There is none.
    """
    from appliance.registry.known import find_model

    if not context.settings.database_path.exists():
        return find_model([], name)
    with _registry(context) as registry:
        return registry.resolve(name)


def _ask(question: str) -> None:
    if not sys.stdin.isatty():
        raise InvalidRequestError("Nobody is there to confirm the removal.", advice="Add --yes.", param="yes")
    click.confirm(question, abort=True, err=True)


def _print_installed(context: Context, installed: Installed) -> None:
    model = installed.model
    if context.json:
        context.print_json(document(model) | {"was_present": installed.was_present})
    elif installed.was_present:
        click.echo(f"{model.full_name} is here already; nothing to do.")
    else:
        click.secho(f"{model.full_name} is ready: ", fg="green", nl=False)
        if model.adapter:
            click.echo(
                f"an adapter of {model.base_name}, {model.quantisation}, rank {model.rank}, {megabytes(model.size)}, "
                f"licence {model.licence}."
            )
            return
        what = [f"{model.architecture} {model.quantisation}".rstrip()]
        if model.kind == "onnx":
            what.append(f"for the task {model.task}")
        if model.context_length:
            what.append(f"{model.context_length:,} tokens of context")
        click.echo(f"{', '.join(what)}, {megabytes(model.size)}, licence {model.licence}.")
