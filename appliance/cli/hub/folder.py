"""What the verbs that work on a hub's folder share: its database, opened beside a hub that may be running."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass

from appliance.cli.options import HubContext
from appliance.core.clock import SystemClock
from appliance.core.errors import NotFoundError
from appliance.core.hub_settings import HubSettings
from appliance.hub.command_store import SqliteCommands
from appliance.hub.device_store import SqliteDevices
from appliance.hub.enrolments import SqliteEnrolments
from appliance.hub.overview import Overview
from appliance.hub.schema import MIGRATIONS
from appliance.hub.telemetry_store import SqliteTelemetry
from appliance.hub.twin_store import SqliteTwins
from appliance.store.database import Database
from appliance.store.grouped import GroupedWrites
from appliance.store.locks import holders


@dataclass(frozen=True, slots=True)
class HubFolder:
    """The stores of a hub; a change is seen by the running hub within a second."""

    settings: HubSettings
    database: Database
    devices: SqliteDevices
    twins: SqliteTwins
    commands: SqliteCommands
    enrolments: SqliteEnrolments
    telemetry: SqliteTelemetry

    @property
    def running(self) -> bool:
        """Return whether a hub serves this folder now."""
        return bool(holders(self.settings.lock_path))

    def overview(self) -> Overview:
        """Return the fleet at a glance; from here nobody knows whether the broker is reached."""
        days = self.settings.unreached_days
        return Overview(self.devices, SystemClock(), unreached_days=days, connected=lambda: False)


@contextmanager
def open_folder(context: HubContext) -> Iterator[HubFolder]:
    """Open the stores of a hub.

    Raises:
        NotFoundError: There is no hub in the folder.
        StorageError: The database cannot be opened.
    """
    settings = context.settings
    if not settings.database_path.exists():
        raise NotFoundError(
            f"There is no hub in {settings.data_dir}.",
            advice="Make one with: appliance hub init --data FOLDER --name HOST",
        )
    clock = SystemClock()
    with closing(Database(settings.database_path, migrations=MIGRATIONS)) as database:
        writes = GroupedWrites(database)
        yield HubFolder(
            settings,
            database,
            SqliteDevices(database, writes, clock),
            SqliteTwins(database, clock),
            SqliteCommands(database, writes, clock),
            SqliteEnrolments(database),
            SqliteTelemetry(database),
        )
