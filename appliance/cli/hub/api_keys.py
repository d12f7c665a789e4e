"""`appliance hub api-keys`: who may use the hub's HTTP API."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import click

from appliance.cli.hub.folder import open_folder
from appliance.cli.keys import key_document, key_scopes, key_state, key_time
from appliance.cli.options import HubContext, hub_verb_options
from appliance.cli.tables import print_table
from appliance.core.clock import SystemClock
from appliance.hub.operators import SCOPES
from appliance.security.keys import KeyStore


@click.group(epilog="Start with: appliance hub api-keys create NAME. A running hub sees every change at once.")
def command() -> None:
    """Create, list and revoke operators' keys for the HTTP API. Signing keys are under `hub keys`."""


@command.command(epilog="Example: `appliance hub api-keys create dashboard --scope read`.")
@click.argument("name")
@click.option(
    "--scope",
    "scopes",
    multiple=True,
    type=click.Choice(SCOPES),
    default=("read",),
    show_default=True,
    help="What it may do; may be given more than once. admin implies all.",
)
@hub_verb_options
def create(context: HubContext, *, name: str, scopes: tuple[str, ...]) -> None:
    """Create a key called NAME and print its secret, this once."""
    with _open_keys(context) as keys:
        key, secret = keys.create(name, scopes)
    if context.json:
        context.print_json(key_document(key) | {"secret": secret})
        return
    click.echo(secret)
    click.secho(f"{key.id} ({key.name}) is for: {key_scopes(key)}. The line above is never shown again.", err=True)


@command.command("list", epilog="Example: `appliance hub api-keys list`.")
@hub_verb_options
def list_keys(context: HubContext) -> None:
    """List all keys, revoked ones too, without their secrets."""
    with _open_keys(context) as store:
        keys = store.list()
    if context.json:
        context.print_json([key_document(each) for each in keys])
        return
    headings = ["Id", "Name", "Scopes", "Created", "Last used", "State"]
    rows = [
        [each.id, each.name, key_scopes(each), key_time(each.created), key_time(each.last_used), key_state(each)]
        for each in keys
    ]
    print_table(headings, rows, {"valid": "green"})


@command.command(epilog="`appliance hub api-keys list` shows the ids.")
@click.argument("key_id", metavar="ID")
@hub_verb_options
def revoke(context: HubContext, *, key_id: str) -> None:
    """Make the key with this ID useless from its next request on."""
    with _open_keys(context) as keys:
        key = keys.revoke(key_id)
    if context.json:
        context.print_json(key_document(key))
    else:
        click.echo(f"{key.id} ({key.name}) is {key_state(key)}.")


@contextmanager
def _open_keys(context: HubContext) -> Iterator[KeyStore]:
    with open_folder(context) as folder:
        yield KeyStore(folder.database, SystemClock(), scopes=SCOPES)
