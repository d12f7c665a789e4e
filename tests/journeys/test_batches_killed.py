"""SIGKILL at every step of a batch: it ends by itself in the next process, with each line answered once."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import openai
import pytest

from tests.journeys.processes import DEADLINE_S, ServerProcess, appliance, server_process, wait_until
from tests.tiny_gguf import write_tiny_llama

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

SCRIPT = Path(__file__).with_name("killed_batch_server.py")
LINES = 5
BAD = 3
"""The line that the door refuses."""

POINTS = [
    "create:0:before",
    "create:0:after",
    "apply:0:before",  # the file was looked through
    "apply:0:after",
    "begin_line:1:after",
    "end_line:0:before",
    "end_line:2:after",
    "apply:1:before",  # all lines are answered
    "apply:1:after",
    "file:0:after",  # answers
    "file:1:before",  # errors
    "file:1:after",
    "finish:0:before",
    "finish:0:after",
]


@contextmanager
def server(data: Path, folder: Path, kill: str = "") -> Iterator[ServerProcess]:
    environment = {"KILL": kill, "NOTES": str(folder / "notes"), "APPLIANCE_MODEL": "tiny"}
    with server_process(data, folder, script=SCRIPT, environment=environment) as subject:
        subject.wait_until_ready()
        yield subject


def lines(point: str) -> bytes:
    written = b""
    for number in range(LINES):
        messages = [{"role": "user", "content": f"{point} {number}"}]
        body = {"model": "tiny" if number != BAD else "missing", "messages": messages, "max_tokens": 2}
        line = {"custom_id": f"{number}", "method": "POST", "url": "/v1/chat/completions", "body": body}
        written += json.dumps(line).encode() + b"\n"
    return written


def read(client: openai.OpenAI, file: str | None) -> list[Any]:
    return [] if file is None else [json.loads(each) for each in client.files.content(file).text.splitlines()]


def begin_and_die(subject: ServerProcess, point: str) -> str:
    """Return the id of the batch if it was acknowledged."""
    name = ""
    with subject.client() as client:
        file = client.files.create(file=("lines.jsonl", lines(point)), purpose="batch")
        try:
            name = client.batches.create(
                input_file_id=file.id, endpoint="/v1/chat/completions", completion_window="24h"
            ).id
        except openai.APIConnectionError:
            assert point.startswith(("create", "apply:0")), f"{point}: the batch was not acknowledged"
    assert subject.process.wait(DEADLINE_S) == -9, f"{point} was never reached"
    return name


@pytest.fixture
def data(tmp_path: Path) -> Path:
    model = write_tiny_llama(tmp_path / "tiny.gguf", context_length=256)
    folder = tmp_path / "data"
    done = appliance("models", "import", str(model), "--name", "tiny", "--licence", "MIT", data=folder)
    assert done.returncode == 0, done.stderr
    return folder


def test_a_batch_that_is_killed_at_any_step_goes_on_and_answers_each_line_once(data: Path, tmp_path: Path) -> None:
    notes = tmp_path / "notes"
    notes.touch()
    judged: set[str] = set()
    killed, acknowledged = "", ""
    for point in [*POINTS, ""]:
        with server(data, tmp_path, point) as subject:
            if killed:
                judge_all(subject, killed, acknowledged, judged, notes)
            killed, acknowledged = point, begin_and_die(subject, point) if point else ""


def judge_all(subject: ServerProcess, point: str, acknowledged: str, judged: set[str], notes: Path) -> None:
    """Look at the batch that was killed at a point, if there is one, and at who answered its lines."""
    with subject.client() as client:
        new = [each.id for each in client.batches.list(limit=100) if each.id not in judged]
        assert len(new) == (point != "create:0:before"), point
        assert not acknowledged or new == [acknowledged], f"{point}: it was lost"
        for name in new:
            judge(subject, client, name, point)
        judged.update(new)
    answered = Counter(each for each in notes.read_text().splitlines() if json.loads(each).startswith(f"{point} "))
    begun_twice = sum(count - 1 for count in answered.values())
    assert begun_twice <= 2, f"{point}: more lines were answered anew than were being answered"
    if point.startswith(("apply:1", "file", "finish")):
        assert begun_twice == 0, f"{point}: a line that had its answer was answered anew"


def judge(subject: ServerProcess, client: openai.OpenAI, name: str, point: str) -> None:
    wait_until(lambda: client.batches.retrieve(name).status == "completed", lambda: subject.log)
    batch = client.batches.retrieve(name)
    assert batch.request_counts is not None
    counts = batch.request_counts
    assert (counts.total, counts.completed, counts.failed) == (LINES, LINES - 1, 1), point
    answers, errors = read(client, batch.output_file_id), read(client, batch.error_file_id)
    assert [each["custom_id"] for each in answers] == [f"{each}" for each in range(LINES) if each != BAD], point
    assert [each["custom_id"] for each in errors] == [f"{BAD}"], point
    assert errors[0]["response"]["status_code"] == 404, point
    written = [each.filename for each in client.files.list(purpose="batch_output") if name in each.filename]
    assert len(written) == 2, f"{point}: a file was written twice"
