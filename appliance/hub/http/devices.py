"""`/v1/devices`, `/v1/groups` and `/v1/commands`: who there is, what they should be, and what they are told to do."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp

from appliance.hub.command_store import OPEN, SqliteCommands
from appliance.hub.desired import DesiredDocument
from appliance.hub.device_records import DeviceStore, Which
from appliance.hub.http.wire import (
    CommandList,
    CommandRequest,
    CommandResponse,
    DesiredRequest,
    DesiredResponse,
    DeviceChangeRequest,
    DeviceDetailResponse,
    DeviceList,
    DeviceQuery,
    DeviceResponse,
    command_response,
    desired_response,
    device_response,
    event_response,
)
from appliance.hub.telemetry_store import TelemetryStore
from appliance.hub.twin_store import Scope, SqliteTwins
from appliance.web.body import read_json
from appliance.web.query import query_of
from appliance.web.routes import Operation
from appliance.web.wire import convert

NAMES = {"device": "The device's id", "group": "The group's name", "command": "The command's id"}
EVENTS_SHOWN = 20


class DeviceResource:
    """Devices, their desired twins and their commands."""

    def __init__(
        self, devices: DeviceStore, twins: SqliteTwins, commands: SqliteCommands, telemetry: TelemetryStore
    ) -> None:
        self._devices = devices
        self._telemetry = telemetry
        self._twins = twins
        self._commands = commands

    async def list(self, request: Request) -> ASGIApp:
        """Answer with a page of devices."""
        query = query_of(request, DeviceQuery)
        which = Which(status=query.status, group=query.group, hardware=query.hardware)
        found = self._devices.list(which, limit=query.limit + 1, after=query.after)
        page = found[: query.limit]
        data = [device_response(each, self._desired_version(each.id)) for each in page]
        last = page[-1].id if page else None
        return answer(DeviceList(data=data, has_more=len(found) > query.limit, last_id=last))

    async def show(self, request: Request) -> ASGIApp:
        """Answer with all about a device. Raises NotFoundError."""
        device = self._devices.get(request.path_params["device"])
        reported = self._devices.reported(device.id)
        events = self._devices.events(device.id, limit=EVENTS_SHOWN)
        return answer(
            DeviceDetailResponse(
                device=device_response(device, self._desired_version(device.id)),
                reported=None if reported is None else msgspec.to_builtins(reported),
                events=[event_response(each) for each in events],
            )
        )

    async def change(self, request: Request) -> ASGIApp:
        """Set groups and labels. Raises NotFoundError, InvalidRequestError."""
        fields = await read_json(request, lambda document: convert(document, DeviceChangeRequest))
        device = await self._devices.describe(
            request.path_params["device"], groups=fields.groups, labels=fields.labels, actor=actor_of(request)
        )
        return answer(device_response(device, self._desired_version(device.id)))

    async def release(self, request: Request) -> ASGIApp:
        """End a quarantine. Raises NotFoundError, ConflictError."""
        device = await self._devices.release(request.path_params["device"], actor=actor_of(request))
        return answer(device_response(device, self._desired_version(device.id)))

    async def forget(self, request: Request) -> ASGIApp:
        """Remove a device. Raises NotFoundError."""
        device = self._devices.get(request.path_params["device"]).id
        await self._telemetry.forget(device)  # first: whoever is killed in between still finds the device
        await self._devices.forget(device, actor=actor_of(request))
        return Response(status_code=204)

    async def show_desired(self, request: Request) -> ASGIApp:
        """Answer with what a device or a group should be. Raises NotFoundError."""
        return answer(desired_response(self._twins.get(*_scope(request))))

    async def set_desired(self, request: Request) -> ASGIApp:
        """Write what a device or a group should be. Raises NotFoundError, ConflictError, InvalidRequestError."""
        fields = await read_json(request, lambda document: convert(document, DesiredRequest))
        document = DesiredDocument(fields.settings, fields.telemetry, fields.models)
        scope, name = _scope(request)
        twin = await self._twins.set(scope, name, document, expected_version=fields.version, actor=actor_of(request))
        return answer(desired_response(twin))

    async def command(self, request: Request) -> ASGIApp:
        """Send a command, and answer with its result or how it stands. Raises NotFoundError, ConflictError."""
        fields = await read_json(request, lambda document: convert(document, CommandRequest))
        row = await self._commands.give(
            request.path_params["device"],
            fields.name,
            fields.arguments,
            expires_in_s=fields.expires_in_s,
            actor=actor_of(request),
        )
        if fields.wait_s and row.state in OPEN:
            row = await self._commands.result(row.id, timeout_s=fields.wait_s)
        return answer(command_response(row))

    async def commands(self, request: Request) -> ASGIApp:
        """Answer with the commands of a device. Raises NotFoundError."""
        device = self._devices.get(request.path_params["device"])
        return answer(CommandList(data=[command_response(each) for each in self._commands.of_device(device.id)]))

    async def show_command(self, request: Request) -> ASGIApp:
        """Answer with a command. Raises NotFoundError."""
        return answer(command_response(self._commands.get(request.path_params["command"])))

    def _desired_version(self, device: str) -> int:
        current = self._twins.current(device)
        return 0 if current is None else current.version


def device_operations(resource: DeviceResource) -> Sequence[Operation]:
    """Return the routes of devices."""
    device, group, command = ({each: NAMES[each]} for each in ("device", "group", "command"))
    desired = {
        "settings": {"version": 0, "settings": {"log_level": "info"}, "telemetry": {"health": 60}},
        "models": {"version": 0, "models": {"smollm2-135m-instruct": "1"}},
    }
    return (
        Operation(
            method="GET",
            path="/v1/devices",
            operation_id="listDevices",
            summary="List devices",
            handler=resource.list,
            access="read",
            query=DeviceQuery,
            response=DeviceList,
        ),
        Operation(
            method="GET",
            path="/v1/devices/{device}",
            operation_id="showDevice",
            summary="Show a device, what it reported and what happened to it",
            handler=resource.show,
            access="read",
            parameters=device,
            response=DeviceDetailResponse,
            errors=(404,),
        ),
        Operation(
            method="PATCH",
            path="/v1/devices/{device}",
            operation_id="changeDevice",
            summary="Set the groups and labels of a device",
            handler=resource.change,
            access="operate",
            parameters=device,
            request=(DeviceChangeRequest,),
            examples={"groups": {"groups": ["line-3"], "labels": {"hall": "A"}}},
            response=DeviceResponse,
            errors=(404, 409),
        ),
        Operation(
            method="DELETE",
            path="/v1/devices/{device}",
            operation_id="forgetDevice",
            summary="Remove everything about a device",
            handler=resource.forget,
            access="admin",
            parameters=device,
            errors=(404,),
            empty_responses={204: "It is forgotten."},
        ),
        Operation(
            method="POST",
            path="/v1/devices/{device}/release",
            operation_id="releaseDevice",
            summary="End the quarantine of a device whose identity two boxes used",
            handler=resource.release,
            access="operate",
            parameters=device,
            response=DeviceResponse,
            errors=(404, 409),
        ),
        *_desired("device", "/v1/devices/{device}/desired", device, resource, desired),
        Operation(
            method="GET",
            path="/v1/devices/{device}/commands",
            operation_id="listCommands",
            summary="List the commands of a device",
            handler=resource.commands,
            access="read",
            parameters=device,
            response=CommandList,
            errors=(404,),
        ),
        Operation(
            method="POST",
            path="/v1/devices/{device}/commands",
            operation_id="sendCommand",
            summary="Send a command to a device",
            handler=resource.command,
            access="operate",
            parameters=device,
            request=(CommandRequest,),
            examples={"ping": {"name": "ping"}, "log": {"name": "log_tail", "arguments": {"lines": 100}}},
            response=CommandResponse,
            errors=(404, 409),
        ),
        Operation(
            method="GET",
            path="/v1/commands/{command}",
            operation_id="showCommand",
            summary="Show a command and what became of it",
            handler=resource.show_command,
            access="read",
            parameters=command,
            response=CommandResponse,
            errors=(404,),
        ),
        *_desired("group", "/v1/groups/{group}/desired", group, resource, desired),
    )


def _desired(
    what: str, path: str, parameters: dict[str, str], resource: DeviceResource, examples: dict[str, dict[str, object]]
) -> Sequence[Operation]:
    return (
        Operation(
            method="GET",
            path=path,
            operation_id=f"show{what.capitalize()}Desired",
            summary=f"Show what a {what} should be",
            handler=resource.show_desired,
            access="read",
            parameters=parameters,
            response=DesiredResponse,
            errors=(404,),
        ),
        Operation(
            method="PUT",
            path=path,
            operation_id=f"set{what.capitalize()}Desired",
            summary=f"Write what a {what} should be",
            handler=resource.set_desired,
            access="operate",
            parameters=parameters,
            request=(DesiredRequest,),
            examples=examples,
            response=DesiredResponse,
            errors=(404, 409),
        ),
    )


def answer(value: msgspec.Struct) -> Response:
    """Return a JSON answer."""
    return Response(msgspec.json.encode(value), media_type="application/json")


def actor_of(request: Request) -> str:
    """Return who asks, for the audit: the API key, or nobody in particular on an open loopback."""
    tenant: str = request.scope["state"].get("tenant", "")
    return tenant or "http:loopback"


def _scope(request: Request) -> tuple[Scope, str]:
    if "group" in request.path_params:
        return "group", request.path_params["group"]
    return "device", request.path_params["device"]
