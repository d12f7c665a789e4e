"""Which version of a model its short name means: the wish, the trial of a new one, and the fact.

Whoever wants another version (command line, HTTP, the fleet) writes a wish; nothing swaps a model by command. The
serving floor loads the new version beside the old one, switches, and keeps the old for the way back. A version on
trial that brings the process down twice, fails its soak or cannot be loaded is rolled back by the box itself, hub or
no hub.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from appliance.core.releases import Criteria

REQUESTED = "requested"
"""Code of a way back that somebody asked for."""

WishState = Literal["trial", "confirmed", "rolled_back"]


@dataclass(frozen=True, slots=True)
class Soak:
    """How long a version is on trial: `seconds` and at least `requests`, but never longer than `at_most_s`."""

    seconds: float = 600.0
    requests: int = 0
    at_most_s: float = 86_400.0


@dataclass(frozen=True, slots=True)
class Wish:
    """What a name should mean.

    Attributes:
        name: The model's short name.
        version: The version wished for.
        previous: The version before, kept for the way back; None if there was none.
        state: `trial` while it soaks; `rolled_back` says that `version` was tried and `previous` is meant again.
        reason: Why it was rolled back, for a person; "" otherwise.
        code: Stable slug of the reason, for example `crashed`, `soak_errors`, `soak_latency`, `not_loadable`.
        since: Unix seconds of the last change.
        origin: Who wished it: an actor as in the audit, or a job.
        serving: The version that answered last, "" if none has since the wish.
        fact: What the serving process found on the way there, for a person.
    """

    name: str
    version: str
    previous: str | None
    state: WishState
    reason: str
    code: str
    since: float
    origin: str
    serving: str = ""
    fact: str = ""

    @property
    def meant(self) -> str | None:
        """Return the version that the short name means now."""
        return self.previous if self.state == "rolled_back" else self.version


@dataclass(frozen=True, slots=True)
class SelfTestReport:
    """What a self-test in a process of its own found.

    Attributes:
        passed: False if it failed, crashed, hung or took too much.
        code: Stable slug, "" if it passed: `crashed`, `timeout`, `out_of_memory`, `wrong_answer`, `too_slow`, ….
        detail: For a person, with the figures.
        tokens_per_second: Measured, 0 if it came not so far.
        memory: Bytes of the process at its largest.
    """

    passed: bool
    code: str = ""
    detail: str = ""
    tokens_per_second: float = 0.0
    memory: int = 0


class ModelVersions(Protocol):
    """The wishes of a box, and the way to try a version."""

    def wishes(self) -> Sequence[Wish]:
        """Return every wish there is; a name without one means its version registered last."""
        ...

    def wish(self, name: str) -> Wish | None:
        """Return the wish for a name."""
        ...

    async def test(self, full_name: str, criteria: Criteria) -> SelfTestReport:
        """Load a registered version in a child process and hold it against the criteria; it serves nobody meanwhile.

        Raises:
            NotFoundError: It is not registered.
        """
        ...

    async def activate(self, full_name: str, *, origin: str, soak: Soak | None, criteria: Criteria) -> Wish:
        """Write the wish that the version's short name means it from now on; durable when this returns.

        Args:
            full_name: `name:version` of a registered model.
            origin: Who wishes it.
            soak: The trial; None confirms at once.
            criteria: What the soak is held against.

        Raises:
            NotFoundError: It is not registered.
            ConflictError: Another version of it is on trial.
        """
        ...

    async def rollback(self, name: str, *, origin: str, reason: str, code: str = REQUESTED) -> Wish:
        """Write the wish that a name means the version before again; durable when this returns.

        Args:
            name: The model's short name.
            origin: Who wishes it.
            reason: For a person.
            code: The same for programs. Only for another than `REQUESTED` a first version is given up too, so that
                the name means nothing.

        Raises:
            NotFoundError: The name has no wish, or there was no version before.
        """
        ...

    async def settled(self, name: str) -> Wish:
        """Wait until the trial of a name is over and return its wish; whoever waits has a deadline of his own."""
        ...
