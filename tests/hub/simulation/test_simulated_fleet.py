"""A hundred simulated devices, real mosquitto and a real hub in its own process: storms, losses, and what is kept."""

from __future__ import annotations

import asyncio
import contextlib
import random
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from pathlib import Path

import msgspec
import pytest

from appliance.core.clock import SystemClock
from appliance.core.errors import InvalidRequestError, SettingsError
from appliance.core.fleet import DeviceState, down
from appliance.core.hub_settings import HubSettings
from appliance.core.messaging import Message
from appliance.hub.simulation.figures import SimulationFigures
from appliance.hub.simulation.fleet import SimulatedFleet, allow_descriptors
from appliance.hub.simulation.identities import SimulatedIdentities
from appliance.hub.simulation.run import connection_options, make_known, simulate
from appliance.hub.simulation.traits import Scenario
from appliance.messaging.options import ConnectionOptions
from appliance.security.certificates import HUB_NAME
from tests.fleet.broker import Broker, Peer
from tests.fleet.relay import relay
from tests.hub.hubs import hub_process, hub_settings, looking_at, until
from tests.hub.simulation.documents import install

DEVICES = 100
NAMES = [f"sim-{number}" for number in range(DEVICES)]

pytestmark = pytest.mark.anyio


class SoonJitter(random.Random):
    """A jitter that is as jittery as ever, in a hundredth of the time."""

    def random(self) -> float:
        return super().random() / 100


@contextlib.asynccontextmanager
async def living(fleet: SimulatedFleet) -> AsyncIterator[SimulatedFleet]:
    task = asyncio.get_running_loop().create_task(fleet.run())
    try:
        yield fleet
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


def made(
    broker: Broker,
    folder: Path,
    scenario: Scenario,
    change: Callable[[ConnectionOptions], ConnectionOptions] = lambda options: options,
) -> SimulatedFleet:
    (folder / "identities").mkdir()
    identities = SimulatedIdentities(folder / "identities", broker.authority, time.time())
    settings = HubSettings(broker_port=broker.port)

    def options(name: str) -> ConnectionOptions:
        return change(connection_options(settings, name, identities.tls(name)))

    return SimulatedFleet(NAMES, scenario, options, SystemClock(), randomness=SoonJitter(1))


@pytest.mark.slow
async def test_every_batch_is_committed_though_broker_and_hub_are_restarted(broker: Broker, tmp_path: Path) -> None:
    settings = hub_settings(tmp_path / "hub", broker)
    fleet = made(broker, tmp_path, Scenario(batch_every_s=1.0, retry_s=2.0, duplicating=0.2))
    async with living(fleet):
        with hub_process(settings):
            await until(lambda: fleet.figures().committed > 2 * DEVICES, "batches are committed")
            broker.restart(memory=False)
            await until(lambda: fleet.figures().connects >= 2 * DEVICES, "all connect again")
            done = fleet.figures().committed
            await until(lambda: fleet.figures().committed > done + DEVICES, "batches are committed again")
        with hub_process(settings):
            told = fleet.figures().batches
            await until(lambda: fleet.figures().committed > told, "what the killed hub missed came again")
            with looking_at(settings) as devices:
                await until(lambda: devices.counts().get("online") == DEVICES, "all are online")
    figures = fleet.figures()
    assert (figures.overflowed, figures.lost) == (0, 0)


@pytest.mark.slow
async def test_the_hub_tells_the_lost_from_those_that_came_back(broker: Broker, tmp_path: Path) -> None:
    def hasty(options: ConnectionOptions) -> ConnectionOptions:
        return replace(options, port=between.port)

    async with relay(broker.port) as between, Peer(broker.options(HUB_NAME), "ea/1/up/+/state") as hub:
        fleet = made(broker, tmp_path, Scenario(batch_every_s=0.0), hasty)
        async with living(fleet):
            said = [await hub.next() for _ in NAMES]  # a cut that comes sooner would take a birth along
            between.cut()
            said += [await hub.next() for _ in NAMES]
        states = [msgspec.json.decode(each.payload, type=DeviceState) for each in said]
        assert {each.status for each in states} == {"online"}, "whoever is back in time leaves no Will"
        assert len({each.epoch for each in states}) == 2
        assert hub.received.empty()


