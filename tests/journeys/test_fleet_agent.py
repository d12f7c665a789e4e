"""The agent inside the real serving process: born, commanded, killed, lost, born again; and serving does not mind."""

from __future__ import annotations

import asyncio
import shutil
import signal
import socket
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest

from appliance.core.fleet import Desired
from appliance.fleet.diagnostics import unpack
from tests.fleet.broker import Broker, broker
from tests.fleet.small_hub import SmallHub
from tests.journeys.processes import ServerProcess, server_process

__all__ = ["broker"]

pytestmark = [pytest.mark.anyio, pytest.mark.journey]

MODEL = "smollm2-135m-instruct"
MARKER = "xylophone-7319"
WILL = {"APPLIANCE_FLEET_WILL_DELAY_S": "1"}


@pytest.fixture
def data(real_data: Path, tmp_path: Path) -> Path:
    """Return a data folder of its own with the real default model, whose files are the shared ones."""
    data = tmp_path / "data"
    data.mkdir(mode=0o700)
    shutil.copytree(real_data / "models", data / "models", copy_function=shutil.copy)
    shutil.copy(real_data / "appliance.db", data / "appliance.db")
    return data


@pytest.fixture
async def hub(broker: Broker, data: Path, tmp_path: Path) -> AsyncIterator[SmallHub]:
    async with SmallHub(broker, tmp_path / "hub", "box") as hub:
        hub.enrol(data)
        yield hub


@pytest.fixture
def server(hub: SmallHub, data: Path, tmp_path: Path) -> Iterator[ServerProcess]:
    with server_process(data, tmp_path, environment=WILL) as server:
        yield server


def say(server: ServerProcess, text: str = "Say hello.") -> str:
    answer = server.client().chat.completions.create(
        model=MODEL, messages=[{"role": "user", "content": text}], max_completion_tokens=4
    )
    return answer.choices[0].message.content or ""


async def test_a_box_is_born_commanded_killed_lost_and_born_again(
    hub: SmallHub, server: ServerProcess, data: Path, tmp_path: Path
) -> None:
    await asyncio.to_thread(server.wait_until_ready)
    await hub.until(lambda: hub.states and any(each.models for each in hub.reports))
    assert [(each.epoch, each.status) for each in hub.states] == [(1, "online")]
    ping = await hub.command("ping")
    assert (ping.ok, ping.result["ready"]) == (True, True)
    await hub.command("twin")
    await hub.until(lambda: any(each.loaded for each in hub.reports[-1].models if each.name == MODEL))
    refused = await hub.command("unload", model=MODEL)
    assert (refused.ok, refused.code) == (False, "conflict")
    server.process.send_signal(signal.SIGKILL)
    await hub.until(lambda: hub.states[-1].status == "lost")
    assert hub.states[-1].epoch == 1
    with server_process(data, tmp_path, environment=WILL) as again:
        await hub.until(lambda: hub.states[-1].status == "online")
        assert hub.states[-1].epoch == 2
        await asyncio.to_thread(again.wait_until_ready)
        assert await asyncio.to_thread(say, again)
        assert await asyncio.to_thread(again.end) == 0
    await hub.until(lambda: hub.states[-1].status == "stopping")


async def test_chat_answers_while_broker_and_hub_come_and_go(hub: SmallHub, server: ServerProcess) -> None:
    await asyncio.to_thread(server.wait_until_ready)
    await hub.until(lambda: hub.states)
    await asyncio.to_thread(hub.broker.stop, signal.SIGKILL)
    assert await asyncio.to_thread(say, server)
    assert (await asyncio.to_thread(server.get, "/health"))[0] == 200
    await asyncio.to_thread(hub.broker.start)
    await hub.until(lambda: hub.states[-1].epoch > 1)
    assert await asyncio.to_thread(say, server)


