"""Long conversations on a real server: what is new is computed, after SIGKILL too, and the rest is left out."""

from __future__ import annotations

import json
import shutil
import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import openai
import pytest

from appliance.engine.llama.state_format import read_head
from tests.journeys.processes import ServerProcess, appliance, server_process, wait_until
from tests.tiny_gguf import write_tiny_llama

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

WINDOW = 1024
ANSWER = 16


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Return a data folder with a random model of a small window."""
    model = write_tiny_llama(tmp_path / "tiny.gguf", context_length=WINDOW)
    folder = tmp_path / "data"
    done = appliance("models", "import", str(model), "--name", "tiny", "--licence", "MIT", data=folder)
    assert done.returncode == 0, done.stderr
    return folder


@contextmanager
def server(data: Path, folder: Path) -> Iterator[ServerProcess]:
    flags = ("--model", "tiny", "--context-cells", str(4 * WINDOW))
    with server_process(data, folder, *flags, environment={"APPLIANCE_PARKING_DELAY_S": "0.1"}) as subject:
        subject.wait_until_ready()
        yield subject


def say(subject: ServerProcess, text: str, conversation: str, **fields: Any) -> Any:
    document = {
        "model": "tiny",
        "input": text,
        "conversation": conversation,
        "max_output_tokens": ANSWER,
        "truncation": "auto",
        "seed": 1,
        **fields,
    }
    body, sent = json.dumps(document).encode(), {"content-type": "application/json"}
    response = subject.pool.request("POST", f"{subject.url}/v1/responses", body=body, headers=sent)
    assert response.status == 200, response.data
    return response.json()


def parked(data: Path, usage: Any) -> bool:
    """Return True if the state of a whole turn, prompt and answer, is in a file."""
    for path in (data / "kv").rglob("*.kv"):
        with suppress(FileNotFoundError), path.open("rb", buffering=0) as file:
            tokens = len(read_head(file, path.stem, path.parent.name)[0].tokens)
            if usage["input_tokens"] <= tokens <= usage["total_tokens"]:
                return True
    return False


def cached(body: Any) -> int:
    return int(body["usage"]["input_tokens_details"]["cached_tokens"])


def test_a_next_turn_computes_only_what_is_new_after_sigkill_too(data: Path, tmp_path: Path) -> None:
    before: Any = None
    moves = 0
    with server(data, tmp_path) as subject:
        name = str(subject.client().conversations.create().id)
    turns = iter("abcdefghijklmnopqrstuvwxyz")
    for _ in range(3):
        with server(data, tmp_path) as subject:
            for _ in range(6):
                body = say(subject, next(turns) * 20, name)
                moved = before is not None and before["context"]["items_left_out"] != body["context"]["items_left_out"]
                moves += moved
                assert body["context"]["input_tokens"] == body["usage"]["input_tokens"]
                assert body["context"]["input_tokens"] <= WINDOW - ANSWER
                if before is not None and not moved:
                    assert cached(body) >= before["usage"]["input_tokens"] - 1
                before = body
            before = say(subject, next(turns) * 20, name)
            # The states of earlier turns are written first, one after another.
            wait_until(lambda: parked(data, before["usage"]), lambda: subject.log)  # noqa: B023
            assert subject.end(signal.SIGKILL) == -signal.SIGKILL
    assert 1 <= moves <= 6
    assert before["context"]["items_left_out"] > 10


def test_of_a_deleted_conversation_no_row_no_word_and_no_state_is_left_though_the_server_is_killed(
    data: Path, tmp_path: Path
) -> None:
    secret = "quincesecret"
    with server(data, tmp_path) as subject, subject.client() as client:
        names = [str(client.conversations.create().id) for _ in range(2)]
        stays = say(subject, "ordinary words " * 10, names[1])  # its state is of another length
        body = say(subject, f"The word is {secret}.", names[0])
        wait_until(lambda: parked(data, body["usage"]), lambda: subject.log)
        wait_until(lambda: parked(data, stays["usage"]), lambda: subject.log)
        assert holding(data, secret)
        client.conversations.delete(names[0])
        assert subject.end(signal.SIGKILL) == -signal.SIGKILL
    assert holding(data, secret, names[0], body["id"]) == []
    assert not parked(data, body["usage"])
    assert parked(data, stays["usage"]), "another's state is its own"
    with server(data, tmp_path) as subject, subject.client() as client:
        for path in (f"conversations/{names[0]}", f"responses/{body['id']}"):
            assert subject.get(f"/v1/{path}")[0] == 404
        assert len(client.conversations.items.list(names[1]).data) == 2


def holding(folder: Path, *words: str) -> list[str]:
    """Return the files that hold a word."""
    found = [each for each in folder.rglob("*") if each.is_file() and each.suffix != ".gguf"]
    assert found
    return [each.name for each in found for word in words if word.encode() in each.read_bytes()]


@pytest.mark.journey
def test_a_long_conversation_with_the_real_model_goes_on_or_is_refused(real_data: Path, tmp_path: Path) -> None:
    model = "smollm2-135m-instruct"
    data = tmp_path / "real"
    shutil.copytree(real_data / "models", data / "models")
    shutil.copy(real_data / "appliance.db", data / "appliance.db")
    with server_process(data, tmp_path, "--model", model, "--context-cells", "512") as subject:
        subject.wait_until_ready()
        client = subject.client()
        name = client.conversations.create().id
        window = 0
        for number in range(9):
            text = (
                f"Fact {number}: pump {number} runs at {number + 20} bar and was serviced by technician {number}. " * 3
            )
            body = say(subject, text, name, model=model, temperature=0)
            window = body["context"]["context_length"]
            assert body["usage"]["input_tokens"] == body["context"]["input_tokens"] <= window - ANSWER
        assert window == 512
        assert body["context"]["items_left_out"] > 0
        with pytest.raises(openai.BadRequestError) as refusal:
            client.responses.create(model=model, conversation=name, input="And now?")
        assert refusal.value.code == "context_length_exceeded"
        assert "512" in refusal.value.message
        assert "truncation" in refusal.value.message
        body = say(subject, "At how many bar does pump 0 run?", name, model=model, temperature=0)
        assert body["context"]["memory_items"] > 0
        assert len(client.conversations.items.list(name, limit=100).data) == 20
