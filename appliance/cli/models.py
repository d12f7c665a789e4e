"""`appliance models`: find, download, import, check, tune and remove models."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import msgspec

from appliance.cli.options import Context, verb_options
from appliance.cli.server import open_client, server_options
from appliance.cli.tables import print_table
from appliance.core.errors import InvalidRequestError, NotFoundError, StorageError

if TYPE_CHECKING:
    from appliance.registry.catalog import CatalogEntry
    from appliance.registry.install import Installed
    from appliance.registry.verify import Finding
    from appliance.registry.versions import RegisteredModel, Registry


@click.group(epilog="Start with: appliance models pull smollm2-135m-instruct")
def command() -> None:
    """Find, download, import, check, tune and remove models."""


@command.command(epilog="Example: appliance models catalog --json")
@verb_options
def catalog(context: Context) -> None:
    """List the models that can be pulled, built in or from the folder `catalog_dir`."""
    from appliance.registry.catalog import open_catalog

    entries = open_catalog(context.settings).entries
    installed = {each.full_name for each in _models(context)}
    if context.json:
        context.print_json([_entry_document(each, each.manifest.full_name in installed) for each in entries])
        return
    print_table(
        ["Model", "Size", "Memory", "Licence", "Here", "Description"],
        [
            [
                each.manifest.full_name,
                _size(each.manifest.size),
                _size(each.manifest.minimum_memory),
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
    "adapter: `appliance models import ~/legal-lora.gguf --name legal --base qwen3-4b`.",
)
@click.argument("path", type=click.Path(path_type=Path))
@click.option("--name", help="What to call it; made from the file's name if not given.")
@click.option("--version", help="Its version; a number is counted up if not given.")
@click.option("--licence", "--license", help="SPDX licence expression; what the file says if not given.")
@click.option("--base", help="The model here that the file is a LoRA adapter of, with or without its version.")
@verb_options
def import_file(
    context: Context, *, path: Path, name: str | None, version: str | None, licence: str | None, base: str | None
) -> None:
    """Copy the GGUF file PATH, or the one in the folder PATH, into the registry."""
    from appliance.cli.progress import ProgressReport
    from appliance.registry.install import import_adapter, import_model

    if base and version:
        raise InvalidRequestError(
            "An adapter has no version of its own.",
            advice="Give another edition of it another --name, or its base's version as --base NAME:VERSION.",
            param="version",
        )
    with _registry(context) as registry, ProgressReport(silent=context.json) as progress:
        if base:
            installed = import_adapter(path, registry, base=base, name=name, licence=licence, progress=progress)
        else:
            installed = import_model(path, registry, name=name, version=version, licence=licence, progress=progress)
    _print_installed(context, installed)


@command.command("list", epilog="Example: appliance models list --json")
@verb_options
def list_models(context: Context) -> None:
    """List the models on this box."""
    models = _models(context)
    if context.json:
        context.print_json([_document(each) for each in models])
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
                    f"{each.context_length:,}",
                    _size(each.size),
                    _size(each.minimum_memory),
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
    from appliance.registry.versions import find_model

    try:
        document = _document(find_model(_models(context), name))
    except NotFoundError as not_here:
        try:
            document = _entry_document(open_catalog(context.settings).find(name), installed=False)
        except NotFoundError:
            raise not_here from None
    if context.json:
        context.print_json(document)
    else:
        _print_fields(document)


@command.command(epilog="Example: appliance models verify && echo all sound")
@click.argument("name", required=False)
@verb_options
def verify(context: Context, *, name: str | None) -> None:
    """Read the files of the model NAME, or of all, from the disk again and compare their hashes."""
    from appliance.cli.progress import ProgressReport
    from appliance.registry.verify import verify as verify_models
    from appliance.registry.versions import find_model

    models = _models(context)
    if name:
        models = [find_model(models, name)]
    with ProgressReport(silent=context.json) as progress:
        findings = verify_models(models, progress)
    if context.json:
        context.print_json([_finding_document(each) for each in findings])
    else:
        print_table(
            ["Model", "File", "Size", "State"],
            [
                [each.model.full_name, each.file.path.name[:19], _size(each.file.size), each.problem or "sound"]
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
    from appliance.registry.versions import find_model

    model = find_model(_models(context), name)
    if not yes:
        _ask(f"Remove {model.full_name} ({_size(model.size)})?")
    with _registry(context) as registry:
        removed, freed = registry.remove(model.full_name)
    if context.json:
        context.print_json({"removed": removed.full_name, "freed_bytes": freed})
    else:
        click.echo(f"Removed {removed.full_name}; {_size(freed)} are free again.")


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
    document = msgspec.structs.asdict(runtime)
    if context.json:
        context.print_json(document)
    else:
        _print_fields(document)


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


def _ask(question: str) -> None:
    if not sys.stdin.isatty():
        raise InvalidRequestError("Nobody is there to confirm the removal.", advice="Add --yes.", param="yes")
    click.confirm(question, abort=True, err=True)


def _print_installed(context: Context, installed: Installed) -> None:
    model = installed.model
    if context.json:
        context.print_json(_document(model) | {"was_present": installed.was_present})
    elif installed.was_present:
        click.echo(f"{model.full_name} is here already; nothing to do.")
    else:
        click.secho(f"{model.full_name} is ready: ", fg="green", nl=False)
        if model.adapter:
            click.echo(
                f"an adapter of {model.base_name}, {model.quantisation}, rank {model.rank}, {_size(model.size)}, "
                f"licence {model.licence}."
            )
            return
        click.echo(
            f"{model.architecture} {model.quantisation}, {model.context_length:,} tokens of context, "
            f"{_size(model.size)}, licence {model.licence}."
        )


def _document(model: RegisteredModel) -> dict[str, Any]:
    return {
        "name": model.name,
        "version": model.version,
        "installed": True,
        "kind": model.kind,
        "adapter": model.adapter or None,
        "rank": model.rank or None,
        "task": model.task,
        "licence": model.licence,
        "created": model.created,
        "architecture": model.architecture,
        "quantisation": model.quantisation,
        "context_length": model.context_length,
        "default_context": model.default_context,
        "minimum_memory": model.minimum_memory,
        "size": model.size,
        "stop": model.stop,
        "chat_template": model.chat_template,
        "files": [
            {"role": each.role, "path": each.path, "sha256": each.sha256, "size": each.size} for each in model.files
        ],
    }


def _entry_document(entry: CatalogEntry, installed: bool) -> dict[str, Any]:
    manifest = entry.manifest
    return {
        "name": manifest.name,
        "version": manifest.version,
        "installed": installed,
        "description": manifest.description,
        "kind": manifest.kind,
        "adapter": manifest.adapter,
        "task": manifest.task,
        "licence": manifest.licence,
        "minimum_memory": manifest.minimum_memory,
        "size": manifest.size,
        "files": [
            {"role": each.role, "name": each.name, "sha256": each.sha256, "size": each.size, "sources": each.sources}
            for each in manifest.files
        ],
    }


def _finding_document(finding: Finding) -> dict[str, Any]:
    return {
        "model": finding.model.full_name,
        "path": finding.file.path,
        "sha256": finding.file.sha256,
        "sound": not finding.problem,
        "problem": finding.problem,
    }


def _size(count: int) -> str:
    return f"{count / 1e6:,.1f} MB"


def _print_fields(document: dict[str, Any]) -> None:
    rows = []
    for name, value in document.items():
        if name == "files":
            rows += [
                [f"file {each['role']}", f"{each.get('path', each.get('name'))} ({_size(each['size'])})"]
                for each in value
            ]
        elif value not in (None, "", ()):
            shown = _size(value) if name in ("size", "minimum_memory") else value
            rows.append(
                [name.replace("_", " "), ", ".join(map(repr, shown)) if isinstance(shown, tuple) else str(shown)]
            )
    print_table(["Field", "Value"], rows)
