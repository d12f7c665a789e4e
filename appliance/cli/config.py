"""`appliance config`: every setting with its effective value, where that came from, and what it means."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from appliance.cli.options import Context, verb_options
from appliance.cli.tables import print_table
from appliance.core.printable import printable
from appliance.core.settings import EffectiveSetting


@click.command(
    epilog="Example: appliance config --toml > appliance.toml, then: appliance serve --config appliance.toml"
)
@click.option("--toml", "as_toml", is_flag=True, help="Print a settings file to start from.")
@verb_options
def command(context: Context, *, as_toml: bool) -> None:
    """Show every setting with its effective value and where it came from.

    Flags win over the environment (APPLIANCE_ and the name in capitals), that over the file, that over the default.
    """
    if as_toml:
        if context.json:
            raise click.UsageError("--toml and --json are two forms of the same; choose one.")
        click.echo(settings_file(context.effective), nl=False)
    elif context.json:
        context.print_json(context.effective)
    else:
        print_table(
            ["Setting", "Value", "Origin", "Meaning"],
            [[each.name, _shown(each.value), each.origin, each.meaning] for each in context.effective],
        )


def settings_file(effective: Sequence[EffectiveSetting]) -> str:
    """Return a TOML file with every setting: those that somebody set, and the defaults as comments.

    Reading it back gives the same settings, with the comment marks before the defaults or without.
    """
    lines = [
        "# Settings of the appliance. A line without its # sets what it names; `appliance config` shows the effect."
    ]
    for each in effective:
        mark = "# " if each.origin == "default" else ""
        lines += ["", f"# {printable(each.meaning)}.", f"{mark}{each.name} = {_toml_value(each.value)}"]
    return "\n".join(lines) + "\n"


def _toml_value(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int | float):
        return repr(value)
    # A JSON string is a TOML basic string, but for DEL. No setting is None by choice: an empty path reads as none.
    text = "" if value is None else str(value)
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")


def _shown(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if value is None or value == "":
        return "–"
    return str(value) if isinstance(value, str | Path) else f"{value:g}" if isinstance(value, float) else f"{value}"
