"""What a device believes of signed metadata, as rules without clock, file or network.

A mark is the newest version of a role's metadata that was ever verified, and when that was signed. Marks only rise.
The one exception is the way back after a hub was taken over: if a new root has changed a role's keys so that nothing
signed before can be valid any more, then the role's mark is dropped, or versions that an intruder had driven up to the
largest number would lock out the rightful hub for ever. What is dropped can let nothing old in.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from appliance.core.errors import UntrustedError

ROLES = ("root", "timestamp", "snapshot", "targets")
LARGEST_VERSION = 2**53


@dataclass(frozen=True, slots=True)
class Mark:
    """How far a role has come.

    Attributes:
        version: The newest that was verified.
        issued: Unix seconds at which it was signed, by its own word; 0 if it does not say.
    """

    version: int
    issued: float = 0.0


@dataclass(frozen=True, slots=True)
class RoleKeys:
    """Who may sign for a role, and how many of them have to."""

    ids: frozenset[str]
    threshold: int


NOBODY = RoleKeys(frozenset(), 1)


def check_version(role: str, version: object, marks: Mapping[str, Mark]) -> int:
    """Return a version that is no older than what was seen.

    Raises:
        UntrustedError: It is older, or no version at all.
    """
    if not isinstance(version, int) or isinstance(version, bool) or not 1 <= version <= LARGEST_VERSION:
        raise UntrustedError(
            f"The {role} metadata has {version!r:.40} as its version; 1 to 2^53 are possible.", code="bad_metadata"
        )
    mark = marks.get(role)
    if mark is not None and version < mark.version:
        raise UntrustedError(
            f"The {role} metadata has version {version}, and version {mark.version} was seen before.",
            advice="An old copy of the hub's repository was served, or a backup restored: sign it again at the hub.",
            code="metadata_old",
        )
    return version


def raised(marks: Mapping[str, Mark], role: str, version: int, issued: float) -> dict[str, Mark]:
    """Return the marks with one raised; its time does not go back either."""
    before = marks.get(role, Mark(0))
    return {**marks, role: Mark(max(before.version, version), max(before.issued, issued))}


def merged(stored: Mapping[str, Mark], new: Mapping[str, Mark]) -> dict[str, Mark]:
    """Return the marks of two looks at a repository that overlapped: the later to finish turns nothing back.

    Args:
        stored: What the other one has left.
        new: What this one has found. If it knows a newer root, a role that it has no mark of was dropped on purpose; if
            it knows an older one, it is out of date and counts for nothing.
    """
    newer = new.get("root", Mark(0)).version - stored.get("root", Mark(0)).version
    if newer < 0:
        return dict(stored)
    found = dict(new) if newer else {**stored, **new}
    for role in stored.keys() & new.keys():
        found = raised({**found, role: stored[role]}, role, new[role].version, new[role].issued)
    return found


def is_rotated(old: RoleKeys, new: RoleKeys) -> bool:
    """Tell whether nothing that the old keys alone had signed can be valid under the new ones."""
    return len(old.ids & new.ids) < new.threshold


def after_root(marks: Mapping[str, Mark], old: Mapping[str, RoleKeys], new: Mapping[str, RoleKeys]) -> dict[str, Mark]:
    """Return the marks that still count under a new root; the root's own always does."""
    return {
        role: mark
        for role, mark in marks.items()
        if role == "root" or not is_rotated(old.get(role, NOBODY), new.get(role, NOBODY))
    }


def reference_time(built: float, marks: Mapping[str, Mark], hub: float) -> float:
    """Return the time by which metadata expires, in Unix seconds.

    The device's own clock has no say: at 1970 nothing would ever expire, and ten years ahead everything would have. A
    hub whose clock is behind cannot turn the time back beyond what was verified, and what it says is never kept.
    """
    return max(built, hub, *(mark.issued for mark in marks.values()), 0.0)
