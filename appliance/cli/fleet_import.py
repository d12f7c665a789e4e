"""`appliance fleet import`: bring a signed release to this box in a folder, where no hub can be reached."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import msgspec

from appliance.cli.options import Context, verb_options
from appliance.core.clock import SystemClock
from appliance.core.errors import (
    DeadlineExceededError,
    InvalidRequestError,
    NotFoundError,
    SourceError,
    UnavailableError,
)

if TYPE_CHECKING:
    from appliance.core.settings import Settings
    from appliance.fleet.import_desk import ImportAnswer, ImportDesk

LOOK_S = 0.2
GRACE_S = 15.0
"""For the server to say what became of an import whose time is over."""


@click.command(
    "import",
    epilog="Example: `appliance fleet import /media/stick`. `appliance hub releases export` fills the stick.",
)
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--model", "wanted", help="The model to install, if the folder has releases of several.")
@click.option("--force", is_flag=True, help="Try a release again that was rolled back on this box.")
@click.option(
    "--wait",
    "wait_s",
    type=click.FloatRange(1, 7 * 86_400),
    default=3600.0,
    show_default=True,
    help="Seconds in which the release has to be on trial; after that nothing is installed.",
)
@verb_options
def import_folder(context: Context, *, folder: Path, wanted: str | None, force: bool, wait_s: float) -> None:
    """Install the newest signed release that FOLDER has; the running server checks it like one that the hub sends."""
    from appliance.fleet.import_desk import ImportDesk, ImportRequest

    settings = context.settings
    _check(settings, folder)
    desk = ImportDesk(settings.fleet_imports_dir)
    expires = SystemClock().unix() + wait_s
    try:
        request = msgspec.convert(
            {"folder": str(folder.resolve()), "model": wanted, "expires": expires, "force": force}, ImportRequest
        )
    except msgspec.ValidationError as error:
        raise InvalidRequestError(f"That cannot be imported: {error}.", param="model") from error
    name = desk.hand_in(request)
    answer = _followed(context, desk, name, wait_s)
    desk.clear(name)
    _tell(context, answer)


def _check(settings: Settings, folder: Path) -> None:
    """Refuse what no server could do.

    Raises:
        NotFoundError: This box was never enrolled, or there is no such folder.
        UnavailableError: No server speaks for this box.
    """
    from appliance.fleet.identity import IdentityFolder
    from appliance.store.ownership import is_owned

    if IdentityFolder(settings.fleet_dir).identity() is None:
        raise NotFoundError(
            "This box is not enrolled at a hub, so it does not know whose signature to believe.",
            advice="Enrol it once: appliance fleet enrol BUNDLE. After that it needs no connection.",
            code="not_enrolled",
        )
    if not folder.is_dir():
        raise NotFoundError(f"{folder} is no folder.", advice="Is the stick mounted?")
    if not is_owned(settings.fleet_lock_path):
        raise UnavailableError(
            "No server that speaks for this box runs on this data folder; it is the server that installs.",
            advice='Start it with `appliance serve`, and not with fleet = "off"; it needs no hub to import.',
            code="fleet_not_served",
        )


def _followed(context: Context, desk: ImportDesk, name: str, wait_s: float) -> ImportAnswer:
    """Wait until it is over and return the last answer.

    Raises:
        UnavailableError: The server ended meanwhile.
        DeadlineExceededError: It did not answer in time.
    """
    from appliance.store.ownership import is_owned

    deadline, told = time.monotonic() + wait_s + GRACE_S, ""
    while True:
        answer = desk.answer(name)
        if answer is not None and answer.over:
            return answer
        if answer is not None and (line := _line(answer)) != told:
            told = line
            if not context.json:
                click.echo(told, err=True)
        if time.monotonic() >= deadline:
            desk.clear(name)
            raise DeadlineExceededError(
                f"The release was not on trial within {wait_s:g} s. {told}".strip(),
                advice="Repeat it with a longer --wait: what is here of the files stays.",
            )
        if not is_owned(context.settings.fleet_lock_path):
            raise UnavailableError(
                f"The server ended before the release was on trial. {told}".strip(),
                advice="Start it again: it goes on where it was, and `appliance models wishes` shows what came of it.",
                code="fleet_not_served",
            )
        time.sleep(LOOK_S)


def _line(answer: ImportAnswer) -> str:
    trouble = f"; {answer.code}: {answer.detail}" if answer.code else ""
    return f"{answer.state or 'waiting'}, {answer.percent} %{trouble}"


def _tell(context: Context, answer: ImportAnswer) -> None:
    if not answer.installed:
        state = f"It is {answer.state}: " if answer.state else ""
        raise SourceError(
            f"Nothing was installed. {state}{answer.detail}", advice=answer.advice, code=answer.code or None
        )
    if context.json:
        context.print_json(_document(answer))
    elif answer.state == "trial":
        click.echo(f"{answer.model} means {answer.model}:{answer.version} on trial.")
        click.echo("The box confirms it or goes back by itself: appliance models wishes", err=True)
    else:
        click.echo(answer.detail or f"{answer.model} means {answer.model}:{answer.version}.")


def _document(answer: ImportAnswer) -> dict[str, Any]:
    return {key: getattr(answer, key) for key in ("state", "model", "version", "percent", "detail")}
