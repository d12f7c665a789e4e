"""The command line, one file a verb.

Verbs are imported only when they are called, so that `appliance --help` is instant.
"""

from __future__ import annotations

import click

from appliance import __version__
from appliance.cli.lazy import LazyGroup

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
    "fleet": "Enrol this box at a hub, import releases from a folder, leave the hub.",
    "hub": "Run a hub for many boxes: enrolment, telemetry, signed model updates.",
}


@click.command(
    cls=LazyGroup,
    package="appliance.cli",
    verbs=VERBS,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="Start with: appliance models pull smollm2-135m-instruct, then: appliance serve",
)
@click.version_option(__version__, "-V", "--version", message="appliance %(version)s")
def appliance() -> None:
    """Turn this box into an AI appliance: chat models behind the OpenAI API."""
