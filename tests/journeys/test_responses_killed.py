"""SIGKILL at every step of a turn and of its loop: no message is lost, no call made twice, and there is one answer."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
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
REQUEST = "mcp_approval_request"

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
APPROVED_POINTS = [  # the turn before, which asked for the approval, is number 0
    "begin:1:before",
    "begin:1:after",
    "add_step:1:before",  # the call that a person decided on
    "add_step:1:after",
    "add_step:2:before",  # that it is begun
    "add_step:2:after",
    "tool:0:before",
    "tool:0:after",
    "add_step:3:before",  # its result
    "add_step:3:after",
    "end:1:before",
    "end:1:after",
]
EVENT_POINTS = [f"add_events:{n}:{when}" for n in (0, 1, 3, 6) for when in ("before", "after")]


@dataclass(frozen=True)
class Killed:
    """A turn whose process was killed.

    Attributes:
        point: Where.
        seen: Events that its client had by then.
        noted: Lines of the notes before it.
        approved: Id of the request that it approves of, or "".
    """

    point: str
    conversation: str
    seen: list[Any]
    noted: int
    approved: str = ""


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
        with subject.pool.request(
            "POST",
            f"{subject.url}/v1/responses",
            body=json.dumps(document).encode(),
            headers={"content-type": "application/json"},
            preload_content=False,
        ) as response:
            while chunk := response.read1():
                seen += chunk
    except (urllib3.exceptions.HTTPError, OSError):
        pass  # as meant
    return events_of(seen)


def events_of(body: bytes) -> list[Any]:
    blocks = body.split(b"\n\n")[:-1]
    return [json.loads(each.partition(b"data: ")[2]) for each in blocks if each.startswith(b"event: ")]


def begun(data: Path, conversation: str) -> str:
    """Return the id of the newest response of a conversation, "" if there is none; nobody may have heard of it."""
    with closing(sqlite3.connect(data / "sessions.db")) as connection:
        sql = "SELECT id FROM responses WHERE conversation = ? ORDER BY key DESC LIMIT 1"
        row = connection.execute(sql, (conversation,)).fetchone()
    return "" if row is None else str(row[0])


def lines_of(notes: Path) -> list[str]:
    return notes.read_text().splitlines()


def items_of(subject: ServerProcess, conversation: str) -> list[Any]:
    listed = ask(subject, "GET", f"/v1/conversations/{conversation}/items?order=asc&limit=100")
    return list(listed["data"])


def ended(subject: ServerProcess, name: str) -> Any:
    """Wait until a response has ended and return it."""
    wait_until(lambda: ask(subject, "GET", f"/v1/responses/{name}")["status"] in ENDED, lambda: subject.log)
    return ask(subject, "GET", f"/v1/responses/{name}")


def judge(subject: ServerProcess, data: Path, killed: Killed, notes: list[str]) -> str:
    """Wait for the end of a turn that was killed, and return its status, or "" if it had not begun."""
    point, seen = killed.point, killed.seen
    name = begun(data, killed.conversation)
    if not name:
        assert (items_of(subject, killed.conversation), seen, notes) == ([], [], []), point
        return ""
    assert not seen or seen[0]["response"]["id"] == name, point
    body = ended(subject, name)
    items = items_of(subject, killed.conversation)
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
    notes = tmp_path / "notes"
    notes.touch()
    outcomes: dict[str, str] = {}
    last: Killed | None = None
    for point in [*points, ""]:
        with server(data, tmp_path, point) as subject:
            if last is not None:
                outcomes[last.point] = judge(subject, data, last, lines_of(notes)[last.noted :])
            if not point:
                break
            conversation = ask(subject, "POST", "/v1/conversations", {})["id"]
            before = len(lines_of(notes))
            seen = stream_until_death(subject, turn(conversation, background=background))
            assert not seen or seen[-1]["type"] not in ENDS, f"{point} was never reached: {seen[-1]}"
            assert subject.process.wait(DEADLINE_S) == -9
            last = Killed(point, conversation, seen, before)
    print(outcomes)
    assert [killed for killed, status in outcomes.items() if not status] == ["begin:0:before"]
    if background:
        assert "failed" not in outcomes.values()
    else:
        assert outcomes["end:0:before"] != "failed"  # its answer was in the journal
    assert "cancelled" not in outcomes.values()


def test_an_approved_call_that_is_killed_at_any_step_is_made_once_at_most(data: Path, tmp_path: Path) -> None:
    notes = tmp_path / "notes"
    notes.touch()
    last: Killed | None = None
    guarded = {"tools": [{"type": "note", "guarded": True}], "parallel_tool_calls": False, "background": True}
    for point in [*APPROVED_POINTS, ""]:
        with server(data, tmp_path, point) as subject:
            if last is not None:
                judge_approved(subject, data, last, lines_of(notes)[last.noted :])
            if not point:
                break
            conversation = ask(subject, "POST", "/v1/conversations", {})["id"]
            asked = ask(subject, "POST", "/v1/responses", turn(conversation, **guarded, stream=False))
            (request,) = [each["id"] for each in ended(subject, asked["id"])["output"] if each["type"] == REQUEST]
            before = len(lines_of(notes))
            decision = {"type": "mcp_approval_response", "approval_request_id": request, "approve": True}
            answer = {**guarded, "input": [decision], "tool_choice": "auto", "max_output_tokens": 8}
            seen = stream_until_death(subject, turn(conversation, **answer))
            assert subject.process.wait(DEADLINE_S) == -9, f"{point} was never reached"
            last = Killed(point, conversation, seen, before, request)


def judge_approved(subject: ServerProcess, data: Path, killed: Killed, notes: list[str]) -> None:
    """See that the call that was approved was made at most once, and its turn ended with it, unless it never began."""
    point, kinds = killed.point, ["message", REQUEST]
    body = ended(subject, begun(data, killed.conversation))
    items = items_of(subject, killed.conversation)
    if point == "begin:1:before":
        assert ([each["type"] for each in items], notes) == (kinds, [])
        return
    assert body["status"] in ("completed", "incomplete"), point
    assert [each["type"] for each in items] == [*kinds, "mcp_approval_response", "mcp_call", "message"], point
    (made,) = [each for each in body["output"] if each["type"] == "mcp_call"]
    assert made["approval_request_id"] == killed.approved, point
    interrupted = point in ("add_step:2:after", "tool:0:before", "tool:0:after", "add_step:3:before")
    assert (made["status"] == "failed") == interrupted, point
    assert len(notes) == (0 if point in ("add_step:2:after", "tool:0:before") else 1), point
