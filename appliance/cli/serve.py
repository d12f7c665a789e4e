"""`appliance serve`: run the appliance in the foreground."""

from __future__ import annotations

import sys
from typing import Any

import click

from appliance.cli.options import Context, verb_options


@click.command(
    epilog="Examples: `appliance serve`, `appliance serve --port 9000 --model my-model:2`. Ctrl-C stops it.",
)
@click.option("--host", help="Address to listen on; other than loopback needs API keys and TLS.")
@click.option("--port", type=int, help="TCP port; 0 picks a free one.")
@click.option("--model", help="Model to load at start, as `name` or `name:version`.")
@click.option("--context-cells", type=int, help="KV cells that all sequences share, in tokens.")
@click.option("--max-sequences", type=int, help="Sequences worked on at once.")
@click.option("--threads", type=int, help="CPU threads of the model; 0 is one per physical core.")
@click.option("--log-level", help="debug, info, warning or error.")
@click.option("--log-format", help="auto, json or text.")
@click.option("--insecure", is_flag=True, default=None, help="Listen beyond loopback without keys or TLS.")
@verb_options
def command(context: Context, **_: Any) -> None:
    """Run the appliance until Ctrl-C or SIGTERM."""
    from appliance.compose import serve

    sys.exit(serve(context.settings, context.effective))
