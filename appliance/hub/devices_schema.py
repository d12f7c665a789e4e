"""The tables of the devices: who they are, what they are like, what they should be, what they were told.

devices.status        `unreached` until the first word, then as in `DeviceState`, by the session of instance and epoch
devices.confirmed     when the broker last had this status, by the hub's clock
devices.seen          when the device last said anything, by the hub's clock
devices.quarantined   since when two boxes use this identity, or NULL
device_instances      installations that had this identity, with the highest epoch of each
forgotten_devices     whose messages the broker still keeps, until the running hub has cleared them there
device_events         what an operator should know of, the newest of each device
twins                 the desired twins as operators write them: of a device or of a group
twin_versions         what each device is sent, of its own twin and its groups'; without `published` it has to be
commands.state        `waiting` to be sent, `sent`, then `done`, `failed` or `expired`
"""

from __future__ import annotations

STATEMENTS = (
    """
    CREATE TABLE devices (
        id TEXT PRIMARY KEY,
        created REAL NOT NULL,
        status TEXT NOT NULL CHECK (status IN ('unreached', 'online', 'lost', 'stopping')),
        instance TEXT NOT NULL,
        epoch INTEGER NOT NULL,
        began REAL NOT NULL,
        confirmed REAL NOT NULL,
        seen REAL,
        agent TEXT NOT NULL,
        quarantined REAL,
        hardware TEXT NOT NULL DEFAULT '',
        reported_version INTEGER NOT NULL DEFAULT 0,
        desired_version INTEGER NOT NULL DEFAULT 0,
        reported BLOB,
        reported_at REAL
    ) STRICT
    """,
    "CREATE INDEX devices_status ON devices (status, confirmed)",
    "CREATE TABLE forgotten_devices (id TEXT PRIMARY KEY, at REAL NOT NULL) STRICT, WITHOUT ROWID",
    """
    CREATE TABLE device_instances (
        device TEXT NOT NULL REFERENCES devices (id) ON DELETE CASCADE,
        instance TEXT NOT NULL,
        epoch INTEGER NOT NULL,
        first_seen REAL NOT NULL,
        PRIMARY KEY (device, instance)
    ) STRICT, WITHOUT ROWID
    """,
    """
    CREATE TABLE device_groups (
        device TEXT NOT NULL REFERENCES devices (id) ON DELETE CASCADE,
        name TEXT NOT NULL,
        PRIMARY KEY (device, name)
    ) STRICT, WITHOUT ROWID
    """,
    "CREATE INDEX device_groups_name ON device_groups (name, device)",
    """
    CREATE TABLE device_labels (
        device TEXT NOT NULL REFERENCES devices (id) ON DELETE CASCADE,
        name TEXT NOT NULL,
        value TEXT NOT NULL,
        PRIMARY KEY (device, name)
    ) STRICT, WITHOUT ROWID
    """,
    """
    CREATE TABLE device_events (
        id INTEGER PRIMARY KEY AUTOINCREMENT,
        device TEXT NOT NULL REFERENCES devices (id) ON DELETE CASCADE,
        at REAL NOT NULL,
        kind TEXT NOT NULL,
        detail TEXT NOT NULL
    ) STRICT
    """,
    "CREATE INDEX device_events_device ON device_events (device, id)",
    """
    CREATE TABLE twins (
        scope TEXT NOT NULL CHECK (scope IN ('device', 'group')),
        name TEXT NOT NULL,
        version INTEGER NOT NULL CHECK (version > 0),
        document BLOB NOT NULL,
        changed REAL NOT NULL,
        actor TEXT NOT NULL,
        PRIMARY KEY (scope, name)
    ) STRICT, WITHOUT ROWID
    """,
    """
    CREATE TABLE twin_versions (
        device TEXT PRIMARY KEY REFERENCES devices (id) ON DELETE CASCADE,
        version INTEGER NOT NULL CHECK (version > 0),
        document BLOB NOT NULL,
        published REAL
    ) STRICT
    """,
    "CREATE INDEX twin_versions_waiting ON twin_versions (device) WHERE published IS NULL",
    """
    CREATE TABLE commands (
        id TEXT PRIMARY KEY,
        device TEXT NOT NULL REFERENCES devices (id) ON DELETE CASCADE,
        name TEXT NOT NULL,
        arguments BLOB NOT NULL,
        actor TEXT NOT NULL,
        created REAL NOT NULL,
        expires REAL NOT NULL,
        state TEXT NOT NULL CHECK (state IN ('waiting', 'sent', 'done', 'failed', 'expired')),
        finished REAL,
        result BLOB,
        code TEXT NOT NULL DEFAULT '',
        detail TEXT NOT NULL DEFAULT ''
    ) STRICT
    """,
    "CREATE INDEX commands_open ON commands (state, expires) WHERE state IN ('waiting', 'sent')",
    "CREATE INDEX commands_device ON commands (device, created)",
)
