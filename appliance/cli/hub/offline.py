"""What verbs that sign with offline keys share: `--keys`, and the passphrase."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from appliance.cli.options import HubContext
from appliance.core.errors import UntrustedError

if TYPE_CHECKING:
    from appliance.hub.authority import Authority

T = TypeVar("T")

VARIABLE = "APPLIANCE_KEYS_PASSPHRASE"

keys_option = click.option(
    "--keys",
    "keys_folders",
    multiple=True,
    metavar="FOLDER",
    type=click.Path(path_type=Path),
    help="Folder with offline keys, such as a memory stick; may be given more than once. Without it the one that "
    "`hub init` made is looked at.",
)


def open_authority(context: HubContext, folders: Sequence[Path], passphrase: str | None = None) -> Authority:
    """Return who signs for the hub's folder; nothing is read yet."""
    from appliance.core.clock import SystemClock
    from appliance.hub.authority import Authority

    secret = passphrase or os.environ.get(VARIABLE) or None
    return Authority(Path(context.settings.data_dir), SystemClock(), offline=folders, passphrase=secret)


def signing(context: HubContext, folders: Sequence[Path], act: Callable[[Authority], T]) -> T:
    """Return what `act` returns; if the keys are encrypted, and a person is there, their passphrase is asked for.

    Raises:
        ApplianceError: As `act` raises.
    """
    try:
        return act(open_authority(context, folders))
    except UntrustedError as error:
        if error.code != "passphrase_needed" or not sys.stdin.isatty():
            raise
    passphrase: Any = click.prompt("Passphrase of the offline keys", hide_input=True, err=True)
    return act(open_authority(context, folders, str(passphrase)))
