"""`appliance models tune` against `appliance serve`, both as processes."""

from __future__ import annotations

import json
from pathlib import Path

from tests.journeys.processes import appliance, server_process


def test_a_running_server_is_tuned_and_shows_it(tiny_data: Path, tmp_path: Path) -> None:
    with server_process(tiny_data, tmp_path, "--model", "tiny") as server:
        server.wait_until_ready()

        def tune(*options: str, code: int = 0) -> str:
            done = appliance("models", "tune", *options, "--url", server.url, data=tiny_data)
            assert done.returncode == code, done.stderr
            return done.stdout if code == 0 else done.stderr

        before = json.loads(tune("tiny", "--json"))
        assert (before["model"], before["threads"], before["batch_tokens"]) == ("tiny:1", 1, 512)
        after = json.loads(tune("tiny", "--threads", "2", "--target-latency", "0.3", "--json"))
        assert after == before | {"threads": 2, "target_inter_token_latency_s": 0.3}
        told = tune("tiny:1", "--batch-tokens", "100")
        assert "batch tokens" in told
        assert "100" in told
        assert json.loads(tune("tiny", "--json")) == after | {"batch_tokens": 100}
        error = json.loads(tune("tiny", "--batch-tokens", "8000", "--json", code=5))["error"]
        assert "8 to 512 tokens, not 8000" in error["message"]
        assert "nobody" in tune("nobody", code=3)
        answer = server.client().completions.create(model="tiny", prompt="Hello", max_tokens=3)
        assert answer.usage is not None
        assert answer.usage.completion_tokens == 3


def test_without_a_server_the_verb_says_so(tiny_data: Path) -> None:
    done = appliance("models", "tune", "tiny", "--threads", "1", "--url", "http://127.0.0.1:9", data=tiny_data)
    assert done.returncode == 1
    assert "Nothing answers" in done.stderr
