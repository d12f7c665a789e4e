"""SIGKILL at every step of a turn and of its loop: no message is lost, no call made twice, and there is one answer."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import urllib3

from tests.journeys.processes import DEADLINE_S, ServerProcess, appliance, server_process, wait_until
from tests.tiny_gguf import write_tiny_llama

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

SCRIPT = Path(__file__).with_name("killed_server.py")
ENDS = ("response.completed", "response.incomplete", "response.failed")
ENDED = ("completed", "incomplete", "failed", "cancelled")

POINTS = [
    "begin:0:before",
    "begin:0:after",
    "add_step:0:before",  # what the model said
    "add_step:0:after",
    "add_step:1:before",  # the call
    "add_step:1:after",
    "tool:0:before",
    "tool:0:after",
    "add_step:2:before",  # its result
    "add_step:2:after",
    "add_step:3:before",  # the answer
    "add_step:3:after",
    "end:0:before",
    "end:0:after",
]
EVENT_POINTS = [f"add_events:{n}:{when}" for n in (0, 1, 3, 6) for when in ("before", "after")]


@contextmanager
def server(data: Path, folder: Path, kill: str = "") -> Iterator[ServerProcess]:
    environment = {"KILL": kill, "NOTES": str(folder / "notes"), "APPLIANCE_MODEL": "tiny"}
    flags = ("--context-cells", "2048")
    with server_process(data, folder, *flags, script=SCRIPT, environment=environment) as subject:
        subject.wait_until_ready()
        yield subject


def turn(conversation: str, **fields: Any) -> dict[str, Any]:
    return {
        "model": "tiny",
        "input": "Note it.",
        "tools": [{"type": "note"}],
        "tool_choice": "required",
        "conversation": conversation,
        "max_output_tokens": 120,
        "stream": True,
        "seed": 1,
        **fields,
    }


def ask(subject: ServerProcess, method: str, path: str, document: Any = None) -> Any:
    body = None if document is None else json.dumps(document).encode()
    response = subject.pool.request(method, subject.url + path, body=body, headers={"content-type": "application/json"})
    assert response.status == 200, response.data
    return response.json()


def stream_until_death(subject: ServerProcess, document: Any) -> list[Any]:
    """Return the events that came before the process was gone."""
    seen = b""
    try:
        response = subject.pool.request(
            "POST",
            f"{subject.url}/v1/responses",
            body=json.dumps(document).encode(),
            headers={"content-type": "application/json"},
            preload_content=False,
        )
        while chunk := response.read1():
            seen += chunk
    except (urllib3.exceptions.HTTPError, OSError):
        pass  # as meant
    return events_of(seen)


def events_of(body: bytes) -> list[Any]:
    blocks = body.split(b"\n\n")[:-1]
    return [json.loads(each.partition(b"data: ")[2]) for each in blocks if each.startswith(b"event: ")]


def judge(subject: ServerProcess, conversation: str, seen: list[Any], notes: list[str], point: str) -> str:
    """Wait for the end of a turn that was killed, and return its status, or "" if nobody heard of it."""
    items = ask(subject, "GET", f"/v1/conversations/{conversation}/items?order=asc&limit=100")["data"]
    if not seen:
        return ""
    name = seen[0]["response"]["id"]
    wait_until(lambda: ask(subject, "GET", f"/v1/responses/{name}")["status"] in ENDED, lambda: subject.log)
    body = ask(subject, "GET", f"/v1/responses/{name}")
    items = ask(subject, "GET", f"/v1/conversations/{conversation}/items?order=asc&limit=100")["data"]
    made = [each for each in body["output"] if each["type"] == "mcp_call"]
    assert len(notes) <= len(made), f"{point}: a call was made that no item shows"
    if body["status"] in ("completed", "incomplete"):
        assert [each["id"] for each in items[1:]] == [each["id"] for each in body["output"]], point
        assert [each["role"] for each in items if each["type"] == "message"][:1] == ["user"], point
    else:
        assert items == [], point
    response = subject.pool.request("GET", f"{subject.url}/v1/responses/{name}?stream=true")
    told = events_of(response.data)
    assert [each["sequence_number"] for each in told] == list(range(len(told))), point
    if body["background"]:
        assert told[: len(seen)] == seen, f"{point}: an event that was seen was taken back"
    ends = [each for each in told if each["type"] in ENDS]
    assert len(ends) == 1, point
    assert ends[0] == told[-1], point
    return str(body["status"])


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Return a data folder with a random model that has room for a turn with a tool."""
    model = write_tiny_llama(tmp_path / "tiny.gguf", context_length=2048)
    folder = tmp_path / "data"
    done = appliance("models", "import", str(model), "--name", "tiny", "--licence", "MIT", data=folder)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.parametrize("background", [True, False])
def test_a_turn_that_is_killed_at_any_step_ends_once_and_makes_no_call_twice(
    data: Path, tmp_path: Path, background: bool
) -> None:
    points = [*POINTS, *(EVENT_POINTS if background else [])]
    notes, before = tmp_path / "notes", 0
    notes.touch()
    outcomes: dict[str, str] = {}
    pending: tuple[str, str, list[Any], int] | None = None
    for point in [*points, ""]:
        with server(data, tmp_path, point) as subject:
            if pending is not None:
                killed, conversation, seen, noted = pending
                outcomes[killed] = judge(subject, conversation, seen, notes.read_text().splitlines()[noted:], killed)
            if not point:
                break
            conversation = ask(subject, "POST", "/v1/conversations", {})["id"]
            before = len(notes.read_text().splitlines())
            seen = stream_until_death(subject, turn(conversation, background=background))
            assert not seen or seen[-1]["type"] not in ENDS, f"{point} was never reached: {seen[-1]}"
            assert subject.process.wait(DEADLINE_S) == -9
            pending = (point, conversation, seen, before)
    print(outcomes)
    if background:
        assert set(outcomes.values()) <= {"", "completed", "incomplete"}
    else:
        assert set(outcomes.values()) <= {"", "completed", "incomplete", "failed"}
        assert outcomes["end:0:before"] != "failed"  # its answer was in the journal
    assert sum(each != "" for each in outcomes.values()) >= len(outcomes) - 4
