"""`appliance docs`: add, list, search, remove and check documents on a running server."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from appliance.cli.options import Context, verb_options
from appliance.cli.server import open_client, server_options
from appliance.cli.tables import print_table
from appliance.core.errors import ApplianceError, ConflictError, NotFoundError

if TYPE_CHECKING:
    from appliance.cli.docs_client import DocsClient
    from appliance.cli.docs_files import Candidate
    from appliance.cli.docs_wire import Passage, Store, StoreFile
    from appliance.cli.progress import ProgressReport

LOOK_EVERY_S = 0.2

store_option = click.option(
    "--store", "store_name", default="documents", show_default=True, help="Name or id of the vector store."
)


@click.group(
    epilog="Start with: `appliance docs add ~/manuals`, then: `appliance docs search 'How is the filter changed?'`."
)
def command() -> None:
    """Add, list, search, remove and check documents on a running server."""


@command.command(
    epilog="Examples: `appliance docs add manual.pdf`, `appliance docs add ~/manuals --store manuals`, "
    "`appliance docs add notes.md --no-wait`."
)
@click.argument("paths", metavar="PATH...", nargs=-1, required=True, type=click.Path(exists=True, path_type=Path))
@store_option
@click.option("--no-wait", is_flag=True, help="Return when all is sent; the server takes it in by itself.")
@server_options
@verb_options
def add(
    context: Context,
    *,
    paths: tuple[Path, ...],
    store_name: str,
    no_wait: bool,
    url: str | None,
    api_key: str,
    ca: Path | None,
) -> None:
    """Add files, and all files in folders. One that is there already is sent again only if it has changed."""
    from appliance.cli.docs_files import candidates
    from appliance.cli.progress import ProgressReport

    wanted = candidates(paths)
    with _docs(context, url, api_key, ca) as docs:
        try:
            store = docs.find_store(store_name)
        except NotFoundError:
            store = docs.make_store(store_name)
        with ProgressReport(silent=context.json) as progress:
            sent, unchanged = _send(docs, store, wanted, progress)
        with ProgressReport(silent=context.json, unit="passages") as progress:
            files = _taken_in(docs, store, sent, progress) if not no_wait else []
    failed = [each for each in files if each.status == "failed"]
    if context.json:
        document = {
            "store": store.id,
            "sent": len(sent),
            "unchanged": unchanged,
            "failed": [_document(e) for e in failed],
        }
        context.print_json(document)
    else:
        click.echo(f"{len(sent)} sent to {store.name or store.id}, {unchanged} unchanged.")
        for each in failed:
            reason = each.last_error.message if each.last_error else "no reason given"
            click.secho(f"{_name(each)}: {reason}", fg="red", err=True)
    if failed:
        raise ApplianceError(f"{len(failed)} of {len(sent)} files could not be taken in.", code="documents_failed")


def _send(
    docs: DocsClient, store: Store, wanted: Sequence[Candidate], progress: ProgressReport
) -> tuple[set[str], int]:
    """Send what is new or has changed, and erase what it replaces; return the new ids, and how many were there."""
    known = {str((each.attributes or {}).get("path", "")): each for each in docs.files(store)}
    total = sum(each.path.stat().st_size for each in wanted)
    sent: set[str] = set()
    done = unchanged = 0

    def count(size: int) -> None:
        nonlocal done
        done += size
        progress("sending", done, total)

    for each in wanted:
        digest, old = each.sha256(), known.get(each.name)
        if old is not None and old.status != "failed" and (old.attributes or {}).get("sha256") == digest:
            unchanged += 1
            count(each.path.stat().st_size)
            continue
        uploaded = docs.upload(each.path, count)
        docs.take_in(store, uploaded.id, {"path": each.name, "sha256": digest})
        sent.add(uploaded.id)
        if old is not None:
            docs.erase(old.id)
    return sent, unchanged


def _taken_in(docs: DocsClient, store: Store, sent: set[str], progress: ProgressReport) -> list[StoreFile]:
    """Wait until the server has taken in what was sent, and return it."""
    while True:
        files = [each for each in docs.files(store) if each.id in sent]
        waiting = [each for each in files if each.status == "in_progress"]
        size = sum(max(each.chunks, 1) for each in files)
        progress("taking in", sum(_done(each) for each in files), size)
        if not waiting:
            return files
        time.sleep(LOOK_EVERY_S)


def _done(file: StoreFile) -> int:
    return file.embedded if file.status == "in_progress" else max(file.chunks, 1)


@command.command("list", epilog="Example: `appliance docs list --store manuals --json`.")
@store_option
@server_options
@verb_options
def list_documents(context: Context, *, store_name: str, url: str | None, api_key: str, ca: Path | None) -> None:
    """List the documents of a store, and how far each is."""
    with _docs(context, url, api_key, ca) as docs:
        files = docs.files(docs.find_store(store_name))
        names = {name: each.filename for name, each in docs.uploads().items()}
    if context.json:
        context.print_json([_document(each, names) for each in files])
    elif not files:
        click.echo("There is no document yet. Add some with: appliance docs add PATH")
    else:
        print_table(
            ["Document", "Id", "State", "Passages", "With vectors", "Kilobytes"],
            [
                [
                    _name(each, names),
                    each.id,
                    each.status,
                    f"{each.chunks:,}",
                    f"{each.embedded:,}",
                    f"{each.usage_bytes / 1e3:,.1f}",
                ]
                for each in files
            ],
            {"completed": "green", "failed": "red", "in_progress": "yellow"},
        )


@command.command(
    epilog="Examples: `appliance docs search 'How is the filter changed?'`, "
    "`appliance docs search E-1042 --mode keyword --limit 3`."
)
@click.argument("text", nargs=-1, required=True)
@store_option
@click.option("--limit", type=click.IntRange(1, 50), default=5, show_default=True, help="Most passages.")
@click.option(
    "--mode",
    type=click.Choice(("hybrid", "keyword", "semantic")),
    default="hybrid",
    show_default=True,
    help="Search by word, by meaning, or both.",
)
@server_options
@verb_options
def search(
    context: Context,
    *,
    text: tuple[str, ...],
    store_name: str,
    limit: int,
    mode: str,
    url: str | None,
    api_key: str,
    ca: Path | None,
) -> None:
    """Show the passages that answer TEXT, best first, each with its file, page and heading."""
    with _docs(context, url, api_key, ca) as docs:
        found = docs.search(docs.find_store(store_name), " ".join(text), limit, mode)
    if context.json:
        context.print_json(found)
        return
    if not found.data:
        click.echo("Nothing relevant was found.")
    for number, each in enumerate(found.data, 1):
        _print_passage(number, each)


def _print_passage(number: int, passage: Passage) -> None:
    from appliance.core.printable import printable

    name = str((passage.attributes or {}).get("path", passage.filename))
    page = "" if passage.page is None else f", page {passage.page}"
    heading = " › ".join(passage.heading)
    click.secho(printable(f"{number}. {name}{page}"), bold=True, nl=False)
    click.secho(printable(f"  {heading}  {passage.score:.2f}"), dim=True)
    for part in passage.content:
        for line in part.text.splitlines():
            click.echo(f"   {printable(line)}")
    click.echo()


@command.command(
    epilog="Examples: `appliance docs remove manuals/pump.pdf`, `appliance docs remove --all --store manuals`."
)
@click.argument("names", metavar="[DOCUMENT]...", nargs=-1)
@store_option
@click.option("--all", "everything", is_flag=True, help="Erase all documents, and the store itself.")
@server_options
@verb_options
def remove(
    context: Context,
    *,
    names: tuple[str, ...],
    store_name: str,
    everything: bool,
    url: str | None,
    api_key: str,
    ca: Path | None,
) -> None:
    """Erase documents by their names or ids: no byte of their text is left on the server."""
    if bool(names) == everything:
        raise click.UsageError("Name the documents to erase, or say --all.")
    with _docs(context, url, api_key, ca) as docs:
        store = docs.find_store(store_name)
        files = docs.files(store)
        chosen = files if everything else _chosen(docs, files, names)
        for each in chosen:
            docs.erase(each.id)
        if everything:
            docs.erase_store(store)
    if context.json:
        context.print_json({"removed": [each.id for each in chosen]})
    else:
        click.echo(f"{len(chosen)} erased.")


def _chosen(docs: DocsClient, files: Sequence[StoreFile], names: Sequence[str]) -> list[StoreFile]:
    uploads = {name: each.filename for name, each in docs.uploads().items()}
    chosen: dict[str, StoreFile] = {}
    for name in names:
        fitting = [each for each in files if name in (each.id, _name(each, uploads))]
        if not fitting:
            raise NotFoundError(
                f"There is no document {name!r} in the store.", advice="`appliance docs list` has them."
            )
        chosen.update({each.id: each for each in fitting})
    return list(chosen.values())


@command.command(epilog="Example: `appliance docs rebuild --store manuals`.")
@store_option
@server_options
@verb_options
def rebuild(context: Context, *, store_name: str, url: str | None, api_key: str, ca: Path | None) -> None:
    """Make a store's indexes anew from what is stored; needs a key of the scope admin where keys are required."""
    with _docs(context, url, api_key, ca) as docs:
        store = docs.find_store(store_name)
        docs.rebuild(store)
    if context.json:
        context.print_json({"store": store.id, "rebuilt": True})
    else:
        click.echo(f"The indexes of {store.name or store.id} are new.")


