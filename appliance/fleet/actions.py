"""What each command of the hub does."""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Callable, Mapping
from typing import Annotated, Any, Literal, Protocol, TypeVar

import msgspec
from msgspec import Meta, Struct

from appliance import __version__
from appliance.core.clock import Clock
from appliance.core.errors import ConflictError, InvalidRequestError
from appliance.fleet.command_policy import newest_that_fit
from appliance.fleet.commands import Action, Done
from appliance.fleet.diagnostics import DiagnosticsSources, diagnostics
from appliance.fleet.reported import is_supervised

LARGEST_TAIL_BYTES = 60_000
"""Of log lines in a reply; they are JSON within JSON, which grows by its quotation marks."""

S = TypeVar("S", bound=Struct)


class ModelMemory(Protocol):
    """The models in memory, of every kind."""

    async def load(self, name: str) -> None:
        """Load a registered model, as a request for it would, and wait until it is ready.

        Raises:
            NotFoundError: There is no such model.
            UnavailableError: It cannot be loaded now.
            ModelFileError: Its file is damaged.
        """
        ...

    async def unload(self, name: str) -> None:
        """Unload a model that nobody uses; one that is not loaded stays so.

        Raises:
            NotFoundError: There is no such model.
            ConflictError: It is in use, or the settings want it loaded.
        """
        ...


class _NoArguments(Struct, forbid_unknown_fields=True):
    """The command takes none."""


class _Model(Struct, forbid_unknown_fields=True):
    model: Annotated[str, Meta(min_length=1, max_length=200)]


class _Tail(Struct, forbid_unknown_fields=True):
    lines: Annotated[int, Meta(ge=1, le=1000)] = 100
    level: Literal["info", "warning", "error"] = "info"


class Actions:
    """Carries out the commands."""

    def __init__(
        self,
        sources: DiagnosticsSources,
        memory: ModelMemory,
        *,
        clock: Clock,
        report_again: Callable[[], None],
        restart: Callable[[], None],
        environment: Mapping[str, str] = os.environ,
    ) -> None:
        """Act on what is given.

        Args:
            sources: What the diagnostics tell.
            memory: Loads and unloads.
            clock: Tells the time of a ping.
            report_again: Has the reported twin sent.
            restart: Begins an orderly end of the process, after which systemd starts it again.
            environment: Tells whether systemd watches over this process.
        """
        self._sources = sources
        self._memory = memory
        self._clock = clock
        self._report_again = report_again
        self._restart = restart
        self._environment = environment

    def by_name(self) -> dict[str, Action]:
        """Return every command."""
        return {
            "ping": self.ping,
            "diagnostics": self.diagnostics,
            "log_tail": self.log_tail,
            "restart": self.restart,
            "load": self.load,
            "unload": self.unload,
            "twin": self.twin,
        }

    async def ping(self, arguments: Mapping[str, Any]) -> Done:
        """Say that this box is there, what time it has, and whether it can serve."""
        _checked(arguments, _NoArguments)
        health = self._sources.health.health()
        return Done(
            {"at": self._clock.unix(), "agent": __version__, "ready": health.ready, "reason": health.reason},
        )

    async def diagnostics(self, arguments: Mapping[str, Any]) -> Done:
        """Pack the bundle."""
        _checked(arguments, _NoArguments)
        return Done(await asyncio.to_thread(diagnostics, self._sources))

    async def log_tail(self, arguments: Mapping[str, Any]) -> Done:
        """Return the newest log lines, as many as fit."""
        wanted = _checked(arguments, _Tail)
        lines = self._sources.log.tail(wanted.lines, least=logging.getLevelNamesMapping()[wanted.level.upper()])
        told = newest_that_fit(lines, LARGEST_TAIL_BYTES)
        return Done({"lines": told, "left_out": len(lines) - len(told)})

    async def restart(self, arguments: Mapping[str, Any]) -> Done:
        """End in order, so that systemd starts the program again."""
        _checked(arguments, _NoArguments)
        if not is_supervised(self._environment):
            raise ConflictError(
                "This program was not started by systemd, so nobody would start it again.",
                advice="Install it as a service with firmware_scripts/install, or restart it by hand.",
                code="not_supervised",
            )
        return Done({"restarting": True}, afterwards=self._restart)

    async def load(self, arguments: Mapping[str, Any]) -> Done:
        """Load a model, so that its first request need not wait."""
        name = _checked(arguments, _Model).model
        await self._memory.load(name)
        return Done({"model": name})

    async def unload(self, arguments: Mapping[str, Any]) -> Done:
        """Give a model's memory back."""
        name = _checked(arguments, _Model).model
        await self._memory.unload(name)
        return Done({"model": name})

    async def twin(self, arguments: Mapping[str, Any]) -> Done:
        """Have the reported twin sent again."""
        _checked(arguments, _NoArguments)
        self._report_again()
        return Done({"reporting": True})


def _checked(arguments: Mapping[str, Any], wanted: type[S]) -> S:
    try:
        return msgspec.convert(dict(arguments), wanted)
    except msgspec.ValidationError as error:
        raise InvalidRequestError(f"The command's arguments do not fit: {error}", code="bad_arguments") from error
