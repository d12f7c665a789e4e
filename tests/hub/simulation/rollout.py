"""A real release brought to simulated devices by a real rollout, of whose canaries a known share will fail."""

from __future__ import annotations

import math
import secrets
import time
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass

from appliance.core.clock import SystemClock
from appliance.core.hub_settings import HubSettings
from appliance.hub.authority import Authority
from appliance.hub.device_store import SqliteDevices
from appliance.hub.release_blobs import ReleaseBlobs
from appliance.hub.release_records import SignedRelease
from appliance.hub.release_store import SqliteReleases
from appliance.hub.releases import Draft, DraftFile, Releases
from appliance.hub.rollout_policy import Candidate, Plan, Progress, choose
from appliance.hub.rollout_records import Audience, Options, Rollout
from appliance.hub.rollout_store import SqliteRollouts
from appliance.hub.rollouts import job_maker
from appliance.hub.schema import MIGRATIONS
from appliance.hub.simulation.traits import Scenario, traits_of
from appliance.store.database import Database
from appliance.store.grouped import GroupedWrites

FAILING = 0.01
"""Share of the canaries that fail, one at least."""

PLAN = Plan(soak_s=0.0)


@dataclass(frozen=True, slots=True)
class Standing:
    """How a rollout stands.

    Attributes:
        state: Of the rollout; `code` says why it stopped, `reason` in words.
        wave: The one under way.
        members: Devices that are in it, by state.
        given: Devices for which the hub ever made a job.
    """

    state: str
    code: str
    wave: int
    reason: str
    members: dict[str, int]
    given: int


class Operator:
    """Whoever signs the release and begins the rollout, beside the running hub."""

    def __init__(self, settings: HubSettings) -> None:
        """Sign a release of a model of a few bytes: simulated devices fetch nothing."""
        self._settings = settings
        self._clock = SystemClock()
        model = settings.data_dir / "toy.gguf"
        model.write_bytes(b"weights")
        draft = Draft(
            model="toy", version="1", kind="gguf", task="chat", licence="MIT", files=[DraftFile("model", model)]
        )
        blobs = ReleaseBlobs(settings.data_dir / "blobs")
        with closing(self._open()) as database:
            store = SqliteReleases(database, self._clock)
            authority = Authority(settings.data_dir, self._clock)
            self._signed = Releases(authority, blobs, store, self._clock).add(draft, "operator")

    def begin(self, names: Sequence[str], scenario: Scenario) -> Rollout:
        """Begin a rollout to all devices, under an id by which exactly `FAILING` of the canaries will fail."""
        rollout = _rollout(self._signed, _id_for(names, scenario))
        with closing(self._open()) as database:
            self._rollouts(database).begin(rollout)
        return rollout

    def resume(self, rollout: str) -> None:
        """Let it go on: the failures until now are accepted."""
        with closing(self._open()) as database:
            self._rollouts(database).change(rollout, "resume", actor="operator", now=time.time())

    def standing(self, rollout: str) -> Standing:
        """Return how it stands."""
        with closing(self._open()) as database:
            found = self._rollouts(database).find(rollout)
            last = self._rollouts(database).timeline(rollout)[-1]
            members, given = database.read(
                lambda connection: (
                    connection.execute("SELECT state, count(*) FROM members GROUP BY state").fetchall(),
                    connection.execute("SELECT count(*) FROM device_jobs").fetchone()[0],
                )
            )
        progress = found.progress
        counts = {str(state): int(number) for state, number in members}
        return Standing(progress.state, progress.code, progress.wave, last.reason, counts, given)

    def _open(self) -> Database:
        return Database(self._settings.database_path, migrations=MIGRATIONS)

    def _rollouts(self, database: Database) -> SqliteRollouts:
        devices = SqliteDevices(database, GroupedWrites(database), self._clock)
        return SqliteRollouts(database, None, job_maker(devices, self._clock))


def _rollout(signed: SignedRelease, name: str) -> Rollout:
    return Rollout(
        id=name,
        model=signed.release.model,
        release=signed.name,
        target=signed.target,
        length=signed.length,
        digest=signed.digest,
        counter=signed.release.counter,
        audience=Audience(),
        options=Options(),
        plan=PLAN,
        progress=Progress(),
        attempt=1,
        created=time.time(),
        actor="operator",
    )


def _id_for(names: Sequence[str], scenario: Scenario) -> str:
    candidates = [Candidate(name, traits_of(scenario, name).hardware) for name in names]
    failing = {name for name in names if traits_of(scenario, name).failing}
    while True:
        name = f"r-{secrets.token_hex(5)}"
        canaries = choose(PLAN, 0, 0, candidates, name)
        if len(failing.intersection(canaries)) == max(1, math.floor(FAILING * len(canaries))):
            return name
