"""A hub that falls behind asks the devices to hold off; what one device says of itself moves nobody."""

from __future__ import annotations

import asyncio
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from appliance.core.fleet import BATCH_EXPIRY_S, HUB_TOPIC, HubState, up
from appliance.core.messaging import Message
from appliance.hub.backpressure import CALM_S, MOST_S, Backpressure
from tests.fleet.broker import Broker, Peer
from tests.hub.hubs import hub_settings, running_hub


def after(*waits: int | None) -> float:
    """Return what devices are told, each of whose batches waited for so long."""
    pressure = Backpressure()
    for number, waited in enumerate(waits):
        pressure.note(f"box-{number}", None if waited is None else BATCH_EXPIRY_S - waited)
    return pressure.take()


def test_devices_hold_off_for_twice_the_wait_and_not_for_long() -> None:
    assert after() == 0.0
    assert after(0, 1, 2) == 0.0
    assert after(5) == 0.0
    assert after(6) == 12.0
    assert after(10, 20, 30) == 40.0
    assert after(500, 600) == MOST_S
    assert after(None, None) == 0.0


def test_one_device_among_others_moves_nobody() -> None:
    assert after(0, 600) == 0.0
    assert after(0, 0, 600, 600) == 0.0
    assert after(0, 600, 600) == MOST_S


def test_the_longest_wait_of_a_device_counts_and_is_forgotten_once_it_was_told() -> None:
    pressure = Backpressure()
    for waited in (0, 20, 1):
        pressure.note("box-1", BATCH_EXPIRY_S - waited)
    assert pressure.take() == 40.0
    assert pressure.take() == 0.0


@given(st.lists(st.integers(-(2**40), 2**40), max_size=20))
def test_it_stays_within_its_bounds_whatever_devices_say(expiries: list[int]) -> None:
    pressure = Backpressure()
    for number, expiry in enumerate(expiries):
        pressure.note(f"box-{number}", expiry)
    assert 0.0 <= pressure.take() <= MOST_S


@pytest.mark.anyio
async def test_a_hub_whose_messages_wait_at_the_broker_tells_it_and_then_that_it_is_over(
    broker: Broker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("appliance.hub.mqtt.LOOK_EVERY_S", 0.1)
    async with running_hub(hub_settings(tmp_path, broker)), Peer(broker.options("box-1"), HUB_TOPIC) as peer:

        async def told(*, holding_off: bool) -> HubState:
            async with asyncio.timeout(60):
                while True:
                    message = await peer.received.get()
                    state = msgspec.json.decode(message.payload, type=HubState)
                    if not message.retain and (state.hold_off_s > 0) == holding_off:
                        return state

        late = Message(up("box-1", "tm", "health"), b"no batch", expiry_s=BATCH_EXPIRY_S - 20)
        await peer.link.publish(late)
        state = await told(holding_off=True)
        assert state.status == "up"
        assert 2 * CALM_S < state.hold_off_s <= MOST_S
        assert (await told(holding_off=False)).hold_off_s == 0.0
