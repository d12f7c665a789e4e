"""What a device's state message is worth: news, an old tale, a new installation, or the mark of a clone.

Pure: plain data in, a verdict out. States arrive late, twice, in another order, and from the broker's memory, which may
be older than ours: an epoch that never goes back tells which is newest. Two boxes with one identity give themselves
away in three ways:

    an installation comes back after another one was seen      they were enrolled twice, or one was
    one epoch begins at two times                              a copied disk: both count on from the same number
    a lower epoch begins later than a higher one               a copied disk that was left behind, or an old backup

A new installation by itself is none of these: a box may be set up anew once.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from appliance.core.fleet import DeviceState

Verdict = Literal["news", "old", "moved", "clone"]
"""`news` is to be kept; `old` changes nothing; `moved` is news of a new installation; `clone` is a second box."""


@dataclass(frozen=True, slots=True)
class KnownSession:
    """The newest session of a device that the hub knows of.

    Attributes:
        instance: Of the installation.
        epoch: Of the session.
        at: When it began, by the device's clock.
        status: What was said last in it.
        earlier: Installations before this one, each with its highest epoch.
    """

    instance: str
    epoch: int
    at: float
    status: str
    earlier: Mapping[str, int] = field(default_factory=dict)


def judge(known: KnownSession | None, state: DeviceState, *, retained: bool) -> Verdict:
    """Return what a state is worth.

    Args:
        known: What is known of the device, None for nothing.
        state: What came.
        retained: Whether the broker had kept it, so that it may be old.
    """
    if known is None:
        return "news"
    if state.instance != known.instance:
        return _of_another_installation(known, state)
    if state.epoch > known.epoch:
        return "news"
    if state.epoch < known.epoch:
        left_behind = state.status == "online" and not retained and state.at > known.at
        return "clone" if left_behind else "old"
    if state.status == "online":
        return "clone" if state.at != known.at else "old"
    return "news" if known.status == "online" else "old"


def _of_another_installation(known: KnownSession, state: DeviceState) -> Verdict:
    highest = known.earlier.get(state.instance)
    if highest is None:
        return "moved"
    if state.epoch > highest and state.status == "online":
        return "clone"
    return "old"
