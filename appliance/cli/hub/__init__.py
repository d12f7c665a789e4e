"""`appliance hub`: the fleet's other end, one file a verb."""

from __future__ import annotations

import click

from appliance.cli.lazy import LazyGroup

VERBS = {
    "init": "Make a hub: certificates, signing keys, database, broker configuration.",
    "serve": "Run the hub.",
    "ca": "Look at the hub's certificate authority, make claims, revoke devices.",
    "keys": "Signing keys: list, add, rotate, sign again.",
    "releases": "Add, list, verify, export and withdraw signed model releases.",
    "rollouts": "Bring a release to the fleet in waves, watch, pause, resume, abort.",
    "api-keys": "Create, list and revoke operators' keys for the HTTP API.",
    "devices": "List, approve, command and remove devices, set what they should be.",
    "status": "Show the fleet at a glance.",
    "simulate": "Let thousands of simulated devices talk to a hub.",
}
"""Imported only when called, so that `--help` is instant; each is the attribute `command` of its module here."""


@click.command(
    cls=LazyGroup,
    package="appliance.cli.hub",
    verbs=VERBS,
    epilog="Start with: appliance hub init, then: appliance hub serve",
)
def command() -> None:
    """Run a hub for many boxes."""
