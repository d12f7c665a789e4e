"""The wishes of a box: which version a model's short name means, and how its trial goes.

Whatever changes a wish does so in one transaction with its audit row, in whichever process it happens. Every process
that shares the data folder sees it at its next question (`Registry.resolve`); the one that serves brings the facts to
it, and notes them beside it.
"""

from __future__ import annotations

from collections.abc import Mapping

from appliance.core.clock import Clock, SystemClock
from appliance.core.errors import ConflictError, NotFoundError
from appliance.core.releases import Criteria
from appliance.core.wishes import REQUESTED, Soak, Wish
from appliance.registry import trial as policy
from appliance.registry.known import RegisteredModel
from appliance.registry.trial import Trial
from appliance.registry.versions import Registry
from appliance.registry.wish_rows import (
    Terms,
    count_boots,
    delete_wish,
    find_terms,
    find_trial,
    find_wish,
    note_fact,
    put_wish,
    select_wishes,
    update_trial,
)
from appliance.security.audit import record
from appliance.store.database import Connection, Database

GUARD = "box"
"""The actor of what the box decides by itself."""


class Wishes:
    """The table `wishes`."""

    def __init__(self, database: Database, registry: Registry, clock: Clock | None = None) -> None:
        """Keep the wishes for the models of a registry, in its database."""
        self._database = database
        self._registry = registry
        self._clock = clock or SystemClock()

    def all(self) -> Mapping[str, Wish]:
        """Return every wish by its name."""
        return self._registry.wishes()

    def find(self, name: str) -> Wish | None:
        """Return the wish for a name."""
        return self.all().get(name)

    def terms(self, name: str) -> Terms | None:
        """Return what the trial of a name is held against."""
        return self._database.read(lambda connection: find_terms(connection, name))

    # What people, the fleet and the box want

    def activate(self, full_name: str, *, origin: str, soak: Soak | None, criteria: Criteria | None = None) -> Wish:
        """Wish that a version's short name means it; see `core.wishes.ModelVersions.activate`."""
        model = self.registered(full_name)

        def change(connection: Connection) -> Wish:
            current = find_trial(connection, model.name)
            before = _registered_before(connection, model) if current is None else None
            wanted = policy.activate(model.name, current, model.version, before, confirmed=soak is None)
            if wanted == current:
                return _wish(connection, model.name)
            terms = Terms(soak or Soak(), criteria or Criteria())
            put_wish(connection, model.name, wanted, terms, origin=origin, since=self._clock.unix())
            detail = {"version": wanted.version, "previous": wanted.previous, "state": wanted.state}
            record(connection, origin, "wish.activate", model.name, detail)
            return _wish(connection, model.name)

        return self._database.write_blocking(change)

    def roll_back(
        self, name: str, *, reason: str, origin: str = GUARD, code: str = REQUESTED, version: str = ""
    ) -> Wish:
        """Wish for the version before again. What was rolled back already stays as it is.

        Args:
            name: The model's short name.
            reason: For a person.
            origin: Who wishes it.
            code: The reason for programs.
            version: Only if this one is wished for still, unless it is "".

        Raises:
            NotFoundError: There is no wish; or somebody asks, and there was no version before.
        """

        def change(connection: Connection) -> Wish:
            current = self._known(connection, name)
            if version not in ("", current.version):
                return _wish(connection, name)
            if current.previous is None and code == REQUESTED and current.state != "rolled_back":
                raise NotFoundError(
                    f"There was no version of {name} before {current.version}; nothing was changed.",
                    advice=f"Pull or import another one, then: appliance models activate {name}:VERSION",
                    code="no_previous_version",
                )
            wanted = policy.roll_back(current, code, reason)
            return self._put(connection, name, (current, wanted), origin=origin, action="wish.roll_back")

        return self._database.write_blocking(change)

    def confirm(self, name: str, version: str, *, origin: str = GUARD) -> Wish:
        """End the trial of a version well; if another is wished for meanwhile, nothing is changed.

        Raises:
            NotFoundError: There is no wish.
        """

        def change(connection: Connection) -> Wish:
            current = self._known(connection, name)
            wanted = policy.confirm(current) if current.version == version else current
            return self._put(connection, name, (current, wanted), origin=origin, action="wish.confirm")

        return self._database.write_blocking(change)

    def withdraw(self, name: str, *, origin: str) -> None:
        """Forget the wish: the name means its version registered last.

        Raises:
            NotFoundError: There is no wish.
            ConflictError: Its version is on trial.
        """

        def change(connection: Connection) -> None:
            if self._known(connection, name).state == "trial":
                raise ConflictError(
                    f"{name} has a version on trial; nothing was changed.",
                    advice=f"Wait until it is over, or end it: appliance models rollback {name}",
                    code="trial_in_progress",
                )
            delete_wish(connection, name)
            record(connection, origin, "wish.withdraw", name)

        self._database.write_blocking(change)

    # What the serving process finds

    def begin_boot(self) -> list[Wish]:
        """Count the start of a server against every trial; return the wishes that this rolled back."""

        def change(connection: Connection) -> list[Wish]:
            gone_back = []
            for name, current in _trials(connection).items():
                counted = policy.boot(current)
                if counted.state == "rolled_back":
                    put = self._put(connection, name, (current, counted), origin=GUARD, action="wish.roll_back")
                    gone_back.append(put)
                else:
                    count_boots(connection, name, counted.boots)
                    record(connection, GUARD, "wish.boot", name, {"version": current.version, "boots": counted.boots})
            return gone_back

        return self._database.write_blocking(change)

    def end_boot(self) -> None:
        """Hold the start of this server, which stops in order, against nobody."""

        def change(connection: Connection) -> None:
            for name, current in _trials(connection).items():
                left = policy.stopped_in_order(current)
                if left != current:
                    count_boots(connection, name, left.boots)
                    record(connection, GUARD, "wish.stop", name, {"version": current.version, "boots": left.boots})

        if any(each.state == "trial" for each in self.all().values()):
            self._database.write_blocking(change)

    def note(self, name: str, serving: str, fact: str, baseline: float | None = None) -> None:
        """Note which version answers for a name, and what a person should know of it; without a wish there is no row.

        Args:
            name: The model's short name.
            serving: Its version that answers, or "" for none.
            fact: For a person, with the figures.
            baseline: See `Terms`.
        """
        wish = self.find(name)
        if wish is None or ((wish.serving, wish.fact) == (serving, fact) and baseline is None):
            return

        def change(connection: Connection) -> None:
            note_fact(connection, name, serving, fact, baseline)
            record(connection, GUARD, "wish.note", name, {"serving": serving, "fact": fact})

        self._database.write_blocking(change)

    def registered(self, full_name: str) -> RegisteredModel:
        """Return the model, not an adapter, that is registered under just this full name.

        Raises:
            NotFoundError: There is none.
        """
        for model in self._registry.list():
            if model.full_name == full_name and not model.adapter:
                return model
        known = ", ".join(each.full_name for each in self._registry.list() if not each.adapter) or "none"
        raise NotFoundError(
            f"There is no version {full_name!r:.200}; there are: {known:.1000}.",
            advice="Name it in full, as NAME:VERSION; `appliance models list` shows them.",
            code="model_not_found",
            param="model",
        )

    def _known(self, connection: Connection, name: str) -> Trial:
        current = find_trial(connection, name)
        if current is None:
            raise NotFoundError(
                f"Nothing is wished for {name!r:.100}: it means its version registered last.",
                advice=f"Say which one it should mean: appliance models activate {name:.100}:VERSION",
                code="no_wish",
                param="model",
            )
        return current

    def _put(self, connection: Connection, name: str, change: tuple[Trial, Trial], *, origin: str, action: str) -> Wish:
        current, wanted = change
        if wanted != current:
            update_trial(connection, name, wanted, self._clock.unix())
            detail = {"version": wanted.version, "meant": wanted.meant, "code": wanted.code, "reason": wanted.reason}
            record(connection, origin, action, name, detail)
        return _wish(connection, name)


def _wish(connection: Connection, name: str) -> Wish:
    wish = find_wish(connection, name)
    assert wish is not None, "it was found or written in this transaction"
    return wish


def _trials(connection: Connection) -> dict[str, Trial]:
    found = {name: find_trial(connection, name) for name in select_wishes(connection)}
    return {name: each for name, each in found.items() if each is not None and each.state == "trial"}


def _registered_before(connection: Connection, model: RegisteredModel) -> str | None:
    """Return the version that a name without a wish meant, or meant before this one was registered."""
    query = "SELECT version FROM models WHERE name = ? AND version != ? ORDER BY id DESC LIMIT 1"
    row = connection.execute(query, (model.name, model.version)).fetchone()
    return None if row is None else str(row["version"])
