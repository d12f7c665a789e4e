"""`appliance hub ca`: claims for new boxes, who has a certificate, and who has it no more."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import click

from appliance.cli.options import HubContext, hub_verb_options
from appliance.cli.tables import print_table
from appliance.core.clock import SystemClock, iso_timestamp

if TYPE_CHECKING:
    from appliance.hub.enrolments import SqliteEnrolments

DAY_S = 86_400.0


@click.group(epilog="Start with: appliance hub ca claim FILE, then on the box: appliance fleet enrol FILE")
def command() -> None:
    """Look at the hub's certificate authority, make claims, revoke devices."""


@command.command(
    epilog="Examples: `appliance hub ca claim box-7.json`, "
    "`appliance hub ca claim line-3.json --uses 20 --days 2 --auto-approve`."
)
@click.argument("file", type=click.Path(dir_okay=False, path_type=Path))
@click.option("--uses", type=click.IntRange(1, 100_000), default=1, show_default=True, help="Boxes it may enrol.")
@click.option("--days", type=click.FloatRange(0.01, 366), default=7.0, show_default=True, help="How long it is valid.")
@click.option("--auto-approve", is_flag=True, help="Let these boxes in without asking a person.")
@hub_verb_options
def claim(context: HubContext, *, file: Path, uses: int, days: float, auto_approve: bool) -> None:
    """Write a claim bundle to FILE, to be carried to a new box; whoever has it may ask for an identity."""
    from appliance.hub.claims import make_bundle, write_bundle
    from appliance.security.audit import local_actor

    with _open(context) as enrolments:
        record, bundle = make_bundle(
            context.settings,
            enrolments,
            uses=uses,
            days=days,
            automatic=auto_approve,
            actor=local_actor(),
            clock=SystemClock(),
        )
        write_bundle(file, bundle)
    if context.json:
        context.print_json({"claim": record.id, "file": file, "expires": record.expires, "uses": uses})
        return
    click.echo(f"{file}: claim {record.id} for {uses} box(es), until {iso_timestamp(record.expires)}.")
    click.echo(f"Carry it to the box, and there: appliance fleet enrol {file.name}")
    if not auto_approve:
        click.echo("Then approve the box here: appliance hub devices approve ID")


@command.command("list")
@hub_verb_options
def list_all(context: HubContext) -> None:
    """List claims, boxes that wait for a person, and devices with a certificate."""
    with _open(context) as enrolments:
        claims, boxes, certificates = enrolments.claims(), enrolments.enrolments(), enrolments.certificates()
    now = SystemClock().unix()
    if context.json:
        context.print_json({"claims": claims, "enrolments": boxes, "certificates": certificates})
        return
    print_table(
        ["Claim", "Used", "Of", "Approves", "Until", "State"],
        [
            [
                each.id,
                str(each.used),
                str(each.allowed),
                "by itself" if each.automatic else "a person",
                iso_timestamp(each.expires),
                "revoked" if each.revoked else ("expired" if each.expires <= now else "valid"),
            ]
            for each in claims
        ],
        {"valid": "green"},
    )
    print_table(
        ["Device", "State", "Installation", "Claim", "Asked", "Decided by"],
        [
            [each.device, each.state, each.instance[:12], each.claim, iso_timestamp(each.asked), each.decided_by or ""]
            for each in boxes
        ],
        {"waiting": "yellow", "quarantined": "red", "issued": "green"},
    )


@command.command(
    epilog="Examples: `appliance hub ca revoke box-7 --reason stolen`, `appliance hub ca revoke claim_1a2b`."
)
@click.argument("device")
@click.option("--reason", default="", help="For the record.")
@hub_verb_options
def revoke(context: HubContext, *, device: str, reason: str) -> None:
    """Revoke every certificate of DEVICE, or a claim by its id; it cannot connect again."""
    from appliance.hub.init import HubFiles, load_authority
    from appliance.hub.revocations import Revocations, reload_broker
    from appliance.security.audit import local_actor

    clock, files = SystemClock(), HubFiles.of(context.settings)
    with _open(context) as enrolments:
        if device.startswith("claim_"):
            enrolments.revoke_claim(device, actor=local_actor(), now=clock.unix())
            _say(context, device, "revoked", "It enrols nobody any more.")
            return
        enrolments.revoke(device, actor=local_actor(), now=clock.unix(), reason=reason)
        Revocations(enrolments, load_authority(context.settings), files, clock).refresh()
    told = reload_broker(files.broker_process)
    _say(
        context,
        device,
        "revoked",
        "The broker was told; the running hub ends the connection that it still has."
        if told
        else f"Tell the broker to read {files.revoked} again: send it SIGHUP (systemctl reload mosquitto).",
    )


@command.command()
@hub_verb_options
def show(context: HubContext) -> None:
    """Show the authority: its name, until when it is valid, and its fingerprint."""
    from appliance.hub.init import load_authority
    from appliance.security.certificates import certificate_facts

    facts = certificate_facts(load_authority(context.settings).identity.certificate)
    if context.json:
        context.print_json({"name": facts.common_name, "expires": facts.not_after, "fingerprint": facts.fingerprint})
        return
    click.echo(f"{facts.common_name}\nValid until {iso_timestamp(facts.not_after)}\nSHA-256 {facts.fingerprint}")


@contextmanager
def _open(context: HubContext) -> Iterator[SqliteEnrolments]:
    from appliance.hub.enrolments import SqliteEnrolments
    from appliance.hub.init import read_hub
    from appliance.hub.schema import MIGRATIONS
    from appliance.store.database import Database

    read_hub(context.settings)  # a mistyped folder is told, and not made
    with closing(Database(context.settings.database_path, migrations=MIGRATIONS)) as database:
        yield SqliteEnrolments(database)


def _say(context: HubContext, device: str, state: str, then: str) -> None:
    if context.json:
        context.print_json({"device": device, "state": state, "detail": then})
    else:
        click.echo(f"{device} is {state}. {then}")
