"""The tables of rollouts.

rollouts      one row each; of those that are not finished there is one a model at most
members       which device is in which wave, and how it stands; one that waits for another rollout's job is `queued`
device_jobs   the one current job of each device, its version only ever rising; NULL `published` is to be sent
job_reports   what devices reported, each only once
timeline      why each step happened
"""

from __future__ import annotations

STATEMENTS = (
    """
    CREATE TABLE rollouts (
        id TEXT PRIMARY KEY,
        model TEXT NOT NULL,
        release TEXT NOT NULL,
        target TEXT NOT NULL,
        length INTEGER NOT NULL,
        digest TEXT NOT NULL CHECK (length(digest) = 64),
        counter INTEGER NOT NULL,
        audience TEXT NOT NULL,
        options TEXT NOT NULL,
        plan TEXT NOT NULL,
        progress TEXT NOT NULL,
        state TEXT NOT NULL CHECK (state IN ('running', 'paused', 'failed', 'completed', 'aborted')),
        attempt INTEGER NOT NULL DEFAULT 1,
        created REAL NOT NULL,
        actor TEXT NOT NULL
    ) STRICT
    """,
    "CREATE UNIQUE INDEX rollouts_one_a_model ON rollouts (model) WHERE state IN ('running', 'paused', 'failed')",
    """
    CREATE TABLE members (
        rollout TEXT NOT NULL REFERENCES rollouts (id),
        device TEXT NOT NULL,
        wave INTEGER NOT NULL,
        state TEXT NOT NULL CHECK (state IN
            ('queued', 'sent', 'running', 'succeeded', 'failed', 'canceled', 'recalling', 'recalled')),
        job TEXT NOT NULL DEFAULT '',
        reported TEXT NOT NULL DEFAULT '',
        percent INTEGER NOT NULL DEFAULT 0,
        code TEXT NOT NULL DEFAULT '',
        detail TEXT NOT NULL DEFAULT '',
        heard REAL,
        PRIMARY KEY (rollout, device)
    ) STRICT, WITHOUT ROWID
    """,
    "CREATE INDEX members_state ON members (rollout, state, device)",
    "CREATE INDEX members_device ON members (device, rollout)",
    """
    CREATE TABLE device_jobs (
        device TEXT PRIMARY KEY,
        version INTEGER NOT NULL CHECK (version > 0),
        rollout TEXT NOT NULL REFERENCES rollouts (id),
        job TEXT NOT NULL,
        action TEXT NOT NULL CHECK (action IN ('install', 'cancel', 'recall')),
        document BLOB NOT NULL,
        over INTEGER NOT NULL DEFAULT 0 CHECK (over IN (0, 1)),
        published REAL
    ) STRICT
    """,
    "CREATE INDEX device_jobs_waiting ON device_jobs (device) WHERE published IS NULL",
    """
    CREATE TABLE job_reports (
        device TEXT NOT NULL,
        sequence INTEGER NOT NULL,
        job TEXT NOT NULL,
        version INTEGER NOT NULL,
        attempt INTEGER NOT NULL,
        state TEXT NOT NULL,
        code TEXT NOT NULL,
        detail TEXT NOT NULL,
        at REAL NOT NULL,
        received REAL NOT NULL,
        PRIMARY KEY (device, job, attempt, sequence)
    ) STRICT, WITHOUT ROWID
    """,
    """
    CREATE TABLE timeline (
        id INTEGER PRIMARY KEY AUTOINCREMENT,
        rollout TEXT NOT NULL REFERENCES rollouts (id),
        at REAL NOT NULL,
        actor TEXT NOT NULL,
        step TEXT NOT NULL,
        reason TEXT NOT NULL
    ) STRICT
    """,
    "CREATE INDEX timeline_rollout ON timeline (rollout, id)",
)
