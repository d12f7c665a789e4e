"""`appliance hub simulate`: a fleet of simulated devices against this hub."""

from __future__ import annotations

import click

from appliance.cli.options import HubContext, hub_verb_options

_SHARE = click.FloatRange(0.0, 1.0)


@click.command(
    epilog="Examples: `appliance hub simulate --devices 100`, "
    "`appliance hub simulate --devices 10000 --seconds 600 --failing 0.01 --json`. Ctrl-C stops it; the devices that "
    "it made known to the hub stay known."
)
@click.option("--devices", type=click.IntRange(1, 100_000), default=100, show_default=True, help="How many.")
@click.option("--prefix", default="sim-", show_default=True, help="Their ids begin so.")
@click.option("--seconds", type=click.FloatRange(min=0), default=0.0, help="How long; 0 is until Ctrl-C.")
@click.option("--seed", type=int, default=0, show_default=True, help="Another one picks other devices for each share.")
@click.option(
    "--batch-every", type=click.FloatRange(min=0), default=60.0, show_default=True, help="Seconds; 0 is never."
)
@click.option(
    "--job-seconds", type=click.FloatRange(min=0), default=30.0, show_default=True, help="Length of an update."
)
@click.option("--failing", type=_SHARE, default=0.0, help="Share whose updates fail.")
@click.option("--lost", type=_SHARE, default=0.0, help="Share that vanishes in the middle of an update.")
@click.option("--slow", type=_SHARE, default=0.0, help="Share whose updates take ten times as long.")
@click.option("--duplicating", type=_SHARE, default=0.0, help="Share that sends everything twice.")
@click.option("--broker-host", help="Name or address of the MQTT broker.")
@click.option("--broker-port", type=int, help="Port where the broker takes TLS.")
@hub_verb_options
def command(
    context: HubContext,
    *,
    devices: int,
    prefix: str,
    seconds: float,
    seed: int,
    batch_every: float,
    job_seconds: float,
    failing: float,
    lost: float,
    slow: float,
    duplicating: float,
) -> None:
    """Let thousands of simulated devices talk to a hub that runs.

    They get certificates of the hub's own authority, so it runs where the hub's folder is. Do not point it at a hub
    that real boxes use: simulated devices take part in rollouts.
    """
    from appliance.hub.simulation.figures import SimulationFigures
    from appliance.hub.simulation.run import simulate
    from appliance.hub.simulation.traits import Scenario

    scenario = Scenario(
        seed=seed,
        batch_every_s=batch_every,
        job_s=job_seconds,
        failing=failing,
        lost=lost,
        slow=slow,
        duplicating=duplicating,
    )

    def progress(now: SimulationFigures) -> None:
        click.echo(
            f"{now.connected:,} of {now.devices:,} connected, {now.committed:,} of {now.batches:,} batches committed, "
            f"p99 {now.p99_s:.2f} s{f' - {now.problem}' if now.problem else ''}",
            err=True,
        )

    found = simulate(context.settings, devices, prefix, scenario, seconds=seconds, progress=progress)
    if context.json:
        context.print_json(found)
        return
    click.echo(f"Connected:  {found.connected:,} of {found.devices:,}, {found.connects:,} times in all")
    click.echo(f"Telemetry:  {found.committed:,} of {found.batches:,} batches committed")
    click.echo(f"Round trip: {found.p50_s:.3f} s in the middle, {found.p99_s:.3f} s at the 99th percentile")
    if found.asked:
        click.echo(f"Jobs:       {found.asked:,} devices were given one")
    for state, number in sorted(found.jobs.items()):
        click.echo(f"Updates:    {number:,} {state}")
