"""`appliance keys`: create, list and revoke API keys."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing, contextmanager
from typing import Any

import click

from appliance.cli.options import Context, verb_options
from appliance.cli.tables import print_table
from appliance.core.clock import SystemClock, iso_timestamp
from appliance.security.keys import LARGEST_WEIGHT, SCOPES, SMALLEST_WEIGHT, TIERS, ApiKey, KeyStore
from appliance.store.database import Database


@click.group(epilog="Start with: appliance keys create NAME. A running server sees every change at once.")
def command() -> None:
    """Create, list and revoke API keys."""


@command.command(epilog="Examples: `appliance keys create camera-3`, `appliance keys create ops --scope admin`.")
@click.argument("name")
@click.option(
    "--scope",
    "scopes",
    multiple=True,
    type=click.Choice(SCOPES),
    default=("inference",),
    show_default=True,
    help="What it may do; may be given more than once. admin implies all.",
)
@click.option(
    "--weight",
    type=click.FloatRange(SMALLEST_WEIGHT, LARGEST_WEIGHT),
    default=1.0,
    show_default=True,
    help="Its share of a busy engine, relative to the other keys'.",
)
@click.option(
    "--tier",
    type=click.Choice(tuple(TIERS)),
    default="default",
    show_default=True,
    help="The best service tier it is served in; a request for a better one is served in this.",
)
@verb_options
def create(context: Context, *, name: str, scopes: tuple[str, ...], weight: float, tier: str) -> None:
    """Create a key called NAME and print its secret, this once."""
    with _open_keys(context) as keys:
        key, secret = keys.create(name, scopes, weight=weight, highest_tier=TIERS[tier])
    if context.json:
        context.print_json(key_document(key) | {"secret": secret})
        return
    click.echo(secret)
    click.secho(
        f"{key.id} ({key.name}) is for: {key_scopes(key)}. The line above is stored nowhere, never shown again.",
        err=True,
    )
    click.secho("Clients send it as: Authorization: Bearer ea-…", err=True, dim=True)


@command.command("list")
@verb_options
def list_keys(context: Context) -> None:
    """List all keys, revoked ones too, without their secrets."""
    keys: tuple[ApiKey, ...] = ()
    if context.settings.database_path.exists():
        with _open_keys(context) as store:
            keys = store.list()
    if context.json:
        context.print_json([key_document(each) for each in keys])
    elif not keys:
        click.echo("There is no API key yet. Create one with: appliance keys create NAME")
    else:
        print_table(
            ["Id", "Name", "Scopes", "Weight", "Tier", "Created", "Last used", "State"],
            [
                [
                    each.id,
                    each.name,
                    key_scopes(each),
                    f"{each.weight:g}",
                    each.tier_name,
                    key_time(each.created),
                    key_time(each.last_used),
                    key_state(each),
                ]
                for each in keys
            ],
            {"valid": "green"},
        )


@command.command(epilog="`appliance keys list` shows the ids.")
@click.argument("key_id", metavar="ID")
@verb_options
def revoke(context: Context, *, key_id: str) -> None:
    """Make the key with this ID useless from its next request on."""
    with _open_keys(context) as keys:
        key = keys.revoke(key_id)
    if context.json:
        context.print_json(key_document(key))
    else:
        click.echo(f"{key.id} ({key.name}) is {key_state(key)}.")


@contextmanager
def _open_keys(context: Context) -> Iterator[KeyStore]:
    with closing(Database(context.settings.database_path)) as database:
        yield KeyStore(database, SystemClock())


def key_document(key: ApiKey) -> dict[str, Any]:
    """Return a key as JSON prints it, without its secret."""
    return {
        "id": key.id,
        "name": key.name,
        "scopes": sorted(key.scopes),
        "weight": key.weight,
        "highest_tier": key.tier_name,
        "created": key.created,
        "last_used": key.last_used,
        "revoked": key.revoked,
    }


def key_scopes(key: ApiKey) -> str:
    """Return a key's scopes for a table."""
    return ", ".join(sorted(key.scopes))


def key_state(key: ApiKey) -> str:
    """Return whether a key is valid, or since when it is not."""
    return "valid" if key.revoked is None else f"revoked {key_time(key.revoked)}"


def key_time(unix_seconds: float | None) -> str:
    """Return a time for a table."""
    return "never" if unix_seconds is None else iso_timestamp(unix_seconds)
