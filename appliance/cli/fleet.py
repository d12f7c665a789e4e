"""`appliance fleet`: make this box a device of a hub, and see how it stands."""

from __future__ import annotations

import re
import socket
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from appliance.cli.fleet_import import import_folder
from appliance.cli.options import Context, verb_options
from appliance.core.clock import SystemClock, iso_timestamp
from appliance.core.errors import InvalidRequestError, UnavailableError
from appliance.core.fleet import DEVICE_ID

if TYPE_CHECKING:
    from appliance.fleet.identity import Identity, IdentityFolder


@click.group(epilog="Start with: appliance fleet enrol BUNDLE. The hub makes bundles: appliance hub ca claim FILE")
def command() -> None:
    """Enrol this box at a hub, import releases from a folder, leave the hub."""


command.add_command(import_folder)


@command.command(
    epilog="Examples: `appliance fleet enrol claim.json`, `appliance fleet enrol claim.json --id line-3-left`. "
    "Repeating it goes on where it was broken off."
)
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--id", "device", help="Id of this box at the hub; its host name if not given.")
@click.option(
    "--wait",
    "wait_s",
    type=click.FloatRange(1, 7 * 86_400),
    default=600.0,
    show_default=True,
    help="Seconds to wait for the hub and for whoever approves.",
)
@verb_options
def enrol(context: Context, *, bundle: Path, device: str | None, wait_s: float) -> None:
    """Enrol this box with the claim in BUNDLE; its key is made here and never leaves it."""
    import asyncio

    from appliance.fleet.enrolment import begin, read_bundle
    from appliance.fleet.enrolment import enrol as ask

    folder, clock = _folder(context), SystemClock()
    wanted = _device_id(device)
    pending = begin(folder, wanted, read_bundle(bundle, now=clock.unix()))

    async def asking() -> Identity:
        assert pending is not None
        try:
            async with asyncio.timeout(wait_s):
                return await ask(
                    folder, pending, facts=_facts(), clock=clock, say=lambda text: click.echo(text, err=True)
                )
        except TimeoutError as error:
            raise UnavailableError(
                f"The hub has not enrolled this box as {wanted!r} within {wait_s:g} s.",
                advice="Repeat the command: it goes on where it was, with the same key.",
            ) from error

    identity = folder.identity() if pending is None else asyncio.run(asking())
    assert identity is not None
    if context.json:
        context.print_json(_document(identity))
        return
    click.echo(f"This box is {identity.device} at {identity.host}:{identity.port}.")
    click.echo("A running server takes part from its next start on.", err=True)


@command.command()
@verb_options
def status(context: Context) -> None:
    """Show who this box is to its hub, and until when its certificate is valid."""
    folder = _folder(context)
    identity, pending = folder.identity(), folder.pending()
    if context.json:
        waiting = None if pending is None else pending.device
        context.print_json({"enrolled": identity is not None, "enrolling": waiting} | _document(identity))
    elif identity is not None:
        document = _document(identity)
        click.echo(f"This box is {identity.device} at {identity.host}:{identity.port}.")
        click.echo(f"Its certificate is valid until {iso_timestamp(document['certificate_expires'])}.")
        if identity.on_trial:
            click.echo("It was renewed and has not been used yet.")
    elif pending is not None:
        click.echo(f"This box asks to become {pending.device} at {pending.bundle.host}:{pending.bundle.port}.")
    else:
        click.echo("This box is not enrolled at a hub. Enrol it with: appliance fleet enrol BUNDLE")


@command.command(epilog="On the hub, revoke its certificate as well: appliance hub ca revoke ID")
@verb_options
def leave(context: Context) -> None:
    """Forget the hub: this box's key and certificate are deleted."""
    folder = _folder(context)
    identity = folder.identity()
    folder.leave()
    if context.json:
        context.print_json({"enrolled": False, "left": None if identity is None else identity.device})
    else:
        click.echo("This box belongs to no hub any more.")


def _folder(context: Context) -> IdentityFolder:
    from appliance.fleet.identity import IdentityFolder

    return IdentityFolder(context.settings.data_dir / "fleet")


def _device_id(given: str | None) -> str:
    """Return the id that was given, or one made of the host name.

    Raises:
        InvalidRequestError: It cannot be an id.
    """
    device = given or re.sub(r"[^a-z0-9._-]+", "-", socket.gethostname().lower()).strip("-._")[:63]
    if not DEVICE_ID.fullmatch(device):
        raise InvalidRequestError(
            f"{device!r} cannot be a device's id.",
            advice="Give one with --id: up to 63 small letters, digits, dots, dashes and underscores.",
            param="id",
        )
    return device


def _facts() -> dict[str, Any]:
    """Return what helps a person to recognise the box."""
    import platform

    from appliance import __version__

    return {"host": socket.gethostname()[:255], "machine": platform.machine(), "agent": __version__}


def _document(identity: Identity | None) -> dict[str, Any]:
    from appliance.security.certificates import certificate_facts

    if identity is None:
        return {}
    facts = certificate_facts(identity.credentials.read_bytes())
    return {
        "device": identity.device,
        "instance": identity.instance,
        "host": identity.host,
        "port": identity.port,
        "certificate_expires": facts.not_after,
        "certificate_on_trial": identity.on_trial,
    }
