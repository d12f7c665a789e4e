"""`appliance hub keys`: the keys that sign releases, jobs and metadata."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from appliance.cli.hub.offline import keys_option, open_authority, signing
from appliance.cli.options import HubContext, hub_verb_options
from appliance.cli.tables import print_table
from appliance.core.clock import iso_timestamp

if TYPE_CHECKING:
    from appliance.hub.authority import Authority, RoleState

STYLES = {"valid": "green", "soon": "yellow", "expired": "red"}


@click.group(
    epilog="Root and targets keys belong on a memory stick in a drawer: move the folder that `hub init` made there, "
    "and name it with --keys when something is to be signed."
)
def command() -> None:
    """Signing keys: list, add, rotate, sign again."""


@command.command("list", epilog="Example: appliance hub keys list --keys /media/stick")
@keys_option
@hub_verb_options
def list_keys(context: HubContext, *, keys_folders: tuple[Path, ...]) -> None:
    """List who may sign what, until when it counts, and which keys are at hand."""
    states = open_authority(context, keys_folders).states()
    if context.json:
        context.print_json([_document(each) for each in states])
        return
    print_table(
        ["Role", "Kept", "Must sign", "At hand", "Version", "Expires", "State", "Keys"],
        [
            [
                each.role,
                each.kept,
                f"{each.threshold} of {len(each.keys)}",
                str(len(each.at_hand)),
                str(each.version),
                "" if each.expires is None else iso_timestamp(each.expires),
                each.state,
                " ".join(key[:16] for key in each.keys),
            ]
            for each in states
        ],
        STYLES,
    )


@command.command(
    epilog="Examples: `appliance hub keys add targets --keys /media/stick`; "
    "`appliance hub keys add root --threshold 3`."
)
@click.argument("role", type=click.Choice(("root", "targets")))
@click.option("--threshold", type=click.IntRange(1, 16), help="How many have to sign from now on.")
@keys_option
@hub_verb_options
def add(context: HubContext, *, role: str, threshold: int | None, keys_folders: tuple[Path, ...]) -> None:
    """Make one more key for ROLE, in the first folder of offline keys; the root keys have to sign it."""

    def act(authority: Authority) -> list[str]:
        return authority.change_keys(role, add=1, threshold=threshold)

    made = signing(context, keys_folders, act)
    _report(context, "key.add", role, made)


@command.command(
    epilog="Examples: `appliance hub keys rotate online` after the hub was in strange hands; "
    "`appliance hub keys rotate targets --keys /media/stick`; `appliance hub keys rotate root --key 1a2b3c4d` for one "
    "lost key."
)
@click.argument("role", type=click.Choice(("root", "targets", "online", "director")))
@click.option("--key", "only", multiple=True, metavar="ID", help="Of root or targets: replace only the key of this id.")
@click.option("--drop-old", is_flag=True, help="Of the director: what the old key has signed counts no more.")
@keys_option
@hub_verb_options
def rotate(
    context: HubContext, *, role: str, only: tuple[str, ...], drop_old: bool, keys_folders: tuple[Path, ...]
) -> None:
    """Replace the keys of ROLE by new ones; `online` are all that lie on the hub: snapshot, timestamp and director.

    Devices learn it from the signed root by themselves, however many rotations they have missed.
    """
    from appliance.hub.director import rotate_director

    def act(authority: Authority) -> list[str]:
        if role == "online":
            return authority.rotate_online()
        if role == "director":
            return [rotate_director(authority, keep_old=not drop_old)]
        leaving = authority.find_keys(role, only)
        return authority.change_keys(role, add=len(leaving), remove=leaving)

    _report(context, "key.rotate", role, signing(context, keys_folders, act))


@command.command(epilog="Example: appliance hub keys remove targets 1a2b3c4d --keys /media/stick")
@click.argument("role", type=click.Choice(("root", "targets")))
@click.argument("key")
@click.option("--threshold", type=click.IntRange(1, 16), help="How many have to sign from now on.")
@keys_option
@hub_verb_options
def remove(context: HubContext, *, role: str, key: str, threshold: int | None, keys_folders: tuple[Path, ...]) -> None:
    """Let the key whose id begins with KEY count no more for ROLE; the root keys have to sign it."""

    def act(authority: Authority) -> list[str]:
        leaving = authority.find_keys(role, [key])
        authority.change_keys(role, remove=leaving, threshold=threshold)
        return leaving

    _report(context, "key.remove", role, signing(context, keys_folders, act))


@command.command(
    epilog="Examples: `appliance hub keys sign targets --keys /media/stick`; `appliance hub keys sign online`."
)
@click.argument("role", type=click.Choice(("root", "targets", "online")))
@keys_option
@hub_verb_options
def sign(context: HubContext, *, role: str, keys_folders: tuple[Path, ...]) -> None:
    """Sign ROLE again, so that it counts for its full time from now; `online` the hub does daily by itself.

    After the hub's folder was restored from a backup, sign `targets`: devices have seen newer versions meanwhile, and
    believe the hub again from then on.
    """

    def act(authority: Authority) -> list[str]:
        authority.sign_again(role)
        return []

    signing(context, keys_folders, act)
    _report(context, "key.sign", role, [])


def _report(context: HubContext, action: str, role: str, keys: Sequence[str]) -> None:
    """Note a change in the audit, and print how the role stands now."""
    from appliance.hub.schema import MIGRATIONS
    from appliance.security.audit import local_actor, record
    from appliance.store.database import Database

    with closing(Database(context.settings.database_path, migrations=MIGRATIONS)) as database:
        database.write_blocking(lambda each: record(each, local_actor(), action, role, {"keys": list(keys)}))
    if context.json:
        context.print_json({"action": action, "role": role, "keys": list(keys)})
        return
    for key in keys:
        click.echo(key)
    click.secho(f"Done: {action} {role}. Devices learn it at their next question.", err=True)


def _document(state: RoleState) -> dict[str, Any]:
    return {
        "role": state.role,
        "kept": state.kept,
        "threshold": state.threshold,
        "keys": list(state.keys),
        "at_hand": list(state.at_hand),
        "version": state.version,
        "expires": state.expires,
        "state": state.state,
    }
