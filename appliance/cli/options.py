"""What the verbs share: the `--data`, `--config` and `--json` options, settings, printing and errors.

Every verb is declared with `@verb_options` and takes a `Context` first; a verb of the hub is declared with
`@hub_verb_options` and takes a `HubContext`:

    @click.command()
    @verb_options
    def command(context: Context) -> None: ...
"""

from __future__ import annotations

import functools
import json
import os
import sys
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import msgspec

from appliance.core.errors import (
    ApplianceError,
    AuthenticationError,
    ConflictError,
    InvalidRequestError,
    NotFoundError,
    SettingsError,
)
from appliance.core.hub_settings import HubSettings, hub_setting_fields, load_hub_settings
from appliance.core.printable import printable
from appliance.core.settings import EffectiveSetting, Settings, load_settings, setting_fields

EXIT_CODES: dict[type[ApplianceError], int] = {
    SettingsError: 2,
    NotFoundError: 3,
    ConflictError: 4,
    InvalidRequestError: 5,
    AuthenticationError: 6,
    ApplianceError: 1,
}
"""Exit code by error class; the nearest base class counts."""


class Printing:
    """How a verb prints for scripts."""

    def print_json(self, value: Any) -> None:
        """Write one JSON document to standard output; what JSON has no form for is written as text."""
        text = msgspec.json.format(msgspec.json.encode(value, enc_hook=_as_text), indent=2).decode()
        click.echo(text)


@dataclass(frozen=True)
class Context(Printing):
    """What a verb needs to know of how it was called."""

    settings: Settings
    effective: list[EffectiveSetting]
    json: bool


@dataclass(frozen=True)
class HubContext(Printing):
    """What a verb of the hub needs to know of how it was called."""

    settings: HubSettings
    effective: list[EffectiveSetting]
    json: bool


def exit_code(error: ApplianceError) -> int:
    """Return the exit code for an error."""
    return next(EXIT_CODES[each] for each in type(error).__mro__ if each in EXIT_CODES)


def report_error(error: ApplianceError, *, as_json: bool) -> None:
    """Write an error to standard error, as a person or a script reads it."""
    if as_json:
        document = {"error": {"code": error.code, "message": error.message, "advice": error.advice}}
        click.echo(json.dumps(document), err=True)
    else:
        click.secho("Error: ", fg="red", bold=True, err=True, nl=False)
        click.echo(printable(str(error)), err=True)


def _as_text(value: object) -> str:
    return str(value).encode("utf-8", "backslashreplace").decode()


Prepare = Callable[[dict[str, Any], Path | None, bool], Context | HubContext]
"""Makes the context of flags, the file with settings, and whether to print JSON."""


def verb_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """Add `--data`, `--config` and `--json`, and turn an ApplianceError into a message and an exit code.

    Keyword arguments of the verb that are names of settings override them as flags.
    """

    def prepare(flags: dict[str, Any], config_file: Path | None, as_json: bool) -> Context:
        settings, effective = load_settings(flags=flags, environment=os.environ, config_file=config_file)
        if os.path.exists(settings.fleet_path):  # noqa: PTH110  (False also where this user may not look)
            from appliance.fleet.overlay import with_hub_settings

            settings, effective = with_hub_settings(settings, effective)
        return Context(settings, effective, as_json)

    decorate = click.option("--data", "data_dir", metavar="FOLDER", help="Folder of databases and models.")
    return decorate(_with_settings(function, prepare, setting_fields(), "APPLIANCE_CONFIG"))


def hub_verb_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """Do for a verb of the hub what `verb_options` does for one of the box."""

    def prepare(flags: dict[str, Any], config_file: Path | None, as_json: bool) -> HubContext:
        return HubContext(*load_hub_settings(flags=flags, environment=os.environ, config_file=config_file), as_json)

    decorate = click.option("--data", "data_dir", metavar="FOLDER", help="Folder of the hub.")
    return decorate(_with_settings(function, prepare, hub_setting_fields(), "APPLIANCE_HUB_CONFIG"))


def _with_settings(
    function: Callable[..., Any], prepare: Prepare, names: Collection[str], config_variable: str
) -> Callable[..., Any]:
    @click.option(
        "--config",
        "config_file",
        metavar="FILE",
        type=click.Path(path_type=Path),
        envvar=config_variable,
        help="TOML file with settings.",
    )
    @click.option("--json", "as_json", is_flag=True, help="Print JSON for scripts.")
    @functools.wraps(function)
    def wrapper(*, data_dir: str | None, config_file: Path | None, as_json: bool, **arguments: Any) -> None:
        flags = {name: arguments.pop(name) for name in names if name in arguments}
        flags["data_dir"] = data_dir
        try:
            function(prepare(flags, config_file, as_json), **arguments)
        except ApplianceError as error:
            report_error(error, as_json=as_json)
            sys.exit(exit_code(error))

    return wrapper