async def test_a_will_storm_reaches_the_hub_whole(broker: Broker, tmp_path: Path) -> None:
    from appliance.hub.simulation import fleet as fleet_module

    fleet = made(broker, tmp_path, Scenario(batch_every_s=0.0))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fleet_module, "WILL_DELAY_S", 0)
        async with Peer(broker.options(HUB_NAME), "ea/1/up/+/state") as hub:
            async with living(fleet):
                await until(lambda: fleet.figures().connected == DEVICES, "all are connected")
                births = {(await hub.next()).topic for _ in NAMES}
            wills = [await hub.next() for _ in NAMES]
            assert {each.topic for each in wills} == births
            assert {msgspec.json.decode(each.payload, type=DeviceState).status for each in wills} == {"lost"}
            assert hub.link.figures.connects == 1


async def test_a_job_ends_as_the_scenario_says_on_each_device(broker: Broker, tmp_path: Path) -> None:
    scenario = Scenario(batch_every_s=0.0, job_s=0.5, failing=0.2, lost=0.1, duplicating=0.2)
    fleet = made(broker, tmp_path, scenario)
    async with living(fleet), Peer(broker.options(HUB_NAME), "ea/1/up/+/job/#") as hub:
        await until(lambda: fleet.figures().connected == DEVICES, "all are connected")
        for name in NAMES:
            await hub.link.publish(Message(down(name, "job"), install(name), retain=True))
        await until(lambda: sum(fleet.figures().jobs.values()) + fleet.figures().lost == DEVICES, "all have ended")
        found = fleet.figures()
        assert found.jobs["failed"] > 5
        assert found.lost > 2
        assert found.jobs["confirmed"] == DEVICES - found.jobs["failed"] - found.lost
        await until(lambda: fleet.figures().connected == DEVICES - found.lost, "the lost are away")


async def test_a_hold_off_of_the_hub_is_kept(broker: Broker, tmp_path: Path) -> None:
    async with Peer(broker.options(HUB_NAME)) as hub:
        await hub.link.publish(Message("ea/1/all/hub", b'{"status":"up","at":1,"hold_off_s":300}', retain=True))
        fleet = made(broker, tmp_path, Scenario(batch_every_s=0.0))
        async with living(fleet):
            await until(lambda: fleet.figures().received >= DEVICES, "all have heard it")
            broker.restart()
            await until(lambda: hub.link.figures.connects == 2, "whoever was not asked to hold off is back")
            await until(lambda: fleet.figures().connected == 0, "all have noticed")
            assert fleet.figures().connects == DEVICES


def test_a_simulation_runs_beside_its_hub_and_says_what_it_saw(tmp_path: Path, broker: Broker) -> None:
    settings = hub_settings(tmp_path / "hub", broker)
    told: list[SimulationFigures] = []
    with hub_process(settings):
        scenario = Scenario(batch_every_s=0.5)
        found = simulate(settings, 5, "toy-", scenario, seconds=6.0, progress=told.append)
    assert (found.devices, found.connected) == (5, 5)
    assert told
    with looking_at(settings) as devices:
        assert devices.counts().get("online") == 5
        assert devices.find("toy-4") is not None
    with pytest.raises(InvalidRequestError, match="begin"):
        simulate(settings, 5, "Toy/", scenario, seconds=1.0, progress=told.append)


def test_a_device_that_is_made_known_twice_is_there_once(tmp_path: Path, broker: Broker) -> None:
    settings = hub_settings(tmp_path / "hub", broker)
    make_known(settings, NAMES)
    make_known(settings, NAMES)
    with looking_at(settings) as devices:
        counts = devices.counts()
    assert (counts["unreached"], sum(counts.values())) == (DEVICES, DEVICES)


def test_more_sockets_than_the_machine_allows_are_refused_before_anything_is_done() -> None:
    with pytest.raises(SettingsError, match="open sockets"):
        allow_descriptors(2**40)
    allow_descriptors(16)
