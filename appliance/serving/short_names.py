"""Which version answers for a short name now: what is wished for, once that runs, and until then what runs.

A name that nobody wished anything for means its version registered last, and requests have that loaded themselves.
"""

from __future__ import annotations

from appliance.core.errors import NotFoundError
from appliance.registry.versions import RegisteredModel, Registry


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
        current = self.current(name)
        return self._registry.resolve(name) if current is None else current

    def current(self, name: str) -> RegisteredModel | None:
        """Return the loaded version that answers for a short name with a wish, or None if there is none."""
        full_name = self.answering.get(name)
        if full_name is None or name not in self._registry.wishes():
            return None
        try:
            return self._registry.resolve(full_name)
        except NotFoundError:
            del self.answering[name]  # somebody took its row away
            return None

    def without_waiting(self, name: str) -> RegisteredModel:
        """As `resolve`, but while a version on trial is not loaded yet, the one before it answers.

        Raises:
            NotFoundError: No such model; the message names those that exist.
        """
        current = self.current(name)
        wish = self._registry.wishes().get(name)
        if current is None and wish is not None and wish.state == "trial" and wish.previous and name not in self.held:
            try:
                return self._registry.resolve(f"{name}:{wish.previous}")
            except NotFoundError:
                return self._registry.resolve(name)
        return self._registry.resolve(name) if current is None else current

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
