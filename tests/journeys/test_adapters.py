"""Adapters of a running server: imported, asked for by name, removed, each at once and without a restart."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import openai
import pytest

from tests.journeys.processes import DEADLINE_S, ServerProcess, appliance, server_process, wait_until
from tests.tiny_gguf import write_tiny_lora

SLOW = {"FAILURE": "none", "AFTER": "0", "STEP_S": "0.05"}


def complete(client: openai.OpenAI, model: str, tokens: int = 24) -> Any:
    return client.completions.create(
        model=model,
        prompt="the quick brown fox jumps over the lazy dog",
        max_tokens=tokens,
        temperature=0,
        extra_body={"ignore_eos": True},
    )


def ask_in_terminal(server: ServerProcess, *options: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "appliance", "chat", "--url", server.url, *options],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
        check=False,
    )


def test_an_adapter_comes_answers_and_goes_while_the_server_runs(
    tiny_data: Path, tiny_model_path: Path, tmp_path: Path
) -> None:
    def models(*arguments: str) -> subprocess.CompletedProcess[str]:
        return appliance("models", *arguments, data=tiny_data)

    lora = write_tiny_lora(tmp_path / "lora.gguf", tiny_model_path)
    with server_process(tiny_data, tmp_path, "--model", "tiny") as server:
        server.wait_until_ready()
        client = server.client()
        base = complete(client, "tiny").choices[0].text
        with pytest.raises(openai.NotFoundError, match="there are: tiny:1"):
            complete(client, "tiny:legal")
        assert models("import", str(lora), "--base", "tiny", "--name", "legal").returncode == 0
        assert [each.id for each in client.models.list()] == ["tiny", "tiny:legal"]

        adapted = complete(client, "tiny:legal")
        assert adapted.model == "tiny:1:legal"
        assert adapted.choices[0].text != base
        answer = ask_in_terminal(server, "--model", "tiny:legal", "--max-tokens", "5", "--json", "Hello")
        assert json.loads(answer.stdout)["model"] == "tiny:1:legal", answer.stderr
        assert 'appliance_generation_tokens_total{model="tiny:1:legal"} 29.0' in server.get("/metrics")[1].decode()

        assert models("remove", "tiny:legal", "--yes").returncode == 0
        assert complete(client, "tiny").choices[0].text == base
        with pytest.raises(openai.NotFoundError, match="there are: tiny:1"):
            complete(client, "tiny:legal")
        wait_until(lambda: "dropped the adapter tiny:1:legal" in server.log, lambda: server.log)
        assert server.end() == 0


def test_an_adapter_that_streams_is_not_removed_until_the_stream_ends(
    tiny_data: Path, tiny_model_path: Path, tmp_path: Path
) -> None:
    lora = write_tiny_lora(tmp_path / "lora.gguf", tiny_model_path)
    appliance("models", "import", str(lora), "--base", "tiny", "--name", "legal", data=tiny_data)
    script = Path(__file__).with_name("failing_server.py")
    with server_process(tiny_data, tmp_path, "--model", "tiny", script=script, environment=SLOW) as server:
        server.wait_until_ready()
        with server.client().completions.create(model="tiny:legal", prompt="a", max_tokens=400, stream=True) as stream:
            next(iter(stream))
            refused = appliance("models", "remove", "tiny:legal", "--yes", data=tiny_data)
            assert refused.returncode == 4, refused.stderr
            assert f"in use by process {server.process.pid}" in refused.stderr
            assert next(iter(stream)).model == "tiny:1:legal"
        wait_until(lambda: appliance("models", "remove", "tiny:legal", "--yes", data=tiny_data).returncode == 0)


def test_parked_conversations_of_an_adapter_survive_a_restart_and_stay_its_own(
    tiny_data: Path, tiny_model_path: Path, tmp_path: Path
) -> None:
    lora = write_tiny_lora(tmp_path / "lora.gguf", tiny_model_path)
    done = appliance("models", "import", str(lora), "--base", "tiny", "--name", "legal", data=tiny_data)
    assert done.returncode == 0, done.stderr
    answers = []
    for _ in range(2):
        with server_process(tiny_data, tmp_path, "--model", "tiny") as server:
            server.wait_until_ready()
            answers.append([complete(server.client(), each, 60) for each in ("tiny:legal", "tiny")])
            assert server.end() == 0
    cold, warm = answers
    assert [each.usage.prompt_tokens_details.cached_tokens for each in cold] == [0, 0]
    assert all(each.usage.prompt_tokens_details.cached_tokens > 0 for each in warm)
    assert [each.choices[0].text for each in warm] == [each.choices[0].text for each in cold]
