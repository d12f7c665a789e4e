"""`appliance hub releases`: sign model releases, look at them, withdraw them."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from appliance.cli.hub.offline import keys_option, open_authority, signing
from appliance.cli.options import HubContext, hub_verb_options
from appliance.cli.tables import print_table
from appliance.core.clock import iso_timestamp
from appliance.core.errors import StorageError

if TYPE_CHECKING:
    from appliance.hub.authority import Authority
    from appliance.hub.release_records import SignedRelease
    from appliance.hub.releases import Releases


@click.group(epilog="Start with: appliance hub releases add smollm2-135m-instruct ~/models --keys /media/stick")
def command() -> None:
    """Add, list, verify, export and withdraw signed model releases."""


@command.command(
    epilog="Examples: `appliance hub releases add smollm2-135m-instruct ~/models`; with a manifest of your own: "
    "`appliance hub releases add reader.toml reader.gguf --criteria tests.toml --hardware jetson-orin-nano`."
)
@click.argument("manifest")
@click.argument("path", type=click.Path(path_type=Path))
@click.option("--version", help="Its version; the manifest's if not given.")
@click.option(
    "--criteria",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="TOML with golden inputs, speed and memory that it must meet on the box; see README.",
)
@click.option("--hardware", multiple=True, help="Hardware class it is for; may be given more than once. All, if not.")
@click.option("--least-agent", default="", metavar="VERSION", help="Oldest program version that can run it.")
@click.option(
    "--counter",
    type=click.IntRange(1, 2**53),
    default=1,
    metavar="N",
    help="Least release counter, where a hub was restored from a backup and devices have confirmed newer releases.",
)
@keys_option
@hub_verb_options
def add(
    context: HubContext,
    *,
    manifest: str,
    path: Path,
    version: str | None,
    criteria: Path | None,
    hardware: tuple[str, ...],
    least_agent: str,
    counter: int,
    keys_folders: tuple[Path, ...],
) -> None:
    """Sign the model of MANIFEST, a TOML file or a name in the catalog, with its files at PATH, a file or a folder."""
    from appliance.cli.hub.drafts import draft_of
    from appliance.cli.progress import ProgressReport
    from appliance.security.audit import local_actor

    draft = draft_of(
        manifest,
        path,
        version=version,
        criteria=criteria,
        hardware=hardware,
        least_agent=least_agent,
        least_counter=counter,
    )

    def act(authority: Authority) -> SignedRelease:
        with _releases(context, authority) as releases, ProgressReport(silent=context.json) as progress:
            return releases.add(draft, local_actor(), progress)

    signed = signing(context, keys_folders, act)
    if context.json:
        context.print_json(_document(signed))
        return
    click.echo(f"{signed.name} is signed as release {signed.release.counter} of {signed.release.model}.")
    click.secho(f"Bring it to the fleet with: appliance hub rollouts start {signed.name}", err=True, dim=True)


@command.command("list", epilog="Example: appliance hub releases list --json")
@hub_verb_options
def list_releases(context: HubContext) -> None:
    """List all releases, withdrawn ones too."""
    with _releases(context, open_authority(context, ())) as releases:
        found = releases.listed()
    if context.json:
        context.print_json([_document(each) for each in found])
    elif not found:
        click.echo("There is no release yet. Sign one with: appliance hub releases add MANIFEST PATH")
    else:
        print_table(
            ["Release", "No.", "Kind", "Size", "Signed", "Hardware", "State"],
            [
                [
                    each.name,
                    str(each.release.counter),
                    each.release.kind,
                    f"{each.size / 1e6:,.1f} MB",
                    iso_timestamp(each.release.created),
                    ", ".join(each.release.hardware) or "all",
                    "signed" if each.withdrawn is None else f"withdrawn: {each.reason}",
                ]
                for each in found
            ],
        )


@command.command(epilog="Example: appliance hub releases show smollm2-135m-instruct:1")
@click.argument("name")
@hub_verb_options
def show(context: HubContext, *, name: str) -> None:
    """Show all of the release NAME: `model`, `model:version` or `model#counter`."""
    with _releases(context, open_authority(context, ())) as releases:
        document = _document(releases.find(name))
    if context.json:
        context.print_json(document)
        return
    files = document.pop("files")
    criteria = document.pop("criteria")
    rows = [[field, str(value)] for field, value in document.items() if value not in (None, "", [], 0)]
    rows += [[f"file {each['role']}", f"{each['length']:,} bytes, sha256 {each['digest']}"] for each in files]
    golden = criteria.pop("golden")
    rows += [[field, str(value)] for field, value in criteria.items() if value]
    rows += [["golden inputs", str(len(golden))]]
    print_table(["Field", "Value"], rows)


@command.command(epilog="Example: appliance hub releases verify --deep && echo all sound")
@click.option("--deep", is_flag=True, help="Read every model file too.")
@hub_verb_options
def verify(context: HubContext, *, deep: bool) -> None:
    """Check the signed repository as a new device would, and that every model file is there."""
    from appliance.cli.progress import ProgressReport

    authority = open_authority(context, ())
    with _releases(context, authority) as releases, ProgressReport(silent=context.json) as progress:
        findings = asyncio.run(releases.verify(deep=deep, progress=progress))
    wrong = [each for each in findings if each.problem]
    if context.json:
        context.print_json(
            [{"subject": each.subject, "detail": each.detail, "problem": each.problem} for each in findings]
        )
    else:
        print_table(
            ["Subject", "Found"],
            [[each.subject, f"problem: {each.problem}" if each.problem else each.detail] for each in findings],
        )
    if wrong:
        raise StorageError(
            f"{len(wrong)} of {len(findings)} checks of the signed repository failed; the first: {wrong[0].problem}",
            advice="Restore the hub's folder from a backup, or sign again: appliance hub keys sign.",
            code="repository_damaged",
        )


@command.command(epilog="Example: appliance hub releases withdraw reader:3 --reason 'reads tables wrong'")
@click.argument("name")
@click.option("--reason", required=True, help="Why; it is kept with the release.")
@keys_option
@hub_verb_options
def withdraw(context: HubContext, *, name: str, reason: str, keys_folders: tuple[Path, ...]) -> None:
    """Sign that the release NAME is no longer to be installed; devices that run it go on.

    Model files that no other release has are deleted.
    """
    from appliance.security.audit import local_actor

    def act(authority: Authority) -> tuple[SignedRelease, int]:
        with _releases(context, authority) as releases:
            return releases.withdraw(name, reason, local_actor()), releases.remove_unused_files()

    withdrawn, freed = signing(context, keys_folders, act)
    counter = withdrawn.release.counter
    if context.json:
        context.print_json({"name": withdrawn.name, "counter": counter, "reason": reason, "freed": freed})
    else:
        click.echo(f"{withdrawn.name} (release {counter}) is withdrawn; {freed / 1e6:,.1f} MB were freed.")


@command.command(epilog="Example: appliance hub releases export /media/stick reader:3")
@click.argument("folder", type=click.Path(path_type=Path))
@click.argument("names", nargs=-1)
@hub_verb_options
def export(context: HubContext, *, folder: Path, names: tuple[str, ...]) -> None:
    """Write the signed repository to FOLDER, and the model files of the releases NAMES, or of the newest of each model.

    For boxes that never see the hub; they believe only what is signed.
    """
    from appliance.cli.progress import ProgressReport
    from appliance.hub.export import export_releases
    from appliance.hub.release_blobs import ReleaseBlobs

    authority = open_authority(context, ())
    with _releases(context, authority) as releases, ProgressReport(silent=context.json) as progress:
        live = {each.release.model for each in releases.listed() if each.withdrawn is None}
        wanted = [releases.find(each) for each in names or sorted(live)]
        blobs = ReleaseBlobs(Path(context.settings.data_dir) / "blobs")
        written = export_releases(authority, blobs, wanted, folder, progress)
    if context.json:
        context.print_json({"releases": [each.name for each in wanted], "written": written})
        return
    for each in wanted:
        click.echo(each.name)
    click.secho(f"{written / 1e6:,.1f} MB of model files were written to {folder}.", err=True)


@contextmanager
def _releases(context: HubContext, authority: Authority) -> Iterator[Releases]:
    from appliance.core.clock import SystemClock
    from appliance.hub.release_blobs import ReleaseBlobs
    from appliance.hub.release_store import SqliteReleases
    from appliance.hub.releases import Releases
    from appliance.hub.schema import MIGRATIONS
    from appliance.store.database import Database

    authority.repository.metadata()  # says that there is no hub before a database is made
    clock = SystemClock()
    settings = context.settings
    with closing(Database(settings.database_path, migrations=MIGRATIONS)) as database:
        blobs = ReleaseBlobs(Path(settings.data_dir) / "blobs")
        yield Releases(authority, blobs, SqliteReleases(database, clock), clock)


def _document(signed: SignedRelease) -> dict[str, Any]:
    import msgspec

    document: dict[str, Any] = msgspec.to_builtins(signed.release)
    return {
        "name": signed.name,
        **document,
        "target": signed.target,
        "length": signed.length,
        "digest": signed.digest,
        "withdrawn": signed.withdrawn,
        "reason": signed.reason,
    }
