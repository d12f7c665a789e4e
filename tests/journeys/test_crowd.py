"""Many clients at once, and clients that leave: nobody hangs, nobody is lost, nothing leaks."""

from __future__ import annotations

import asyncio
import http.client
import json
from collections import Counter
from pathlib import Path

import openai
import pytest

from tests.journeys.processes import DEADLINE_S, ServerProcess, server_process, wait_until

pytestmark = pytest.mark.slow

FAILING = Path(__file__).with_name("failing_server.py")
BODY = {"model": "tiny", "messages": [{"role": "user", "content": "hello"}], "ignore_eos": True}


async def crowd(server: ServerProcess, clients: int, tokens: int = 60) -> Counter[str]:
    """Send one request a client, all at once; returns how many ended how."""
    endings: Counter[str] = Counter()
    client = openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=DEADLINE_S)

    async def ask() -> None:
        try:
            answer = await client.chat.completions.create(
                model="tiny",
                messages=[{"role": "user", "content": "hello"}],
                max_completion_tokens=tokens,
                extra_body={"ignore_eos": True},
            )
            assert answer.usage is not None
            assert answer.usage.completion_tokens == tokens
            endings["answered"] += 1
        except openai.RateLimitError as refusal:
            endings["refused" if int(refusal.response.headers["Retry-After"]) >= 1 else "refused badly"] += 1

    async with client, asyncio.TaskGroup() as tasks:
        for _ in range(clients):
            tasks.create_task(ask())
    return endings


def test_two_hundred_clients_on_a_queue_of_64_each_get_an_answer_or_a_time_to_come_back(
    tiny_data: Path, tmp_path: Path
) -> None:
    with server_process(tiny_data, tmp_path, "--model", "tiny") as server:
        server.wait_until_ready()
        endings = asyncio.run(crowd(server, 200))
        assert endings["answered"] + endings["refused"] == 200
        assert endings["answered"] >= 64 + 8
        assert server.metric("appliance_num_requests_running") == 0
        assert server.metric("appliance_num_requests_waiting") == 0
        assert asyncio.run(crowd(server, 20))["answered"] == 20


@pytest.mark.parametrize("moment", ["mid-stream", "mid-queue", "mid-prefill", "while not streaming"])
def test_a_client_that_leaves_frees_its_place(tiny_data: Path, tmp_path: Path, moment: str) -> None:
    flags = ("--model", "tiny", "--max-sequences", "1")
    slow = {"STEP_S": "0.05", "FAILURE": "none", "AFTER": "0", "APPLIANCE_BATCH_TOKENS": "32"}
    with server_process(tiny_data, tmp_path, *flags, script=FAILING, environment=slow) as server:
        server.wait_until_ready()
        connections = []

        def leave_later(**changes: object) -> http.client.HTTPConnection:
            connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=DEADLINE_S)
            body = json.dumps({**BODY, **changes})
            connection.request("POST", "/v1/chat/completions", body, {"Content-Type": "application/json"})
            connections.append(connection)
            return connection

        if moment == "mid-stream":
            leave_later(stream=True).getresponse().read(300)
        elif moment == "mid-prefill":
            leave_later(messages=[{"role": "user", "content": "hello " * 60}], stream=True)
        else:
            leave_later(stream=False)
        if moment == "mid-queue":
            wait_until(lambda: server.metric("appliance_num_requests_running") == 1)
            leave_later(stream=True)
            wait_until(lambda: server.metric("appliance_num_requests_waiting") == 1)
        else:
            wait_until(lambda: server.metric("appliance_prompt_tokens_total") > 0)
        for connection in connections:
            connection.close()
        wait_until(
            lambda: (
                server.metric("appliance_num_requests_running") == server.metric("appliance_num_requests_waiting") == 0
            )
        )
        assert asyncio.run(crowd(server, 1, tokens=4))["answered"] == 1
