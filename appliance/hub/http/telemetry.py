"""`/v1/devices/{device}/telemetry` and `/v1/alarms`: what devices told."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
from starlette.requests import Request
from starlette.types import ASGIApp

from appliance.hub.device_records import DeviceStore
from appliance.hub.http.devices import NAMES, answer
from appliance.hub.http.wire import AlarmList, AlarmResponse, TelemetryList, TelemetryQuery, TelemetryRowResponse
from appliance.hub.telemetry_store import TelemetryStore
from appliance.web.query import query_of
from appliance.web.routes import Operation


class TelemetryResource:
    """Rows and alarms."""

    def __init__(self, devices: DeviceStore, store: TelemetryStore) -> None:
        self._devices = devices
        self._store = store

    async def rows(self, request: Request) -> ASGIApp:
        """Answer with rows of a device. Raises NotFoundError."""
        query = query_of(request, TelemetryQuery)
        device = self._devices.get(request.path_params["device"])
        rows, before = self._store.rows(
            device=device.id,
            stream=query.stream,
            received_from=query.since,
            received_to=query.until,
            before=query.before,
            limit=query.limit,
        )
        data = [msgspec.convert(each, TelemetryRowResponse, from_attributes=True) for each in rows]
        return answer(TelemetryList(data=data, next_before=before))

    async def alarms(self, _: Request) -> ASGIApp:
        """Answer with the alarms of all devices that are open now."""
        data = [msgspec.convert(each, AlarmResponse, from_attributes=True) for each in self._store.open_alarms()]
        return answer(AlarmList(data=data))


def telemetry_operations(resource: TelemetryResource) -> Sequence[Operation]:
    """Return the routes of telemetry."""
    return (
        Operation(
            method="GET",
            path="/v1/devices/{device}/telemetry",
            operation_id="listTelemetry",
            summary="List what a device told, newest first",
            handler=resource.rows,
            access="read",
            parameters={"device": NAMES["device"]},
            query=TelemetryQuery,
            response=TelemetryList,
            errors=(404,),
        ),
        Operation(
            method="GET",
            path="/v1/alarms",
            operation_id="listAlarms",
            summary="List the alarms that are open now",
            handler=resource.alarms,
            access="read",
            response=AlarmList,
        ),
    )
