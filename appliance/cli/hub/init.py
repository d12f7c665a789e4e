"""`appliance hub init`: make a hub's folder, ready to start."""

from __future__ import annotations

import click

from appliance.cli.options import HubContext, hub_verb_options
from appliance.core.clock import SystemClock


@click.command(
    epilog="Examples: `appliance hub init --name hub.example.org`, "
    "`appliance hub init --data /var/lib/appliance-hub --name 10.0.0.5 --root-keys 3 --root-threshold 2`. "
    "Then start the broker (mosquitto -c FOLDER/broker/mosquitto.conf) and: appliance hub serve",
)
@click.option("--name", required=True, metavar="HOST", help="Host name or address under which boxes reach the broker.")
@click.option("--broker-port", type=click.IntRange(1, 65_535), help="Port of the broker; the setting's if not given.")
@click.option("--root-keys", type=int, default=3, show_default=True, help="Offline keys of the root of trust.")
@click.option("--root-threshold", type=int, default=2, show_default=True, help="How many of them have to sign.")
@click.option("--targets-keys", type=int, default=2, show_default=True, help="Offline keys that sign releases.")
@click.option("--targets-threshold", type=int, default=1, show_default=True, help="How many of them have to sign.")
@click.option(
    "--passphrase",
    envvar="APPLIANCE_KEYS_PASSPHRASE",
    help="Encrypts the offline keys; better from the environment (APPLIANCE_KEYS_PASSPHRASE).",
)
@hub_verb_options
def command(
    context: HubContext,
    *,
    name: str,
    root_keys: int,
    root_threshold: int,
    targets_keys: int,
    targets_threshold: int,
    passphrase: str | None,
) -> None:
    """Make a hub: certificates, signing keys, database, broker configuration.

    Repeating it changes nothing, and finishes what was broken off.
    """
    from appliance.hub.authority import Authority
    from appliance.hub.init import HubDocument, HubFiles, init_hub

    settings = context.settings
    wanted = HubDocument(name, settings.broker_port, root_keys, root_threshold, targets_keys, targets_threshold)
    made = init_hub(settings, wanted, SystemClock(), passphrase=passphrase)
    files = HubFiles.of(settings)
    offline = [str(each) for each in Authority(settings.data_dir, SystemClock()).offline_folders]
    if context.json:
        context.print_json(
            {
                "folder": settings.data_dir,
                "made": made,
                "broker_configuration": files.configuration,
                "authority": files.authority,
                "offline_keys": offline,
            }
        )
        return
    for each in made:
        click.echo(f"Made {each}.")
    if not made:
        click.echo(f"The hub in {settings.data_dir} was complete already; nothing was changed.")
        return
    click.echo(f"\nCarry {' and '.join(offline)} away to media that are kept apart, and delete it here: whoever has")
    click.echo(
        "these keys can sign releases. They are needed again for `appliance hub releases add` and `keys rotate`."
    )
    click.echo(f"\nStart the broker:   mosquitto -c {files.configuration}")
    click.echo(f"Start the hub:      appliance hub serve --data {settings.data_dir}")
    click.echo(f"Then for each box:  appliance hub ca claim claim.json --data {settings.data_dir}")
