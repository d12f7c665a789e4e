"""`/v1/models/{model}/version`: which version a model's name means, changed without dropping a request."""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec
from msgspec import Meta
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp

from appliance.core.errors import ConflictError, NotFoundError
from appliance.core.releases import Criteria
from appliance.core.wishes import ModelVersions, Soak, Wish
from appliance.web.body import read_json
from appliance.web.wire import convert, meaning

LONGEST_S = 86_400 * 366


class VersionRequest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The version that a name is to mean."""

    version: (
        Annotated[
            Annotated[str, Meta(min_length=1, max_length=64)], meaning("A registered version; null is the one before")
        ]
        | None
    )
    soak_s: Annotated[
        Annotated[float, Meta(ge=0, le=LONGEST_S)] | None, meaning("Seconds of the trial; 0 is none, null is 600")
    ] = None
    test: Annotated[bool | None, meaning("Try it in a process of its own first; null does")] = None


class VersionResponse(msgspec.Struct, frozen=True, kw_only=True):
    """Wish and fact.

    Attributes:
        model: The short name.
        version: The version wished for.
        previous: The one before, kept for the way back.
        meant: The version that the name means now; null if it means none any more.
        since: Unix seconds of the last change.
        origin: Who wished it.
        serving: The version that answered last, or "".
        fact: What the server found on the way there.
    """

    model: str
    version: str
    previous: str | None
    meant: str | None
    state: Literal["trial", "confirmed", "rolled_back"]
    code: str
    reason: str
    since: float
    origin: str
    serving: str
    fact: str


class Versions:
    """The resource."""

    def __init__(self, versions: ModelVersions) -> None:
        self._versions = versions

    async def show(self, request: Request) -> ASGIApp:
        """Answer with what is wished for a model.

        Raises:
            NotFoundError: Nothing is.
        """
        name = request.path_params["model"]
        wish = self._versions.wish(name)
        if wish is None:
            raise NotFoundError(
                f"Nothing is wished for {name!r:.100}: it means its version registered last.",
                code="no_wish",
                param="model",
            )
        return _json(_response(wish))

    async def change(self, request: Request) -> ASGIApp:
        """Wish for a version, or for the one before, and answer with the wish; the switch follows.

        Raises:
            NotFoundError: There is no such version, or none before.
            ConflictError: Another one is on trial, or this one failed its test; nothing was changed.
        """
        fields = await read_json(request, lambda document: convert(document, VersionRequest))
        name, origin = request.path_params["model"], _caller(request)
        if fields.version is None:
            return _json(
                _response(await self._versions.rollback(name, origin=origin, reason=f"{origin} asked for it."))
            )
        full_name = f"{name}:{fields.version}"
        if fields.test is not False:
            report = await self._versions.test(full_name, Criteria())
            if not report.passed:
                raise ConflictError(
                    f"{full_name} failed its test ({report.code}); nothing was changed. {report.detail}",
                    advice="Fetch or make it again; `test: false` leaves the test out.",
                    code="self_test_failed",
                    param="version",
                )
        seconds = Soak().seconds if fields.soak_s is None else fields.soak_s
        soak = Soak(seconds=seconds, at_most_s=max(seconds, Soak().at_most_s)) if seconds else None
        return _json(_response(await self._versions.activate(full_name, origin=origin, soak=soak, criteria=Criteria())))


def _caller(request: Request) -> str:
    """Return the API key's id; without keys it is whoever reaches the box."""
    return str(request.scope["state"].get("tenant", "")) or "http"


def _response(wish: Wish) -> VersionResponse:
    return VersionResponse(
        model=wish.name,
        version=wish.version,
        previous=wish.previous,
        meant=wish.meant,
        state=wish.state,
        code=wish.code,
        reason=wish.reason,
        since=wish.since,
        origin=wish.origin,
        serving=wish.serving,
        fact=wish.fact,
    )


def _json(response: VersionResponse) -> Response:
    return Response(msgspec.json.encode(response), media_type="application/json")
