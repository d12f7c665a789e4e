"""Groups of commands that are imported only when they are called, so that `--help` is instant."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from typing import Any

import click


class LazyGroup(click.Group):
    """A group whose commands are the attribute `command` of `<package>.<verb>`, a dash being an underscore there."""

    def __init__(self, *arguments: Any, package: str, verbs: Mapping[str, str], **options: Any) -> None:
        """Make a group of verbs, each with the line that says what it is for, in the order a newcomer needs them."""
        super().__init__(*arguments, **options)
        self._package = package
        self._verbs = verbs

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002
        """Return the verbs in their order."""
        return list(self._verbs)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:  # noqa: ARG002
        """Import the verb's module and return its command, or None if there is no such verb."""
        if cmd_name not in self._verbs:
            return None
        command: click.Command = import_module(f"{self._package}.{cmd_name.replace('-', '_')}").command
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:  # noqa: ARG002
        """Write the verbs from the table, without importing any of them."""
        with formatter.section("Verbs"):
            formatter.write_dl(list(self._verbs.items()))
