"""Asks servers for tool calls, and counts what comes back."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import msgspec
from jsonschema import Draft202012Validator  # type: ignore[import-untyped]

from appliance.bench.client import Response, ask
from appliance.bench.requests import CHAT
from tests.benchmarks.peers import LlamaServer, Peer
from tests.benchmarks.tool.tasks import Task

LONGEST_ANSWER = 256
AT_ONCE = 4


TEMPLATE = Path(__file__).with_name("tools.jinja")


class ToolServer(LlamaServer):
    """llama-server with a chat template that knows tools: without one it makes no calls, even where one is required."""

    @property
    def arguments(self) -> list[str]:
        return [*super().arguments, "--jinja", "--chat-template-file", str(TEMPLATE)]


class Counts(msgspec.Struct):
    """What became of one server's tasks.

    Attributes:
        refused: Requests that were not answered by 200.
        calling: Answers with at least one call.
        cut: Of them, those that ended at the longest answer, whose last call is not counted among the calls.
        calls: Calls that were whole.
        parsed: Of them, those whose arguments are a JSON object.
        valid: Of them, those of a tool that was offered, with arguments that satisfy its schema.
        named: Answers whose one call is of the right function.
        right: Answers whose one call is right.
    """

    tasks: int = 0
    refused: int = 0
    calling: int = 0
    cut: int = 0
    calls: int = 0
    parsed: int = 0
    valid: int = 0
    named: int = 0
    right: int = 0


async def measure(
    peer: Peer, tasks: Sequence[Task], choice: str, progress: Callable[[str], None], *, parallel: bool = False
) -> Counts:
    """Ask one server for all tasks, some at once, and return the counts.

    Raises:
        ConnectionLostError: It did not answer.
        UnavailableError: It did not become ready.
    """
    counts = Counts()
    waiting = asyncio.Semaphore(AT_ONCE)
    async with peer.fresh() as server, asyncio.TaskGroup() as group:

        async def one(task: Task) -> None:
            async with waiting:
                count(
                    counts, task, await ask(server.port, "POST", CHAT, request(peer, task, choice, parallel=parallel))
                )
            if counts.tasks % 20 == 0:
                progress(f"{peer.name}, {choice}: {counts.tasks} of {len(tasks)}")

        for task in tasks:
            group.create_task(one(task))
    return counts


def request(peer: Peer, task: Task, choice: str, *, parallel: bool) -> dict[str, Any]:
    """Return the request of a task."""
    return {
        "model": peer.model.registered.full_name,
        "messages": list(task.messages),
        "tools": list(task.tools),
        "tool_choice": choice,
        "parallel_tool_calls": parallel,
        "temperature": 0,
        "max_tokens": LONGEST_ANSWER,
    }


def count(counts: Counts, task: Task, response: Response) -> None:
    """Count one answer."""
    counts.tasks += 1
    if response.status != 200:
        counts.refused += 1
        return
    choice = response.json()["choices"][0]
    calls = choice["message"].get("tool_calls") or []
    counts.calling += bool(calls)
    if calls and choice["finish_reason"] == "length":
        counts.cut += 1
        calls = calls[:-1]
    found = [_judged(counts, task, each["function"]) for each in calls]
    if len(found) == 1:
        counts.named += found[0][0]
        counts.right += found[0][1]


def _judged(counts: Counts, task: Task, function: dict[str, Any]) -> tuple[bool, bool]:
    counts.calls += 1
    try:
        arguments = json.loads(function["arguments"])
    except ValueError:
        return False, False
    if not isinstance(arguments, dict):
        return False, False
    counts.parsed += 1
    schema = task.schema(function["name"])
    counts.valid += schema is not None and Draft202012Validator(schema).is_valid(arguments)
    return function["name"] == task.accepted[0], task.is_right(function["name"], arguments)
