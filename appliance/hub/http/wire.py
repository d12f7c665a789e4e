"""What operators send and get."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from msgspec import Meta, Struct

from appliance.core.fleet import Stream
from appliance.hub.command_store import CommandRow
from appliance.hub.device_records import Device, DeviceEvent
from appliance.hub.twin_store import Twin
from appliance.web.wire import Text, meaning

Status = Literal["unreached", "online", "lost", "stopping", "quarantined"]
Limit = Annotated[int, Meta(ge=1, le=1000)]
Short = Annotated[Text, Meta(max_length=128)]


class DeviceResponse(Struct, frozen=True, kw_only=True):
    """A device.

    Attributes:
        created: Unix seconds, as are `seen`, `quarantined` and `reported_at`.
    """

    id: str
    created: float
    status: Status
    quarantined: float | None
    seen: float | None
    agent: str
    hardware: str
    epoch: int
    desired_version: int
    applied_version: int
    reported_at: float | None
    groups: list[str]
    labels: dict[str, str]


class DeviceList(Struct, frozen=True, kw_only=True):
    """A page of devices, in the order of their ids; `last_id` is the `after` of the next page."""

    data: list[DeviceResponse]
    has_more: bool
    last_id: str | None


class EventResponse(Struct, frozen=True, kw_only=True):
    """What an operator should know of a device."""

    at: float
    kind: str
    detail: str


class DeviceDetailResponse(Struct, frozen=True, kw_only=True):
    """A device with what it reported last, and what happened to it, newest first."""

    device: DeviceResponse
    reported: dict[str, Any] | None
    events: list[EventResponse]


class DeviceQuery(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Which devices."""

    status: Annotated[Status | None, meaning("Its status")] = None
    group: Annotated[Short | None, meaning("A group it is in")] = None
    hardware: Annotated[Short | None, meaning("Its hardware class")] = None
    limit: Annotated[Limit, meaning("Most entries of the page")] = 100
    after: Annotated[Short, meaning("Id of the last entry of the page before")] = ""


class DeviceChangeRequest(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Groups and labels; what is left out stays, and a label that is null is removed."""

    groups: Annotated[list[Short], Meta(max_length=32)] | None = None
    labels: dict[Short, Short | None] = {}


class DesiredRequest(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a device or a group should be, always whole.

    Attributes:
        version: That was read before, 0 for none: a change that somebody made meanwhile is not overwritten.
        settings: Values by name.
        telemetry: Seconds between rows by stream; 0 is off.
        models: The version that each model's name should mean.
    """

    version: Annotated[int, Meta(ge=0, le=2**53)]
    settings: dict[str, Any] = {}
    telemetry: dict[str, float] = {}
    models: dict[str, str] = {}


class DesiredResponse(Struct, frozen=True, kw_only=True):
    """What operators wrote of a device or a group."""

    scope: Literal["device", "group"]
    name: str
    version: int
    settings: dict[str, Any]
    telemetry: dict[str, float]
    models: dict[str, str]
    changed: float
    actor: str


class CommandRequest(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A command, and how long to wait for its result; a device that is away gets it when it is back in time.

    Attributes:
        name: `ping`, `diagnostics`, `log_tail`, `restart`, `load`, `unload` or `twin`.
        arguments: As the command wants them.
        expires_in_s: After which the device refuses it.
        wait_s: How long the answer may take; 0 answers at once.
    """

    name: Annotated[Text, Meta(max_length=64)]
    arguments: dict[str, Any] = {}
    expires_in_s: Annotated[float, Meta(ge=1, le=300)] = 60.0
    wait_s: Annotated[float, Meta(ge=0, le=300)] = 0.0


class CommandResponse(Struct, frozen=True, kw_only=True):
    """A command and what became of it."""

    id: str
    device: str
    name: str
    arguments: dict[str, Any]
    actor: str
    created: float
    expires: float
    state: Literal["waiting", "sent", "done", "failed", "expired"]
    finished: float | None
    result: dict[str, Any]
    code: str
    detail: str


class CommandList(Struct, frozen=True, kw_only=True):
    """The commands of a device, newest first."""

    data: list[CommandResponse]


class TelemetryQuery(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Which rows, those that came last first."""

    stream: Annotated[Stream | None, meaning("Its class")] = None
    since: Annotated[float, Meta(ge=0, le=1e11), meaning("Came at this time or later, Unix seconds")] = 0.0
    until: Annotated[float, Meta(ge=0, le=1e11), meaning("Came before this time, Unix seconds")] = 1e11
    limit: Annotated[Limit, meaning("Most entries of the page")] = 100
    before: Annotated[
        Annotated[int, Meta(ge=0, le=2**53)] | None, meaning("What the page before gave as `next_before`")
    ] = None


class TelemetryRowResponse(Struct, frozen=True, kw_only=True):
    """What a device told.

    Attributes:
        at: Unix seconds by the device's clock, which may be wrong.
        received: Unix seconds by the hub's clock.
    """

    stream: Stream
    boot: int
    sequence: int
    at: float
    received: float
    kind: str
    body: dict[str, Any]


class TelemetryList(Struct, frozen=True, kw_only=True):
    """A page of rows; `next_before` is the `before` of the next page, null at the end."""

    data: list[TelemetryRowResponse]
    next_before: int | None


class AlarmResponse(Struct, frozen=True, kw_only=True):
    """An alarm that a device has raised and not cleared."""

    device: str
    name: str
    since: float
    severity: str
    detail: str


class AlarmList(Struct, frozen=True, kw_only=True):
    """The alarms that are open now."""

    data: list[AlarmResponse]


class FleetResponse(Struct, frozen=True, kw_only=True):
    """The fleet at a glance.

    Attributes:
        devices: How many by status.
        unreached: How many said nothing for `unreached_days`.
        agents: How many by version of the program.
        hardware: How many by hardware class.
        broker: Whether the hub is connected to it.
    """

    devices: dict[str, int]
    unreached: int
    agents: dict[str, int]
    hardware: dict[str, int]
    broker: bool


def device_response(device: Device, desired_version: int) -> DeviceResponse:
    """Return a device as operators get it."""
    return DeviceResponse(
        id=device.id,
        created=device.created,
        status=device.status if device.quarantined is None else "quarantined",
        quarantined=device.quarantined,
        seen=device.seen,
        agent=device.agent,
        hardware=device.hardware,
        epoch=device.epoch,
        desired_version=desired_version,
        applied_version=device.desired_version,
        reported_at=device.reported_at,
        groups=list(device.groups),
        labels=dict(device.labels),
    )


def event_response(event: DeviceEvent) -> EventResponse:
    """Return an event as operators get it."""
    return EventResponse(at=event.at, kind=event.kind, detail=event.detail)


def desired_response(twin: Twin) -> DesiredResponse:
    """Return what was written of a device or a group."""
    return DesiredResponse(
        scope=twin.scope,
        name=twin.name,
        version=twin.version,
        settings=twin.document.settings,
        telemetry=twin.document.telemetry,
        models=twin.document.models,
        changed=twin.changed,
        actor=twin.actor,
    )


def command_response(row: CommandRow) -> CommandResponse:
    """Return a command as operators get it."""
    return CommandResponse(
        id=row.id,
        device=row.device,
        name=row.name,
        arguments=row.arguments,
        actor=row.actor,
        created=row.created,
        expires=row.expires,
        state=row.state,
        finished=row.finished,
        result=row.result,
        code=row.code,
        detail=row.detail,
    )
