"""When signed metadata has to be signed again, as a rule without a clock."""

from __future__ import annotations

from typing import Literal

DAY_S = 86_400.0

VALID_S = {"root": 730 * DAY_S, "targets": 365 * DAY_S, "snapshot": 30 * DAY_S, "timestamp": 14 * DAY_S}
"""How long a signature of each role counts. Root and targets are signed by a person, the others by the hub."""

SIGN_AGAIN_AFTER_S = {"snapshot": 15 * DAY_S, "timestamp": DAY_S}

WARNED_S = {"root": 90 * DAY_S, "targets": 60 * DAY_S, "snapshot": 7 * DAY_S, "timestamp": 7 * DAY_S}
"""Time before expiry from which on a person is told."""

CLOCK_TOLERANCE_S = 300.0
LONGEST_GAP_S = 365 * DAY_S

Due = Literal["no", "yes", "clock_behind", "clock_ahead"]


def due(role: str, now: float, issued: float) -> Due:
    """Tell whether the hub should sign a role again by itself.

    A clock that is behind what was signed before, or more than a year ahead of it, is wrong, or was: what is signed by
    it would lock the devices out, for they never let their time go back. Then a person has to look.

    Args:
        role: `snapshot` or `timestamp`.
        now: Unix seconds by the hub's clock.
        issued: When the role was signed last.
    """
    age = now - issued
    if age < -CLOCK_TOLERANCE_S:
        return "clock_behind"
    if age > LONGEST_GAP_S:
        return "clock_ahead"
    return "yes" if age >= SIGN_AGAIN_AFTER_S[role] else "no"


def state(role: str, now: float, expires: float) -> Literal["valid", "soon", "expired"]:
    """Tell how a role stands."""
    if now >= expires:
        return "expired"
    return "soon" if expires - now < WARNED_S[role] else "valid"


def is_driven_up(version: int) -> bool:
    """Tell whether nobody honest can have counted so far: an intruder raised the version to lock out the next one."""
    return version > 2**32


def next_version(version: int, *, restart: bool, at_least: int = 0) -> int:
    """Return the version to sign next.

    Args:
        version: Of what is there.
        at_least: When a person signs: the Unix seconds, so that a hub that was restored from a backup is ahead of every
            version that devices may have seen of it since.
        restart: The role gets only new keys in the same root, so devices begin to count it anew: then a number that an
            intruder has driven up is left behind.
    """
    return max(1 if restart and is_driven_up(version) else version + 1, at_least)
