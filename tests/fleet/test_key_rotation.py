"""`hub keys rotate online` beside a running hub: what devices keep of it is signed anew, and sent to them by itself."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path

import msgspec
import pytest

from appliance.core.clock import SystemClock
from appliance.core.errors import UntrustedError
from appliance.core.fleet import Desired, Job
from appliance.core.releases import DESIRED_TYPE, JOB_TYPE
from appliance.hub.authority import Authority
from appliance.hub.desired import DesiredDocument
from appliance.hub.director import director_keys
from appliance.hub.rollout_policy import Plan, Progress
from appliance.hub.rollout_records import Audience, Options, Rollout
from appliance.hub.rollout_store import SqliteRollouts
from appliance.hub.rollouts import job_maker
from appliance.security.envelopes import open_envelope
from appliance.security.signing import PublicKey
from tests.fleet.broker import Peer
from tests.fleet.made_hub import MadeHub, made_hub, options_of

pytestmark = pytest.mark.anyio

TYPES = {"ea/1/dn/box-1/des": DESIRED_TYPE, "ea/1/dn/box-1/job": JOB_TYPE}


def begin(made: MadeHub) -> None:
    """Bring a release out to the one box."""
    means = made.hub.means
    SqliteRollouts(means.database, None, job_maker(means.devices, means.clock)).begin(
        Rollout(
            id="r-1",
            model="m",
            release="m:2",
            target="releases/m/2/release.json",
            length=10,
            digest="0" * 64,
            counter=2,
            audience=Audience(),
            options=Options(),
            plan=Plan(),
            progress=Progress(),
            attempt=1,
            created=means.clock.unix(),
            actor="ann",
        )
    )


async def _two(peer: Peer) -> dict[str, bytes]:
    """Return the next documents of both kinds, by topic."""
    found: dict[str, bytes] = {}
    async with asyncio.timeout(60):
        while found.keys() != TYPES.keys():
            message = await peer.received.get()
            found[message.topic] = message.payload
    return found


def _check(documents: dict[str, bytes], keys: Sequence[PublicKey]) -> None:
    desired = msgspec.json.decode(open_envelope(documents["ea/1/dn/box-1/des"], DESIRED_TYPE, keys), type=Desired)
    job = msgspec.json.decode(open_envelope(documents["ea/1/dn/box-1/job"], JOB_TYPE, keys), type=Job)
    assert (desired.version, desired.settings) == (1, {"log_level": "debug"})
    assert (job.version, job.id, job.target) == (1, "r-1.1", "releases/m/2/release.json")


async def test_a_new_online_key_signs_and_sends_again_what_the_old_one_had(tmp_path: Path) -> None:
    async with made_hub(tmp_path / "hub") as made:
        authority = Authority(made.settings.data_dir, SystemClock())

        def believed() -> list[PublicKey]:
            return [PublicKey(each) for each in director_keys(authority).keys]

        options = options_of(await made.enrol(tmp_path / "1", "box-1"))
        async with Peer(options, *TYPES) as peer:
            wanted = DesiredDocument({"log_level": "debug"}, {}, {})
            await made.hub.means.twins.set("device", "box-1", wanted, expected_version=0, actor="ann")
            begin(made)
            before, old = await _two(peer), believed()
            _check(before, old)
            await asyncio.to_thread(authority.rotate_online)
            after, new = await _two(peer), believed()
            assert new != old
            _check(after, new)
            for topic, kind in TYPES.items():
                with pytest.raises(UntrustedError):
                    open_envelope(before[topic], kind, new)
        async with Peer(options, *TYPES) as later:
            _check(await _two(later), new)  # the broker keeps the new ones