@command.command(
    epilog="Examples: `appliance docs reembed --store manuals`, `appliance docs reembed --no-wait`. "
    "Who stops waiting stops nothing."
)
@store_option
@click.option("--no-wait", is_flag=True, help="Return when it is begun; the server goes on by itself.")
@server_options
@verb_options
def reembed(
    context: Context, *, store_name: str, no_wait: bool, url: str | None, api_key: str, ca: Path | None
) -> None:
    """Embed a store with the model that `embedding_model` names now; it is searched with the old vectors meanwhile."""
    from appliance.cli.progress import ProgressReport

    with _docs(context, url, api_key, ca) as docs, ProgressReport(silent=context.json, unit="passages") as progress:
        store = docs.reembed(docs.find_store(store_name))
        while not no_wait and (store.reembedding is not None or store.file_counts.in_progress):
            if (begun := store.reembedding) is not None:
                progress("embedding", begun.done, begun.total)
            time.sleep(LOOK_EVERY_S)
            store = docs.store(store.id)
    done = store.reembedding is None and not store.file_counts.in_progress
    if context.json:
        context.print_json({"store": store.id, "model": store.model, "done": done})
    elif done:
        click.echo(f"{store.name or store.id} is embedded with {store.model or 'no model'}.")
    else:
        click.echo(f"{store.name or store.id} is being embedded; until it is, the old vectors answer.")


