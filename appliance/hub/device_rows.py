"""Rows of devices, for every table that has to do with them, inside the caller's transaction."""

from __future__ import annotations

from appliance.core.errors import NotFoundError
from appliance.hub.device_records import Device
from appliance.store.database import Connection, Row


def expect_device(connection: Connection, device: str, now: float) -> None:
    """Note a device inside the caller's transaction; one that is known stays as it is."""
    made = connection.execute(
        "INSERT OR IGNORE INTO devices (id, created, status, instance, epoch, began, confirmed, agent) "
        "VALUES (?, ?, 'unreached', '', 0, 0, ?, '')",
        (device, now, now),
    ).rowcount
    if made:
        connection.execute("DELETE FROM forgotten_devices WHERE id = ?", (device,))


def is_forgotten(connection: Connection, device: str) -> bool:
    """Return whether the broker may still keep messages of a device that was forgotten."""
    return connection.execute("SELECT 1 FROM forgotten_devices WHERE id = ?", (device,)).fetchone() is not None


def get_device(connection: Connection, device: str) -> Device:
    """Return a device inside the caller's transaction.

    Raises:
        NotFoundError: There is none of that id.
    """
    found = find_device(connection, device)
    if found is None:
        raise NotFoundError(
            f"There is no device {device!r}.", advice="`appliance hub devices list` shows them all.", param="device"
        )
    return found


def find_device(connection: Connection, device: str) -> Device | None:
    """Return a device, or None."""
    row = connection.execute("SELECT * FROM devices WHERE id = ?", (device,)).fetchone()
    return None if row is None else device_of(connection, row)


def device_of(connection: Connection, row: Row) -> Device:
    """Return the device of a row of `devices`."""
    values = (row["id"],)
    groups = connection.execute("SELECT name FROM device_groups WHERE device = ? ORDER BY name", values)
    labels = connection.execute("SELECT name, value FROM device_labels WHERE device = ? ORDER BY name", values)
    return Device(
        id=row["id"],
        created=row["created"],
        status=row["status"],
        instance=row["instance"],
        epoch=row["epoch"],
        began=row["began"],
        seen=row["seen"],
        agent=row["agent"],
        quarantined=row["quarantined"],
        hardware=row["hardware"],
        reported_version=row["reported_version"],
        desired_version=row["desired_version"],
        reported_at=row["reported_at"],
        groups=tuple(each["name"] for each in groups.fetchall()),
        labels={each["name"]: each["value"] for each in labels.fetchall()},
    )
