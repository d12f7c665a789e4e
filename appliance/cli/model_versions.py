"""`appliance models activate | rollback | withdraw | wishes`: which version a model's name means.

A wish is a row in the database, so these verbs need no server; one that runs sees the row and switches by itself.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import closing, contextmanager
from typing import TYPE_CHECKING, Any

import click
import msgspec

from appliance.cli.options import Context, verb_options
from appliance.cli.tables import print_table
from appliance.core.errors import ConflictError, InvalidRequestError

if TYPE_CHECKING:
    from appliance.core.wishes import SelfTestReport, Wish
    from appliance.registry.wishes import Wishes


@click.command(
    epilog="Examples: `appliance models activate my-model:2`; without a trial: "
    "`appliance models activate my-model:2 --soak 0 --no-test`."
)
@click.argument("name")
@click.option("--soak", type=float, default=600.0, show_default=True, help="Seconds of the trial; 0 is none.")
@click.option("--requests", type=int, default=0, help="Requests that the trial must see, too.")
@click.option("--no-test", is_flag=True, help="Do not try it in a process of its own first.")
@verb_options
def activate(context: Context, *, name: str, soak: float, requests: int, no_test: bool) -> None:
    """Let a model's name mean the version NAME:VERSION, on trial at first.

    A server that runs loads it beside the old version and switches without dropping a request. A version that crashes,
    cannot be loaded, fails too often or is too slow is rolled back by itself.
    """
    from appliance.core.releases import Criteria
    from appliance.core.wishes import Soak
    from appliance.security.audit import local_actor

    if not 0 <= soak <= 86_400 * 366 or not 0 <= requests <= 2**31:
        raise InvalidRequestError(
            "A trial takes from 0 seconds to a year, and sees 0 requests or more.", param="soak", code="invalid_value"
        )
    with _wishes(context) as wishes:
        registered = wishes.registered(name)
        report = None
        if not no_test:
            from appliance.serving.self_test import run_self_test

            report = asyncio.run(run_self_test(context.settings, registered, Criteria()))
            _refuse_failed(name, report)
        trial = Soak(seconds=soak, requests=requests, at_most_s=max(soak, Soak().at_most_s)) if soak else None
        wish = wishes.activate(name, origin=local_actor(), soak=trial, criteria=Criteria())
    if context.json:
        context.print_json({"wish": wish_document(wish), "test": report and msgspec.to_builtins(report)})
        return
    if report is not None:
        what = report.detail or f"{report.tokens_per_second:.1f} a second, {report.memory / 2**20:.0f} MiB"
        click.echo(f"{name} passed its test: {what}.".replace("..", "."))
    click.echo(_told(wish))


@click.command(epilog="Example: appliance models rollback my-model")
@click.argument("name")
@click.option("--reason", default="", help="Why, for the record.")
@verb_options
def rollback(context: Context, *, name: str, reason: str) -> None:
    """Let the model NAME mean the version before again."""
    from appliance.security.audit import local_actor

    with _wishes(context) as wishes:
        actor = local_actor()
        wish = wishes.roll_back(name, origin=actor, reason=reason or f"{actor} asked for it.")
    if context.json:
        context.print_json(wish_document(wish))
    else:
        click.echo(_told(wish))


@click.command(epilog="Example: appliance models withdraw my-model")
@click.argument("name")
@verb_options
def withdraw(context: Context, *, name: str) -> None:
    """Forget what was wished for the model NAME: it means its version registered last."""
    from appliance.security.audit import local_actor

    with _wishes(context) as wishes:
        wishes.withdraw(name, origin=local_actor())
    if context.json:
        context.print_json({"withdrawn": name})
    else:
        click.echo(f"{name} means its version registered last.")


@click.command("wishes", epilog="Example: appliance models wishes --json")
@verb_options
def list_wishes(context: Context) -> None:
    """Show which version each model's name should mean, and which one answered last."""
    found: list[Wish] = []
    if context.settings.database_path.exists():
        with _wishes(context) as wishes:
            found = list(wishes.all().values())
    if context.json:
        context.print_json([wish_document(each) for each in found])
    elif not found:
        click.echo("Nothing is wished for: each name means its version registered last.")
    else:
        print_table(
            ["Model", "Wish", "State", "Before", "Answers", "What happened"],
            [
                [each.name, each.version, each.state, each.previous or "", each.serving, each.reason or each.fact]
                for each in found
            ],
            {"confirmed": "green", "rolled_back": "red"},
        )


def wish_document(wish: Wish) -> dict[str, Any]:
    """Return a wish as JSON."""
    return {**msgspec.to_builtins(wish), "meant": wish.meant}


def _refuse_failed(name: str, report: SelfTestReport) -> None:
    if not report.passed:
        raise ConflictError(
            f"{name} failed its test ({report.code}); nothing was changed. {report.detail}",
            advice="Fetch or make it again. If you know better: --no-test",
            code="self_test_failed",
        )


def _told(wish: Wish) -> str:
    if wish.state == "rolled_back":
        meant = f"{wish.name}:{wish.previous}" if wish.previous else "nothing any more"
        return f"{wish.name} means {meant}; {wish.name}:{wish.version} was rolled back: {wish.reason}"
    on_trial = " on trial" if wish.state == "trial" else ""
    return f"{wish.name} means {wish.name}:{wish.version}{on_trial}. A running server switches by itself."


@contextmanager
def _wishes(context: Context) -> Iterator[Wishes]:
    from appliance.registry.versions import open_registry
    from appliance.registry.wishes import Wishes
    from appliance.store.database import Database

    with closing(Database(context.settings.database_path)) as database:
        yield Wishes(database, open_registry(context.settings, database))