@command.command(epilog="Example: `appliance docs verify`. What is wrong is mended by `appliance docs rebuild`.")
@store_option
@server_options
@verb_options
def verify(context: Context, *, store_name: str, url: str | None, api_key: str, ca: Path | None) -> None:
    """Check a store's indexes against what is stored; needs a key of the scope admin where keys are required."""
    with _docs(context, url, api_key, ca) as docs:
        found = docs.verify(docs.find_store(store_name))
    if context.json:
        context.print_json({"valid": found.valid, "problems": found.problems})
    else:
        for each in found.problems:
            click.echo(each)
        if found.valid:
            click.echo("The indexes are what they should be.")
    if not found.valid:
        raise ConflictError("The indexes are not what they should be.", advice="Mend them: appliance docs rebuild.")


@contextmanager
def _docs(context: Context, url: str | None, api_key: str, ca: Path | None) -> Iterator[DocsClient]:
    from appliance.cli.docs_client import DocsClient

    with open_client(context.settings, url=url, api_key=api_key, ca=ca) as client:
        yield DocsClient(client)


def _name(file: StoreFile, uploads: dict[str, str] | None = None) -> str:
    """Return what a document is called: the path that it was added with, or the name of the upload."""
    return str((file.attributes or {}).get("path") or (uploads or {}).get(file.id, file.id))


def _document(file: StoreFile, uploads: dict[str, str] | None = None) -> dict[str, Any]:
    return {
        "name": _name(file, uploads),
        "id": file.id,
        "status": file.status,
        "chunks": file.chunks,
        "embedded": file.embedded,
        "bytes": file.usage_bytes,
        "error": None if file.last_error is None else file.last_error.message,
    }
