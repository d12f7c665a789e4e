"""`appliance doctor`: check whether this machine is fit to serve, with advice.

`probes` looks, `judge_machine` and `judge_setup` judge, `examination` makes the round, and this file shows it.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

import click

from appliance.cli.options import Context, verb_options
from appliance.core.printable import printable

if TYPE_CHECKING:
    from appliance.cli.doctor.findings import Finding

_COLOURS = {"ok": "green", "warning": "yellow", "failure": "red"}


@click.command(
    epilog="Exit code 0 when the machine is fit, warnings included; 1 when something would keep it from serving."
)
@verb_options
def command(context: Context) -> None:
    """Check whether this machine is fit to serve as the settings say; changes nothing."""
    from appliance.cli.doctor.examination import Examination

    findings = []
    for finding in Examination(context.settings).findings():
        findings.append(finding)
        if not context.json:
            _print(finding)
    is_fit = all(each.status != "failure" for each in findings)
    if context.json:
        context.print_json({"fit": is_fit, "findings": findings})
    else:
        _print_summary(findings, is_fit=is_fit)
    sys.exit(0 if is_fit else 1)


def _print(finding: Finding) -> None:
    click.secho(f"{finding.status:<8}", fg=_COLOURS[finding.status], nl=False)
    click.echo(f" {finding.name:<12} {printable(finding.found)}")
    if finding.advice:
        click.echo(f"{'':<22}→ {printable(finding.advice)}")


def _print_summary(findings: Sequence[Finding], *, is_fit: bool) -> None:
    counts = Counter(str(each.status) for each in findings)
    figures = f"{counts['ok']} ok, {counts['warning']} to know, {counts['failure']} in the way"
    click.secho(
        f"{'This machine is fit to serve' if is_fit else 'This machine is not fit to serve yet'}: {figures}.",
        bold=True,
    )
