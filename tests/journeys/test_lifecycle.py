"""Start, stop, kill, fail: a real process with a tiny model."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import openai
import pytest
import urllib3

from tests.journeys.processes import DEADLINE_S, ServerProcess, appliance, notify_socket, server_process, wait_until

pytestmark = pytest.mark.slow

FAILING = Path(__file__).with_name("failing_server.py")
AT_ONCE = {"APPLIANCE_STREAM_INTERVAL_S": "0"}
"""An engine that hangs delivers nothing more: what it had is to be out by then."""
ENDLESS = {"ignore_eos": True}


def stream(server: ServerProcess, tokens: int) -> tuple[str, str | None]:
    """Stream one answer; returns its text and finish reason."""
    text, reason = "", None
    chunks = server.client().chat.completions.create(
        model="tiny",
        messages=[{"role": "user", "content": "hello"}],
        max_completion_tokens=tokens,
        stream=True,
        extra_body=ENDLESS,
    )
    for chunk in chunks:
        for choice in chunk.choices:
            text += choice.delta.content or ""
            reason = choice.finish_reason or reason
    return text, reason


def test_sigterm_under_load_lets_answers_finish_and_exits_cleanly(tiny_data: Path, tmp_path: Path) -> None:
    with server_process(tiny_data, tmp_path, "--model", "tiny") as server, ThreadPoolExecutor(16) as threads:
        server.wait_until_ready()
        stream(server, 1)
        one = server.metric("appliance_prompt_tokens_total")
        answers = [threads.submit(stream, server, 400) for _ in range(16)]
        accepted = partial(server.metric, "appliance_prompt_tokens_total")
        wait_until(lambda: accepted() == 17 * one, lambda: f"{accepted()} of {17 * one} {answers} {server.log}")
        assert server.end() == 0
        assert {answer.result(DEADLINE_S)[1] for answer in answers} == {"length"}
        assert '"unloaded tiny:1"' in server.log


def test_sigterm_cuts_off_what_does_not_end_in_time_and_says_so_in_the_stream(tiny_data: Path, tmp_path: Path) -> None:
    slow = {
        "APPLIANCE_SHUTDOWN_GRACE_S": "0.2",
        "AFTER": "40",
        "APPLIANCE_STREAM_INTERVAL_S": "0",
        "FAILURE": "hang",
        "STOP_S": "1",
    }
    with (
        server_process(tiny_data, tmp_path, "--model", "tiny", script=FAILING, environment=slow) as server,
        ThreadPoolExecutor(1) as threads,
    ):
        server.wait_until_ready()
        answer = threads.submit(stream, server, 400)
        wait_until(lambda: server.metric("appliance_generation_tokens_total") > 10)
        server.process.send_signal(signal.SIGTERM)
        with pytest.raises((openai.APIError, urllib3.exceptions.HTTPError)):
            answer.result(DEADLINE_S)


@pytest.mark.journey
def test_sigterm_while_the_model_loads_exits_cleanly(real_data: Path, tmp_path: Path) -> None:
    with server_process(real_data, tmp_path) as server:
        wait_until(lambda: "loading smollm2" in server.log)
        assert server.end() == 0
        assert "loaded smollm2" not in server.log


def test_a_killed_server_starts_again_with_its_models_and_keys(tiny_data: Path, tmp_path: Path) -> None:
    made = appliance("keys", "create", "camera", "--json", data=tiny_data)
    key = json.loads(made.stdout)["secret"]
    closed = {"APPLIANCE_REQUIRE_API_KEY": "true"}
    for _ in range(2):
        with server_process(tiny_data, tmp_path, "--model", "tiny", environment=closed) as server:
            server.wait_until_ready()
            assert [each.id for each in server.client(key).models.list()] == ["tiny"]
            assert server.end(signal.SIGKILL) == -signal.SIGKILL


def test_a_revoked_key_is_refused_at_once(tiny_data: Path, tmp_path: Path) -> None:
    made = json.loads(appliance("keys", "create", "camera", "--json", data=tiny_data).stdout)
    with server_process(
        tiny_data, tmp_path, "--model", "tiny", environment={"APPLIANCE_REQUIRE_API_KEY": "true"}
    ) as server:
        server.wait_until_ready()
        with pytest.raises(openai.AuthenticationError):
            server.client("ea-wrong").models.list()
        assert list(server.client(made["secret"]).models.list())
        assert appliance("keys", "revoke", made["id"], data=tiny_data).returncode == 0
        with pytest.raises(openai.AuthenticationError):
            server.client(made["secret"]).models.list()


def test_a_running_server_sees_what_the_command_line_adds_and_protects_what_it_uses(
    tiny_data: Path, tmp_path: Path, tiny_model_path: Path
) -> None:
    with server_process(tiny_data, tmp_path, "--model", "tiny") as server:
        server.wait_until_ready()
        copy = tmp_path / "copy.gguf"
        copy.write_bytes(tiny_model_path.read_bytes())
        assert appliance("models", "import", str(copy), "--name", "second", data=tiny_data).returncode == 0
        assert {each.id for each in server.client().models.list()} == {"tiny", "second"}
        refused = appliance("models", "remove", "tiny", "--yes", data=tiny_data)
        assert refused.returncode == 4
        assert "in use" in refused.stderr
        assert stream(server, 4)[1] == "length"


def test_systemd_hears_ready_watchdog_status_and_stopping(tiny_data: Path, tmp_path: Path) -> None:
    with notify_socket(tmp_path) as systemd:
        told = {"NOTIFY_SOCKET": str(tmp_path / "notify"), "WATCHDOG_USEC": "200000"}
        with server_process(tiny_data, tmp_path, "--model", "tiny", environment=told) as server:
            heard = ""
            while not all(each in heard for each in ("READY=1", "STATUS=Ready.", "WATCHDOG=1")):
                heard += systemd.recv(4096).decode() + "\n"
            server.process.send_signal(signal.SIGTERM)
            while "STOPPING=1" not in heard:
                heard += systemd.recv(4096).decode() + "\n"
            assert server.process.wait(DEADLINE_S) == 0


def test_a_hanging_engine_starves_the_watchdog_and_turns_readiness_red(tiny_data: Path, tmp_path: Path) -> None:
    fault = {"AFTER": "5", **AT_ONCE, "FAILURE": "hang", "APPLIANCE_STALLED_ENGINE_S": "2"}
    with notify_socket(tmp_path) as systemd:
        told = {"NOTIFY_SOCKET": str(tmp_path / "notify"), "WATCHDOG_USEC": "100000", **fault}
        with (
            server_process(tiny_data, tmp_path, "--model", "tiny", script=FAILING, environment=told) as server,
            ThreadPoolExecutor(1) as threads,
        ):
            server.wait_until_ready()
            threads.submit(stream, server, 50)
            wait_until(lambda: server.get("/health")[0] == 503)
            assert b"does not answer" in server.get("/health")[1]
            systemd.settimeout(0.5)
            with contextlib.suppress(TimeoutError):  # what was said before is read, then nothing more comes
                while systemd.recv(4096):
                    assert server.process.poll() is None
            with pytest.raises(TimeoutError):
                systemd.recv(4096)
            server.process.kill()


def test_a_dead_engine_ends_open_requests_with_an_error_and_the_process_for_systemd(
    tiny_data: Path, tmp_path: Path
) -> None:
    fault = {"STEP_S": "0.02", "AFTER": "150", "FAILURE": "die"}
    with (
        server_process(tiny_data, tmp_path, "--model", "tiny", script=FAILING, environment=fault) as server,
        ThreadPoolExecutor(4) as threads,
    ):
        server.wait_until_ready()
        answers = [threads.submit(stream, server, 400) for _ in range(4)]
        assert server.process.wait(DEADLINE_S) == 1
        for answer in answers:
            with pytest.raises(openai.APIError, match="failed to answer"):
                answer.result(DEADLINE_S)
        assert "engine_died" in server.log or "thread died" in server.log


def test_it_does_not_listen_to_strangers_without_keys_and_tls(tiny_data: Path, tmp_path: Path) -> None:
    with server_process(tiny_data, tmp_path, "--host", "0.0.0.0") as server:
        assert server.process.wait(DEADLINE_S) == 2
        assert "API key" in server.log
        assert "TLS" in server.log


def test_a_taken_port_is_said_plainly(tiny_data: Path, tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        done = subprocess.run(
            [sys.executable, "-m", "appliance", "serve", "--data", str(tiny_data), "--port", str(port)],
            capture_output=True,
            text=True,
            timeout=DEADLINE_S,
            check=False,
            env={**os.environ, "APPLIANCE_MODEL": "tiny", "APPLIANCE_THREADS": "1"},
        )
    assert done.returncode == 2
    assert f"port {port}" in done.stderr
    assert "Traceback" not in done.stderr
