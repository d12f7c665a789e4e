"""`/v1/releases` and `/v1/rollouts`: what can be installed, how it is brought to the fleet, and why it stopped.

A rollout is begun from the command line, beside the signing keys; over HTTP it is watched, paused, gone on with and
ended. A person's step is one transaction, which the running rollout notices.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Annotated

import anyio.to_thread
import msgspec
from msgspec import Meta, Struct
from starlette.requests import Request
from starlette.types import ASGIApp

from appliance.core.clock import Clock
from appliance.hub.http.devices import actor_of, answer
from appliance.hub.release_records import ReleaseStore, SignedRelease
from appliance.hub.rollout_policy import PersonStep, RolloutState
from appliance.hub.rollout_records import Rollout
from appliance.hub.rollout_store import SqliteRollouts
from appliance.web.body import read_json
from appliance.web.routes import Operation
from appliance.web.wire import Text, convert

DEVICES_SHOWN = 100


class ReleaseResponse(Struct, frozen=True, kw_only=True):
    """A signed release; `withdrawn` is when it was withdrawn, Unix seconds, or null."""

    name: str
    model: str
    version: str
    counter: int
    kind: str
    size: int
    withdrawn: float | None
    reason: str


class ReleaseList(Struct, frozen=True, kw_only=True):
    """All releases, withdrawn ones too."""

    data: list[ReleaseResponse]


class RolloutResponse(Struct, frozen=True, kw_only=True):
    """A rollout; `wave` counts from 0 and is -1 before the first, `code` says why it is paused or has failed."""

    id: str
    release: str
    counter: int
    state: RolloutState
    code: str
    wave: int
    attempt: int
    created: float
    actor: str


class RolloutList(Struct, frozen=True, kw_only=True):
    """All rollouts."""

    data: list[RolloutResponse]


class FailedDeviceResponse(Struct, frozen=True, kw_only=True):
    """A device on which a rollout failed, and why."""

    device: str
    wave: int
    reported: str
    code: str
    detail: str


class RolloutStepResponse(Struct, frozen=True, kw_only=True):
    """A step in a rollout's timeline, and why it happened."""

    at: float
    actor: str
    step: str
    reason: str


class RolloutDetailResponse(Struct, frozen=True, kw_only=True):
    """A rollout, how many of its devices are in which state, those that failed, and its timeline."""

    rollout: RolloutResponse
    devices: dict[str, int]
    failed: list[FailedDeviceResponse]
    timeline: list[RolloutStepResponse]


class RolloutStepRequest(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Why, for the timeline."""

    reason: Annotated[Text, Meta(max_length=500)] = ""


class RolloutResource:
    """Releases and rollouts."""

    def __init__(self, releases: ReleaseStore, rollouts: SqliteRollouts, clock: Clock) -> None:
        self._releases = releases
        self._rollouts = rollouts
        self._clock = clock

    async def releases(self, _: Request) -> ASGIApp:
        """Answer with all releases."""
        return answer(ReleaseList(data=[_release(each) for each in self._releases.list()]))

    async def list(self, _: Request) -> ASGIApp:
        """Answer with all rollouts."""
        return answer(RolloutList(data=[_rollout(each) for each in self._rollouts.list()]))

    async def show(self, request: Request) -> ASGIApp:
        """Answer with a rollout and why each step of it happened. Raises NotFoundError."""
        found = self._rollouts.find(request.path_params["rollout"])
        members = self._rollouts.members(found.id)
        failed = [each for each in members if each.state == "failed"][:DEVICES_SHOWN]
        return answer(
            RolloutDetailResponse(
                rollout=_rollout(found),
                devices=dict(Counter(each.state for each in members)),
                failed=[msgspec.convert(each, FailedDeviceResponse, from_attributes=True) for each in failed],
                timeline=[
                    msgspec.convert(each, RolloutStepResponse, from_attributes=True)
                    for each in self._rollouts.timeline(found.id)
                ],
            )
        )

    async def pause(self, request: Request) -> ASGIApp:
        """Give no more devices their job. Raises NotFoundError, ConflictError."""
        return await self._step(request, "pause")

    async def resume(self, request: Request) -> ASGIApp:
        """Go on; what has failed until now is accepted. Raises NotFoundError, ConflictError."""
        return await self._step(request, "resume")

    async def abort(self, request: Request) -> ASGIApp:
        """End it for good; devices in flight are told to stop. Raises NotFoundError, ConflictError."""
        return await self._step(request, "abort")

    async def _step(self, request: Request, step: PersonStep) -> ASGIApp:
        fields = await read_json(request, lambda document: convert(document, RolloutStepRequest), empty=b"{}")
        changed = await anyio.to_thread.run_sync(
            lambda: self._rollouts.change(
                request.path_params["rollout"],
                step,
                actor=actor_of(request),
                now=self._clock.unix(),
                reason=fields.reason,
            )
        )
        return answer(_rollout(changed))


def rollout_operations(resource: RolloutResource) -> Sequence[Operation]:
    """Return the routes of releases and rollouts."""
    parameters = {"rollout": "The rollout's id"}
    steps = (
        ("pause", "Give no more devices of a rollout their job", resource.pause),
        ("resume", "Go on with a rollout that is paused or has failed", resource.resume),
        ("abort", "End a rollout for good", resource.abort),
    )
    return (
        Operation(
            method="GET",
            path="/v1/releases",
            operation_id="listReleases",
            summary="List signed releases",
            handler=resource.releases,
            access="read",
            response=ReleaseList,
        ),
        Operation(
            method="GET",
            path="/v1/rollouts",
            operation_id="listRollouts",
            summary="List rollouts",
            handler=resource.list,
            access="read",
            response=RolloutList,
        ),
        Operation(
            method="GET",
            path="/v1/rollouts/{rollout}",
            operation_id="showRollout",
            summary="Show a rollout, the devices that failed, and why each step happened",
            handler=resource.show,
            access="read",
            parameters=parameters,
            response=RolloutDetailResponse,
            errors=(404,),
        ),
        *(
            Operation(
                method="POST",
                path=f"/v1/rollouts/{{rollout}}/{step}",
                operation_id=f"{step}Rollout",
                summary=summary,
                handler=handler,
                access="operate",
                parameters=parameters,
                request=(RolloutStepRequest,),
                request_optional=True,
                examples={"reason": {"reason": "The canary in hall A looks slow."}},
                response=RolloutResponse,
                errors=(404, 409),
            )
            for step, summary, handler in steps
        ),
    )


def _release(signed: SignedRelease) -> ReleaseResponse:
    release = signed.release
    return ReleaseResponse(
        name=signed.name,
        model=release.model,
        version=release.version,
        counter=release.counter,
        kind=release.kind,
        size=signed.size,
        withdrawn=signed.withdrawn,
        reason=signed.reason,
    )


def _rollout(rollout: Rollout) -> RolloutResponse:
    progress = rollout.progress
    return RolloutResponse(
        id=rollout.id,
        release=rollout.release,
        counter=rollout.counter,
        state=progress.state,
        code=progress.code,
        wave=progress.wave,
        attempt=rollout.attempt,
        created=rollout.created,
        actor=rollout.actor,
    )
