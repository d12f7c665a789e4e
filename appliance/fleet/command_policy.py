"""Which command is carried out, and which refused at the door.

Pure: a command and the time in, a refusal or nothing out.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import msgspec

from appliance.core.fleet import CLOCK_TOLERANCE_S, Command, CommandResult

LONGEST_LIFE_S = 300.0
"""A command is for now: what would still be valid later could be played back after its reply was forgotten."""

SLOW = frozenset({"load", "unload"})
"""Commands that take their time; the others never wait for them."""


def refusal(command: Command, now: float, *, retained: bool, known: Collection[str]) -> CommandResult | None:
    """Return why a command is not carried out, or None.

    Args:
        command: As it came.
        now: Unix seconds by the hub's clock, as far as it is known.
        retained: The broker had kept it, so it is as old as may be.
        known: Names of the commands there are.
    """
    if retained:
        return _refused(command, "retained", "A command that the broker kept is never carried out.")
    if command.expires <= now:
        return _refused(command, "expired", f"It expired {now - command.expires:.0f} s ago.")
    if command.expires > now + LONGEST_LIFE_S + CLOCK_TOLERANCE_S:
        ahead = command.expires - now
        return _refused(command, "expires_too_late", f"It expires in {ahead:.0f} s; {LONGEST_LIFE_S:.0f} are allowed.")
    if command.name not in known:
        return _refused(command, "unknown_command", f"There is no such command; there are: {', '.join(sorted(known))}.")
    return None


def newest_that_fit(lines: Sequence[str], budget: int) -> list[str]:
    """Return as many of the newest lines as fit into so many bytes of JSON, in their order."""
    fitting = 0
    for line in reversed(lines):
        budget -= len(msgspec.json.encode(line)) + 1
        if budget < 0:
            break
        fitting += 1
    return list(lines[len(lines) - fitting :])


def _refused(command: Command, code: str, detail: str) -> CommandResult:
    return CommandResult(command.id, ok=False, code=code, detail=detail)
