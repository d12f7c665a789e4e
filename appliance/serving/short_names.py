"""Which version answers for a short name now: what is wished for, once that runs, and until then what runs.

A name that nobody wished anything for means its version registered last, and requests have that loaded themselves.
"""

from __future__ import annotations

from appliance.core.errors import NotFoundError
from appliance.registry.known import Known, RegisteredModel
from appliance.registry.versions import Registry


class ShortNames:
    """The short names of one kind of loaded models.

    Attributes:
        answering: The full name of the loaded version that answers, by short name.
        held: Short names whose requests wait for the version that they mean.
    """

    def __init__(self, registry: Registry) -> None:
        """Start with nothing loaded."""
        self._registry = registry
        self.answering: dict[str, str] = {}
        self.held: set[str] = set()

    def resolve(self, name: str) -> RegisteredModel:
        """Return the model or adapter that is to answer for a name; full names and adapters mean what they say.

        Raises:
            NotFoundError: No such model; the message names those that exist.
        """
        known = self._registry.known()
        current = self._current(name, known)
        return known.resolve(name) if current is None else current

    def current(self, name: str) -> RegisteredModel | None:
        """Return the loaded version that answers for a short name with a wish, or None if there is none."""
        return self._current(name, self._registry.known())

    def without_waiting(self, name: str, known: Known | None = None) -> RegisteredModel:
        """As `resolve`, but while a version on trial is not loaded yet, the one before it answers.

        Args:
            name: Short or full.
            known: What the caller has from the registry already.

        Raises:
            NotFoundError: No such model; the message names those that exist.
        """
        known = known or self._registry.known()
        current = self._current(name, known)
        wish = known.wishes.get(name)
        if current is None and wish is not None and wish.state == "trial" and wish.previous and name not in self.held:
            try:
                return known.resolve(f"{name}:{wish.previous}")
            except NotFoundError:
                return known.resolve(name)
        return known.resolve(name) if current is None else current

    def _current(self, name: str, known: Known) -> RegisteredModel | None:
        full_name = self.answering.get(name)
        if full_name is None or name not in known.wishes:
            return None
        try:
            return known.resolve(full_name)
        except NotFoundError:
            del self.answering[name]  # somebody took its row away
            return None

    def meant(self, name: str) -> RegisteredModel | None:
        """Return the version that a short name means, or None if it means none."""
        try:
            return self._registry.resolve(name)
        except NotFoundError:
            return None

    def loaded(self, registered: RegisteredModel) -> None:
        """Let a version answer for its short name if that means it, and no other has to be switched from."""
        is_free = registered.name not in self.answering or registered.name not in self._registry.wishes()
        if is_free and self.meant(registered.name) == registered:
            self.answering[registered.name] = registered.full_name

    def unloaded(self, registered: RegisteredModel) -> None:
        """Let a version answer no more."""
        if self.answering.get(registered.name) == registered.full_name:
            del self.answering[registered.name]
