"""`appliance hub serve`: run the hub in the foreground."""

from __future__ import annotations

import sys
from typing import Any

import click

from appliance.cli.options import HubContext, hub_verb_options


@click.command(
    epilog="Examples: `appliance hub serve`, `appliance hub serve --data /srv/hub --port 8091`. Ctrl-C stops it."
)
@click.option("--host", help="Address of the operators' HTTP API; other than loopback needs API keys and TLS.")
@click.option("--port", type=int, help="TCP port of the operators' HTTP API; 0 picks a free one.")
@click.option("--broker-host", help="Name or address of the MQTT broker.")
@click.option("--broker-port", type=int, help="Port where the broker takes TLS.")
@click.option("--log-level", help="debug, info, warning or error.")
@click.option("--log-format", help="auto, json or text.")
@click.option("--insecure", is_flag=True, default=None, help="Listen beyond loopback without keys or TLS.")
@hub_verb_options
def command(context: HubContext, **_: Any) -> None:
    """Run the hub until Ctrl-C or SIGTERM."""
    from appliance.hub.room import serve_hub

    sys.exit(serve_hub(context.settings))
