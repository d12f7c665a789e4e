"""Releases as the hub's rooms know them, and where they are kept."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from appliance.core.errors import NotFoundError
from appliance.core.releases import Release


@dataclass(frozen=True, slots=True)
class SignedRelease:
    """A release that was signed.

    Attributes:
        release: The document.
        target: Its path in the signed repository.
        length: Bytes of the document.
        digest: SHA-256 of the document.
        withdrawn: Unix seconds, or None while it can be installed.
        reason: Why it was withdrawn.
    """

    release: Release
    target: str
    length: int
    digest: str
    withdrawn: float | None = None
    reason: str = ""

    @property
    def name(self) -> str:
        """Return `model:version`."""
        return f"{self.release.model}:{self.release.version}"

    @property
    def size(self) -> int:
        """Return the bytes of its files together."""
        return sum(each.length for each in self.release.files)


class ReleaseStore(Protocol):
    """Keeps them; every call is one transaction."""

    def list(self) -> Sequence[SignedRelease]:
        """Return all, withdrawn ones too, by model and counter."""
        ...

    def add(self, signed: SignedRelease, actor: str) -> None:
        """Note a release; one that is known already stays as it is."""
        ...

    def withdraw(self, target: str, reason: str, actor: str) -> None:
        """Note that a release can no longer be installed; one that was withdrawn before stays as it is."""
        ...


def find_release(releases: Sequence[SignedRelease], name: str) -> SignedRelease:
    """Return the newest release that can be installed of `model`, `model:version` or `model#counter`.

    Raises:
        NotFoundError: There is none; the message names those there are.
    """
    matching = [
        each
        for each in releases
        if each.withdrawn is None
        and name in (each.release.model, each.name, f"{each.release.model}#{each.release.counter}")
    ]
    if not matching:
        known = ", ".join(f"{each.name} (#{each.release.counter})" for each in releases if each.withdrawn is None)
        raise NotFoundError(
            f"There is no release {name!r:.200}; there are: {known or 'none'}.",
            advice="Sign one with: appliance hub releases add MANIFEST PATH",
            code="release_not_found",
        )
    return max(matching, key=lambda each: each.release.counter)