async def test_no_text_of_a_request_leaves_the_box_in_log_lines_or_diagnostics(
    hub: SmallHub, server: ServerProcess
) -> None:
    await asyncio.to_thread(server.wait_until_ready)
    await hub.until(lambda: hub.states)
    await asyncio.to_thread(say, server, MARKER)

    def bad(body: dict[str, Any] | bytes, path: str = "/v1/chat/completions") -> int:
        url = f"{server.url}{path}"
        sent = {"body": body} if isinstance(body, bytes) else {"json": body}
        return int(server.pool.request("POST", url, **sent).status)

    message = {"role": "user", "content": MARKER}
    statuses = [
        await asyncio.to_thread(bad, {"model": MODEL, "messages": [message], "temperature": MARKER}),
        await asyncio.to_thread(bad, {"model": MARKER, "messages": [message]}),
        await asyncio.to_thread(bad, {"model": MODEL, "messages": [{"role": MARKER, "content": MARKER}]}),
        await asyncio.to_thread(bad, f'{{"model": "{MARKER}'.encode()),
        await asyncio.to_thread(bad, {"model": MODEL, "messages": [{**message, "content": MARKER * 20_000}]}),
        await asyncio.to_thread(bad, {"input": MARKER}, f"/v1/{MARKER}"),
    ]
    assert all(400 <= status < 500 for status in statuses), statuses
    tail = await hub.command("log_tail", lines=1000)
    bundle = unpack((await hub.command("diagnostics")).result)
    assert tail.result["lines"]
    assert bundle["log"]
    assert MARKER not in str(tail.result)
    assert MARKER not in str(bundle)


async def test_the_hubs_settings_hold_after_a_restart_and_the_log_level_at_once(
    hub: SmallHub, server: ServerProcess, data: Path, tmp_path: Path
) -> None:
    await hub.until(lambda: hub.reports)
    version = next(each.version for each in hub.reports[-1].models if each.name == MODEL)
    await hub.desire(
        Desired("box", 1, {"log_level": "debug", "max_choices": 2}, models={MODEL: version, "absent": "1"})
    )
    await hub.until(lambda: hub.reports[-1].desired_version == 1)
    assert hub.reports[-1].refused.keys() == {"models.absent"}
    meant = {each.version: each.status for each in hub.reports[-1].models if each.name == MODEL}
    assert meant[version] in {"trial", "active"}
    assert hub.reports[-1].settings["log_level"] == "debug"
    assert hub.reports[-1].pending == ["max_choices"]
    server.process.kill()
    with server_process(data, tmp_path, environment=WILL) as again:
        await asyncio.to_thread(again.wait_until_ready)
        url, message = f"{again.url}/v1/chat/completions", {"role": "user", "content": "hi"}
        body = {"model": MODEL, "messages": [message], "n": 3, "max_completion_tokens": 1}
        assert again.pool.request("POST", url, json=body).status == 400, "the hub's limit of 2 is in force"


async def test_a_restart_by_the_hub_ends_the_process_in_order_for_systemd_to_start_it_again(
    hub: SmallHub, data: Path, tmp_path: Path
) -> None:
    with server_process(data, tmp_path, environment={**WILL, "INVOCATION_ID": "1"}) as server:
        await hub.until(lambda: hub.states)
        assert (await hub.command("restart", id="r")).result == {"restarting": True}
        assert await asyncio.to_thread(server.process.wait, 60) == 75
    await hub.until(lambda: hub.states[-1].status == "stopping")
    with server_process(data, tmp_path, environment={**WILL, "INVOCATION_ID": "1"}) as again:
        await hub.until(lambda: hub.states[-1].status == "online")
        assert (await hub.command("restart", id="r")).result == {"restarting": True}, "from memory"
        assert (await hub.command("ping")).ok, "and it did not restart again"
        assert again.process.poll() is None


@pytest.mark.slow
async def test_a_hub_that_takes_the_connection_and_says_nothing_delays_neither_start_nor_end(
    broker: Broker, tiny_data: Path, tmp_path: Path
) -> None:
    hub = SmallHub(broker, tmp_path / "hub", "box")
    with socket.create_server(("127.0.0.1", 0)) as silent:
        hub.enrol(tiny_data, port=silent.getsockname()[1])
        seconds: dict[str, float] = {}
        taken: list[socket.socket] = []
        for fleet in ("off", "auto"):
            began = time.monotonic()
            with server_process(
                tiny_data, tmp_path, "--model", "tiny", environment={"APPLIANCE_FLEET": fleet}
            ) as server:
                await asyncio.to_thread(server.wait_until_ready)
                seconds[fleet] = time.monotonic() - began
                if fleet == "auto":  # the agent is in the middle of its attempt
                    silent.settimeout(30)
                    taken.append((await asyncio.to_thread(silent.accept))[0])
                began = time.monotonic()
                assert await asyncio.to_thread(server.end) == 0
                assert time.monotonic() - began < 5
        for each in taken:
            each.close()
    assert seconds["auto"] < 2 * seconds["off"] + 1
