"""The command line, one file a verb.

Verbs are imported only when they are called, so that `appliance --help` is instant.
"""

from __future__ import annotations

from importlib import import_module

import click

from appliance import __version__

VERBS = {
    "serve": "Run the appliance: load the model and answer on the OpenAI API.",
    "models": "Find, download, import, check, tune, quantize and remove models.",
    "chat": "Talk to a model in the terminal.",
    "keys": "Create, list and revoke API keys.",
    "config": "Show every setting with its effective value and where it came from.",
    "doctor": "Check whether this machine is fit to serve, with advice.",
    "docs": "Add, list, search, remove and check documents on a running server.",
    "bench": "Measure this box: throughput, latency, memory.",
    "eval": "Measure how well your own documents are found.",
}


class LazyGroup(click.Group):
    """A group whose commands are the attribute `command` of `appliance.cli.<verb>`."""

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002
        """Return the verbs in the order in which a newcomer needs them."""
        return list(VERBS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:  # noqa: ARG002
        """Import the verb's module and return its command, or None if there is no such verb."""
        if cmd_name not in VERBS:
            return None
        command: click.Command = import_module(f"appliance.cli.{cmd_name}").command
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:  # noqa: ARG002
        """Write the verbs from the table, without importing any of them."""
        with formatter.section("Verbs"):
            formatter.write_dl(list(VERBS.items()))


@click.command(
    cls=LazyGroup,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="Start with: appliance models pull smollm2-135m-instruct, then: appliance serve",
)
@click.version_option(__version__, "-V", "--version", message="appliance %(version)s")
def appliance() -> None:
    """Turn this box into an AI appliance: chat models behind the OpenAI API."""
