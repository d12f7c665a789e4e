"""What a finding of the doctor is.

A failure means that the appliance could not serve here as it is set up; a warning, that it would serve worse than it
could, or that something is to be known. Nothing but `ok` goes without advice.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class Status(StrEnum):
    """How a finding counts."""

    OK = "ok"
    WARNING = "warning"
    FAILURE = "failure"


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was looked at.

    Attributes:
        name: What was looked at, one word or two.
        found: What was found, with figures.
        advice: What to do about it; empty when all is well.
    """

    name: str
    status: Status
    found: str
    advice: str = ""


def size(count: int) -> str:
    """Return bytes in words, such as `1.5 GB`."""
    return f"{count / 1e9:,.1f} GB" if abs(count) >= 1e9 else f"{count / 1e6:,.0f} MB"
