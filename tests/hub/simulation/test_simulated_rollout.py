"""Two hundred simulated devices, real mosquitto, a real hub process, a signed release: a canary fails."""

from __future__ import annotations

import asyncio
import random
import time
from pathlib import Path

import pytest

from appliance.core.clock import SystemClock
from appliance.hub.simulation.fleet import SimulatedFleet
from appliance.hub.simulation.identities import SimulatedIdentities
from appliance.hub.simulation.run import connection_options, make_known
from appliance.hub.simulation.traits import Scenario
from tests.fleet.broker import Broker
from tests.hub.hubs import hub_process, hub_settings, looking_at, until
from tests.hub.simulation.rollout import Operator
from tests.hub.simulation.test_simulated_fleet import living

DEVICES = 200
NAMES = [f"sim-{number}" for number in range(DEVICES)]
CANARIES = 3
"""One of each hardware class, which is more than 1 %."""

pytestmark = pytest.mark.anyio


async def test_one_failing_canary_stops_a_rollout_and_nobody_else_is_given_a_job(
    broker: Broker, tmp_path: Path
) -> None:
    settings = hub_settings(tmp_path / "hub", broker)
    await asyncio.to_thread(make_known, settings, NAMES)
    (tmp_path / "identities").mkdir()
    identities = SimulatedIdentities(tmp_path / "identities", broker.authority, time.time())
    scenario = Scenario(batch_every_s=2.0, job_s=0.5, failing=0.1)
    fleet = SimulatedFleet(
        NAMES,
        scenario,
        lambda name: connection_options(settings, name, identities.tls(name)),
        SystemClock(),
        randomness=random.Random(1),
    )
    with hub_process(settings), looking_at(settings) as devices:
        async with living(fleet):
            await until(lambda: devices.counts()["online"] == DEVICES, "all are online")
            operator = Operator(settings)
            rollout = operator.begin(NAMES, scenario)
            await until(lambda: operator.standing(rollout.id).state == "paused", "it pauses")
            await until(lambda: sum(fleet.figures().jobs.values()) == CANARIES, "the canaries are done")
            told = fleet.figures().batches
            await until(lambda: fleet.figures().committed > told + DEVICES, "the hub has gone on for a while")
            found, seen = operator.standing(rollout.id), fleet.figures()
    assert (found.code, found.wave) == ("canary_failed", 0)
    assert found.given == seen.asked == CANARIES
    assert seen.jobs == {"confirmed": CANARIES - 1, "failed": 1}
    assert found.members["failed"] == 1
    assert sum(found.members.values()) == CANARIES
