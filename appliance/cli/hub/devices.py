"""`appliance hub devices`: who there is, what they should be, and what they are told to do."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Awaitable, Callable
from dataclasses import asdict
from functools import partial
from typing import Any

import click
import msgspec

from appliance.cli.hub.folder import HubFolder, open_folder
from appliance.cli.options import HubContext, hub_verb_options
from appliance.cli.tables import print_table
from appliance.core.clock import SystemClock, iso_timestamp
from appliance.core.errors import InvalidRequestError, NotFoundError
from appliance.hub.command_store import OPEN, CommandRow
from appliance.hub.desired import DesiredDocument, changed
from appliance.hub.device_records import Device, Which
from appliance.hub.twin_store import Scope, Twin
from appliance.security.audit import local_actor

_COLOURS = {"online": "green", "lost": "yellow", "quarantined": "red", "done": "green", "failed": "red"}
_SECTIONS = ("settings", "telemetry", "models")


@click.group(epilog="Start with: appliance hub devices list. A running hub acts on every change within a second.")
def command() -> None:
    """List, approve, command and remove devices, set what they should be."""


@command.command("list", epilog="Examples: `appliance hub devices list`, `… list --status lost --group line-3`.")
@click.option("--status", help="online, lost, stopping, unreached or quarantined.")
@click.option("--group", help="Only devices of this group.")
@click.option("--hardware", help="Only devices of this hardware class.")
@click.option("--limit", type=click.IntRange(1, 100_000), default=1000, show_default=True, help="Most devices.")
@hub_verb_options
def list_devices(
    context: HubContext, *, status: str | None, group: str | None, hardware: str | None, limit: int
) -> None:
    """List devices in the order of their ids."""
    with open_folder(context) as folder:
        devices = folder.devices.list(Which(status=status, group=group, hardware=hardware), limit=limit)
    if context.json:
        context.print_json([_document(each) for each in devices])
        return
    headings = ["Id", "Status", "Last heard of", "Program", "Hardware", "Groups", "Labels"]
    print_table(headings, [_row(each) for each in devices], _COLOURS)


@command.command(epilog="Example: `appliance hub devices waiting`, then `appliance hub devices approve box-7`.")
@hub_verb_options
def waiting(context: HubContext) -> None:
    """List boxes that ask for an identity and wait for approval."""
    with open_folder(context) as folder:
        found = folder.enrolments.enrolments("waiting", "quarantined")
    if context.json:
        context.print_json([asdict(each) for each in found])
        return
    rows = [[each.device, each.state, iso_timestamp(each.asked), each.instance[:8]] for each in found]
    print_table(["Id", "State", "Asked", "Installation"], rows, _COLOURS)


@command.command(epilog="Example: `appliance hub devices show box-7`.")
@click.argument("device")
@hub_verb_options
def show(context: HubContext, *, device: str) -> None:
    """Show a device: what it reported, what it should be, and what happened to it."""
    with open_folder(context) as folder:
        found = folder.devices.get(device)
        reported = folder.devices.reported(device)
        twin = folder.twins.get("device", device)
        current = folder.twins.current(device)
        events = folder.devices.events(device, limit=20)
        commands = folder.commands.of_device(device, limit=10)
        alarms = folder.telemetry.open_alarms(device)
    document = {
        "device": _document(found),
        "reported": reported,
        "desired": None if current is None else json.loads(current.document),
        "own_twin": _twin_document(twin),
        "events": [asdict(each) for each in events],
        "commands": [asdict(each) for each in commands],
        "alarms": [asdict(each) for each in alarms],
    }
    if context.json:
        context.print_json(document)
        return
    print_table(["Id", "Status", "Last heard of", "Program", "Hardware", "Groups", "Labels"], [_row(found)], _COLOURS)
    for heading in ("reported", "desired"):
        click.secho(heading.capitalize(), bold=True)
        context.print_json(document[heading])
    if alarms:
        print_table(["Alarm", "Severity", "Detail"], [[each.name, each.severity, each.detail] for each in alarms])
    if events:
        print_table(["When", "What", "Detail"], [[iso_timestamp(each.at), each.kind, each.detail] for each in events])
    if commands:
        rows = [[iso_timestamp(each.created), each.name, each.state, each.detail] for each in commands]
        print_table(["When", "Command", "State", "Detail"], rows, _COLOURS)


@command.command(epilog="Examples: `appliance hub devices approve box-7`, `… approve box-7 --replace`.")
@click.argument("device")
@click.option("--replace", is_flag=True, help="Give the identity to another installation than the one that has it.")
@hub_verb_options
def approve(context: HubContext, *, device: str, replace: bool) -> None:
    """Let the box that asks for the identity DEVICE have it, or end the quarantine of DEVICE."""
    with open_folder(context) as folder:
        what = _approve(folder, device, replace=replace)
    _say(context, {"device": device, "approved": what}, f"{device}: {what}.")


@command.command(epilog="Example: `appliance hub devices refuse box-7`.")
@click.argument("device")
@hub_verb_options
def refuse(context: HubContext, *, device: str) -> None:
    """Refuse every box that asks for the identity DEVICE."""
    with open_folder(context) as folder:
        folder.enrolments.refuse(device, actor=local_actor(), now=SystemClock().unix())
    _say(context, {"device": device, "refused": True}, f"Who asks to be {device} is refused.")


@command.command(
    "set",
    epilog="Examples: `… set box-7 log_level=debug telemetry.health=60`, `… set line-3 --group models.chat=7`, "
    "`… set box-7 log_level=`, which leaves it to the box.",
)
@click.argument("name")
@click.argument("changes", nargs=-1, required=True, metavar="SETTING=VALUE…")
@click.option("--group", "is_group", is_flag=True, help="NAME is a group, not a device.")
@hub_verb_options
def set_desired(context: HubContext, *, name: str, changes: tuple[str, ...], is_group: bool) -> None:
    """Set what the device or group NAME should be: settings, `telemetry.STREAM` seconds, `models.NAME` versions."""
    scope: Scope = "group" if is_group else "device"
    with open_folder(context) as folder:
        before = folder.twins.get(scope, name)
        document = _changed(before.document, changes)
        twin = asyncio.run(
            folder.twins.set(scope, name, document, expected_version=before.version, actor=local_actor())
        )
    text = f"The desired twin of {scope} {name} has version {twin.version}."
    _say(context, _twin_document(twin), text)


@command.command(epilog="Examples: `… describe box-7 hall=A`, `… describe box-7 --group line-3 --group canary`.")
@click.argument("device")
@click.argument("labels", nargs=-1, metavar="LABEL=VALUE…")
@click.option("--group", "groups", multiple=True, help="All groups it is in; may be given more than once.")
@click.option("--no-groups", is_flag=True, help="It is in no group.")
@hub_verb_options
def describe(
    context: HubContext, *, device: str, labels: tuple[str, ...], groups: tuple[str, ...], no_groups: bool
) -> None:
    """Set the groups and labels of DEVICE; a label without a value is removed."""
    values = {name: value or None for name, value in (_pair(each) for each in labels)}
    wanted = list(groups) if groups or no_groups else None
    with open_folder(context) as folder:
        found = asyncio.run(folder.devices.describe(device, groups=wanted, labels=values, actor=local_actor()))
    _say(context, _document(found), f"{device}: groups {', '.join(found.groups) or 'none'}, labels {_labels(found)}.")


@command.command(
    "command",
    epilog="Examples: `… command box-7 ping`, `… command box-7 log_tail '{\"lines\": 100}'`, `… restart --wait 0`.",
)
@click.argument("device")
@click.argument("name")
@click.argument("arguments", default="{}", metavar="[JSON]")
@click.option("--expires", type=click.FloatRange(1, 300), default=60.0, show_default=True, help="Seconds it is valid.")
@click.option("--wait", "wait_s", type=click.FloatRange(0, 330), help="Seconds to wait for its result.")
@hub_verb_options
def send(context: HubContext, *, device: str, name: str, arguments: str, expires: float, wait_s: float | None) -> None:
    """Tell DEVICE to do NAME, by way of the running hub, and wait for its result."""
    try:
        values = msgspec.json.decode(arguments, type=dict[str, Any])
    except (msgspec.DecodeError, UnicodeError) as error:
        raise InvalidRequestError(f"The arguments are no JSON object: {error}.", param="arguments") from error
    with open_folder(context) as folder:
        if not folder.running:
            click.secho("No hub serves this folder now; the command waits for one.", fg="yellow", err=True)
        give = partial(folder.commands.give, device, name, values, expires_in_s=expires, actor=local_actor())
        row = asyncio.run(_send(folder, give, expires + 1.0 if wait_s is None else wait_s))
    if context.json:
        context.print_json(asdict(row))
    else:
        click.secho(f"{row.state} {row.code} {row.detail}".strip(), fg=_COLOURS.get(row.state))
        if row.result:
            context.print_json(row.result)
    sys.exit(1 if row.state in ("failed", "expired") else 0)


@command.command(epilog="Example: `appliance hub devices forget box-7`. `appliance hub ca revoke` keeps it away.")
@click.argument("device")
@click.option("--yes", is_flag=True, help="Do not ask.")
@hub_verb_options
def forget(context: HubContext, *, device: str, yes: bool) -> None:
    """Remove everything about DEVICE; while its certificate is valid, it may come back."""
    if not yes:
        click.confirm(f"Remove {device} with its telemetry, twin and commands?", abort=True, err=True)
    with open_folder(context) as folder:
        asyncio.run(_forget(folder, device))
    _say(context, {"device": device, "forgotten": True}, f"{device} is forgotten.")


async def _send(folder: HubFolder, give: Callable[[], Awaitable[CommandRow]], wait_s: float) -> CommandRow:
    row = await give()
    return await folder.commands.result(row.id, timeout_s=wait_s) if row.state in OPEN else row


async def _forget(folder: HubFolder, device: str) -> None:
    folder.devices.get(device)
    await folder.telemetry.forget(device)  # first: whoever is killed in between still finds the device
    await folder.devices.forget(device, actor=local_actor())


def _approve(folder: HubFolder, device: str, *, replace: bool) -> str:
    try:
        folder.enrolments.approve(device, actor=local_actor(), now=SystemClock().unix(), replace=replace)
    except NotFoundError:
        known = folder.devices.find(device)
        if known is None or known.quarantined is None:
            raise
        asyncio.run(folder.devices.release(device, actor=local_actor()))
        return "the quarantine is over"
    return "the box that asked may have the identity"


def _changed(document: DesiredDocument, changes: tuple[str, ...]) -> DesiredDocument:
    for each in changes:
        name, text = _pair(each)
        section, dot, key = name.partition(".")
        if not dot or section not in _SECTIONS:
            section, key = "settings", name
        value: Any = text or None
        if section == "telemetry" and text:
            value = _number(name, text)
        elif section == "settings" and text:
            value = _value(text)
        document = changed(document, {key: value}, field=section)
    return document


def _pair(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not equals or not name:
        raise InvalidRequestError(f"{text!r} is no NAME=VALUE.", param=name or text)
    return name, value


def _value(text: str) -> Any:
    """Return a number, true or false where it is one, else the text."""
    try:
        value = msgspec.json.decode(text)
    except msgspec.DecodeError:
        return text
    return value if isinstance(value, bool | int | float) else text


def _number(name: str, text: str) -> float:
    try:
        return float(text)
    except ValueError as error:
        raise InvalidRequestError(f"{name} takes seconds, not {text!r}.", param=name) from error


def _say(context: HubContext, document: object, text: str) -> None:
    if context.json:
        context.print_json(document)
    else:
        click.echo(text)


def _document(device: Device) -> dict[str, Any]:
    return asdict(device)


def _twin_document(twin: Twin) -> dict[str, Any]:
    return {"scope": twin.scope, "name": twin.name, "version": twin.version, **msgspec.to_builtins(twin.document)}


def _row(device: Device) -> list[str]:
    return [
        device.id,
        device.status if device.quarantined is None else "quarantined",
        "never" if device.seen is None else iso_timestamp(device.seen),
        device.agent,
        device.hardware,
        ", ".join(device.groups),
        _labels(device),
    ]


def _labels(device: Device) -> str:
    return ", ".join(f"{name}={value}" for name, value in device.labels.items())
