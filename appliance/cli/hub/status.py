"""`appliance hub status`: the fleet at a glance."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict

import click

from appliance.cli.hub.folder import open_folder
from appliance.cli.options import HubContext, hub_verb_options
from appliance.cli.tables import print_table
from appliance.core.clock import iso_timestamp

_ALARMS_SHOWN = 20
_COLOURS = {"critical": "red", "warning": "yellow", "online": "green", "quarantined": "red", "lost": "yellow"}


@click.command(epilog="Examples: `appliance hub status`, `appliance hub status --json`.")
@hub_verb_options
def command(context: HubContext) -> None:
    """Show how many devices are online, lost, unreached or in quarantine, their versions, and open alarms."""
    with open_folder(context) as folder:
        fleet = folder.overview().fleet()
        alarms = folder.telemetry.open_alarms()
        waiting = folder.enrolments.enrolments("waiting", "quarantined")
        running = folder.running
    if context.json:
        document = {name: value for name, value in asdict(fleet).items() if name != "broker"}
        context.print_json(
            {"running": running, **document, "waiting": len(waiting), "alarms": [asdict(each) for each in alarms]}
        )
        return
    click.echo(f"The hub {'is running' if running else 'is not running: appliance hub serve'}.")
    print_table(["Devices", "Count"], _rows(fleet.devices), _COLOURS)
    click.echo(f"Said nothing for {context.settings.unreached_days} days: {fleet.unreached}")
    print_table(["Program version", "Devices"], _rows(fleet.agents))
    print_table(["Hardware class", "Devices"], _rows(fleet.hardware))
    if waiting:
        click.secho(f"{len(waiting)} boxes wait for approval: appliance hub devices waiting", fg="yellow")
    if alarms:
        rows = [[each.device, each.severity, each.name, iso_timestamp(each.since), each.detail] for each in alarms]
        print_table(["Device", "Severity", "Alarm", "Since", "Detail"], rows[:_ALARMS_SHOWN], _COLOURS)
        if len(alarms) > _ALARMS_SHOWN:
            click.echo(f"… and {len(alarms) - _ALARMS_SHOWN} more: --json shows all")


def _rows(counts: Mapping[str, int]) -> list[list[str]]:
    return [[name or "not known", str(count)] for name, count in counts.items()]
