"""Telemetry of the real serving process, over a real broker, at a hub: through a kill, and without a client's word."""

from __future__ import annotations

import asyncio
import json
import signal
from pathlib import Path
from typing import Any

import pytest

from appliance.hub.telemetry_store import SqliteTelemetry
from tests.fleet.broker import Broker, broker
from tests.fleet.small_hub import SmallHub
from tests.fleet.telemetry_ends import until
from tests.fleet.test_telemetry_broker import running_hub
from tests.journeys.processes import ServerProcess, server_process

__all__ = ["broker"]

pytestmark = [pytest.mark.anyio, pytest.mark.slow]
MARK = "Zebrafink-81c4"


def bodies(store: SqliteTelemetry, kind: str) -> list[dict[str, Any]]:
    return [each.body for each in store.rows(limit=10**6)[0] if each.kind == kind]


def ask(server: ServerProcess) -> tuple[int, str]:
    answer = server.client().chat.completions.create(
        model="tiny", messages=[{"role": "user", "content": MARK}], max_completion_tokens=8
    )
    status, _ = server.get(f"/v1/{MARK}")
    return status, answer.choices[0].message.content or ""


async def test_a_box_tells_of_itself_through_a_kill_and_not_of_its_clients(
    broker: Broker, tiny_data: Path, tmp_path: Path
) -> None:
    SmallHub(broker, tmp_path / "authority", "box").enrol(tiny_data)
    answers = []
    async with running_hub(broker, tmp_path) as store:
        for _ in range(2):
            with server_process(tiny_data, tmp_path, "--model", "tiny") as server:
                await asyncio.to_thread(server.wait_until_ready)
                boots = {each.boot for each in store.rows(limit=10**6)[0]}
                status, answer = await asyncio.to_thread(ask, server)
                assert status == 404
                answers.append(answer)

                def told(boots: set[int] = boots) -> bool:
                    health = store.latest_health().get("box")
                    return health is not None and health.boot not in boots and bool(health.body["ready"])

                await until(told, 60.0)
                await asyncio.to_thread(server.end, signal.SIGKILL)
        kinds = {each.kind for each in store.rows(limit=10**6)[0]}
        assert kinds >= {"started", "health", "serving", "resources", "models"}
        assert bodies(store, "models")[0]["models"][0]["name"] == "tiny"
        (tally,) = store.tallies()
        assert (tally.lost, tally.refused) == (0, 0)
        everything = json.dumps([each.body for each in store.rows(limit=10**6)[0]], ensure_ascii=False)
        assert MARK not in everything
        assert not any(len(answer) > 5 and answer in everything for answer in answers)
