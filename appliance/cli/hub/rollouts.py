"""`appliance hub rollouts`: bring a release to the fleet in waves, watch, pause, resume, retry, abort."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import closing, contextmanager
from typing import TYPE_CHECKING, Any

import click

from appliance.cli.options import HubContext, hub_verb_options
from appliance.cli.tables import print_table
from appliance.core.clock import SystemClock, iso_timestamp
from appliance.core.errors import InvalidRequestError, NotFoundError

if TYPE_CHECKING:
    from appliance.hub.rollout_policy import PersonStep
    from appliance.hub.rollout_records import Member, Rollout
    from appliance.hub.rollout_store import SqliteRollouts
    from appliance.store.database import Database

HOUR_S = 3600.0
STYLES = {
    "running": "green",
    "succeeded": "green",
    "completed": "green",
    "paused": "yellow",
    "failed": "red",
    "aborted": "red",
}


@click.group(epilog="Start with: appliance hub rollouts start NAME:VERSION. `appliance hub releases list` shows them.")
def command() -> None:
    """Bring a release to the fleet in waves, watch, pause, resume, abort."""


@command.command(
    epilog="Examples: `appliance hub rollouts start smollm2:2`, `appliance hub rollouts start smollm2:2 --to line-3 "
    "--window 01:00-05:00`, `appliance hub rollouts start smollm2:2 --device box-1 --device box-2 --canary 0.5`."
)
@click.argument("release")
@click.option("--to", "group", default="", metavar="GROUP", help="Devices of a group only.")
@click.option("--device", "devices", multiple=True, help="This device only; may be given more than once.")
@click.option(
    "--canary",
    type=click.FloatRange(0.001, 1.0),
    default=0.01,
    show_default=True,
    help="Share of the devices that go first; two at least, and one of each hardware class.",
)
@click.option("--window", default="", metavar="FROM-TO", help="Hours by each device's local time, such as 01:00-05:00.")
@click.option("--soak-hours", type=click.FloatRange(0, 8760), default=1.0, show_default=True, help="Between waves.")
@click.option(
    "--patience-hours",
    type=click.FloatRange(0.001, 8760),
    default=24.0,
    show_default=True,
    help="A wave that says nothing for so long is doubted.",
)
@click.option(
    "--trial-s", type=click.FloatRange(0, 604_800), default=600.0, show_default=True, help="Trial on the box."
)
@click.option(
    "--mirror", "mirrors", multiple=True, metavar="URL", help="Where boxes may fetch pieces by HTTPS as well."
)
@hub_verb_options
def start(
    context: HubContext,
    *,
    release: str,
    group: str,
    devices: tuple[str, ...],
    canary: float,
    window: str,
    soak_hours: float,
    patience_hours: float,
    trial_s: float,
    mirrors: tuple[str, ...],
) -> None:
    """Begin to bring RELEASE to the devices; the running hub takes it from here."""
    import secrets
    from pathlib import Path

    from appliance.cli.hub.offline import open_authority
    from appliance.hub.release_blobs import ReleaseBlobs
    from appliance.hub.release_store import SqliteReleases
    from appliance.hub.releases import Releases
    from appliance.hub.rollout_policy import Plan, Progress
    from appliance.hub.rollout_records import Audience, Options, Rollout
    from appliance.hub.rollout_window import parse_window
    from appliance.security.audit import local_actor

    if window and parse_window(window) is None:
        raise InvalidRequestError(
            f"{window!r} is no window of hours.", advice="Give one such as 01:00-05:00.", param="window"
        )
    clock = SystemClock()
    with _open(context) as (database, rollouts):
        blobs = ReleaseBlobs(Path(context.settings.data_dir) / "blobs")
        releases = Releases(open_authority(context, ()), blobs, SqliteReleases(database, clock), clock)
        signed = releases.find(release)
        _check_audience(database, group, devices)
        rollout = Rollout(
            id=f"r-{secrets.token_hex(5)}",
            model=signed.release.model,
            release=signed.name,
            target=signed.target,
            length=signed.length,
            digest=signed.digest,
            counter=signed.release.counter,
            audience=Audience(group, devices),
            options=Options(window=window, mirrors=mirrors, trial_s=trial_s),
            plan=Plan(canary_share=canary, soak_s=soak_hours * HOUR_S, patience_s=patience_hours * HOUR_S),
            progress=Progress(),
            attempt=1,
            created=clock.unix(),
            actor=local_actor(),
        )
        rollouts.begin(rollout)
    if context.json:
        context.print_json(_document(rollout))
        return
    click.echo(f"{rollout.id} brings {rollout.release} to the fleet, the canaries first.")
    click.secho(f"Watch it with: appliance hub rollouts show {rollout.id}", err=True, dim=True)


@command.command("list")
@hub_verb_options
def list_all(context: HubContext) -> None:
    """List all rollouts."""
    with _open(context) as (_, rollouts):
        found = rollouts.list()
    if context.json:
        context.print_json([_document(each) for each in found])
    elif not found:
        click.echo("There is no rollout yet. Begin one with: appliance hub rollouts start NAME:VERSION")
    else:
        print_table(
            ["Id", "Release", "State", "Wave", "Begun", "By"],
            [
                [
                    each.id,
                    each.release,
                    each.progress.state,
                    _wave(each),
                    iso_timestamp(each.created),
                    each.actor,
                ]
                for each in found
            ],
            STYLES,
        )


@command.command()
@click.argument("rollout")
@hub_verb_options
def show(context: HubContext, *, rollout: str) -> None:
    """Show how a rollout stands: its waves, the devices that failed, and why each step happened."""
    with _open(context) as (_, rollouts):
        found, members, steps = rollouts.find(rollout), rollouts.members(rollout), rollouts.timeline(rollout)
    if context.json:
        context.print_json(_document(found) | {"devices": members, "timeline": steps})
        return
    click.echo(f"{found.release} is {found.progress.state}, in its {_wave(found)} wave.\n")
    states = ("queued", "sent", "running", "succeeded", "failed", "canceled", "recalling", "recalled")
    print_table(["Wave", *states], [[str(wave), *counts] for wave, counts in _by_wave(members, states)])
    troubled = [each for each in members if each.state == "failed"]
    if troubled:
        click.echo()
        print_table(
            ["Failed", "At", "Code", "Detail"], [[m.device, m.reported, m.code, m.detail] for m in troubled[:50]]
        )
    click.echo()
    print_table(["When", "Who", "Step", "Why"], [[iso_timestamp(s.at), s.actor, s.step, s.reason] for s in steps])


@command.command()
@click.argument("rollout")
@click.option("--reason", default="", help="For the timeline.")
@hub_verb_options
def pause(context: HubContext, *, rollout: str, reason: str) -> None:
    """Give no more devices their job; those that have it go on."""
    _change(context, rollout, "pause", reason)


@command.command()
@click.argument("rollout")
@click.option("--reason", default="", help="For the timeline.")
@hub_verb_options
def resume(context: HubContext, *, rollout: str, reason: str) -> None:
    """Go on with a rollout that is paused or has failed; what has failed until now is accepted."""
    _change(context, rollout, "resume", reason)


@command.command()
@click.argument("rollout")
@click.option("--reason", default="", help="For the timeline.")
@hub_verb_options
def retry(context: HubContext, *, rollout: str, reason: str) -> None:
    """Go on, and have the devices try again that failed or were canceled."""
    _change(context, rollout, "retry", reason)


@command.command()
@click.argument("rollout")
@click.option("--recall", is_flag=True, help="Have the devices that confirmed it go back to the version before.")
@click.option("--reason", default="", help="For the timeline.")
@hub_verb_options
def abort(context: HubContext, *, rollout: str, recall: bool, reason: str) -> None:
    """End a rollout for good: devices in flight are told to stop."""
    _change(context, rollout, "recall" if recall else "abort", reason)


def _change(context: HubContext, rollout: str, step: PersonStep, reason: str) -> None:
    from appliance.security.audit import local_actor

    with _open(context) as (_, rollouts):
        found = rollouts.change(rollout, step, actor=local_actor(), now=SystemClock().unix(), reason=reason)
    if context.json:
        context.print_json(_document(found))
    else:
        click.echo(f"{found.id} ({found.release}) is {found.progress.state}.")


def _check_audience(database: Database, group: str, devices: tuple[str, ...]) -> None:
    """Refuse an audience of nobody, which a mistyped name would be.

    Raises:
        NotFoundError: There is no such device, or no device in the group.
    """
    from appliance.hub.device_records import Which
    from appliance.hub.device_store import SqliteDevices
    from appliance.store.grouped import GroupedWrites

    known = SqliteDevices(database, GroupedWrites(database), SystemClock())
    for each in devices:
        known.get(each)
    if group and not known.list(Which(group=group), limit=1):
        raise NotFoundError(
            f"There is no device in the group {group!r}.", advice="appliance hub devices list shows groups."
        )


@contextmanager
def _open(context: HubContext) -> Iterator[tuple[Database, SqliteRollouts]]:
    from appliance.hub.device_store import SqliteDevices
    from appliance.hub.init import read_hub
    from appliance.hub.rollout_store import SqliteRollouts
    from appliance.hub.rollouts import job_maker
    from appliance.hub.schema import MIGRATIONS
    from appliance.store.database import Database
    from appliance.store.grouped import GroupedWrites

    read_hub(context.settings)  # a mistyped folder is told, and not made
    with closing(Database(context.settings.database_path, migrations=MIGRATIONS)) as database:
        devices = SqliteDevices(database, GroupedWrites(database), SystemClock())
        yield database, SqliteRollouts(database, None, job_maker(devices, SystemClock()))


def _by_wave(members: Any, states: tuple[str, ...]) -> Iterator[tuple[int, list[str]]]:
    counts: dict[int, Counter[str]] = {}
    each: Member
    for each in members:
        counts.setdefault(each.wave, Counter())[each.state] += 1
    for wave, found in sorted(counts.items()):
        yield wave, [str(found[state] or "") for state in states]


def _wave(rollout: Rollout) -> str:
    return "no" if rollout.progress.wave < 0 else f"{rollout.progress.wave + 1} of {rollout.plan.last_wave + 1}"


def _document(rollout: Rollout) -> dict[str, Any]:
    return {
        "id": rollout.id,
        "release": rollout.release,
        "counter": rollout.counter,
        "state": rollout.progress.state,
        "code": rollout.progress.code,
        "wave": rollout.progress.wave,
        "attempt": rollout.attempt,
        "audience": rollout.audience,
        "options": rollout.options,
        "plan": rollout.plan,
        "created": rollout.created,
        "actor": rollout.actor,
    }
