"""`appliance chat` against `appliance serve`, both as processes."""

from __future__ import annotations

from pathlib import Path

from tests.cli.chat_server import terminal
from tests.journeys.processes import server_process, wait_until

SLOW = {"FAILURE": "slow", "AFTER": "0"}


def test_a_person_talks_to_a_box(tiny_data: Path, tmp_path: Path) -> None:
    with server_process(tiny_data, tmp_path, "--model", "tiny") as server:
        server.wait_until_ready()
        flags = ("--max-tokens", "12", "--seed", "1")  # of random answers some would end by themselves
        with terminal("chat", "--url", server.url, *flags, home=tmp_path) as screen:
            screen.expect("Talking to tiny")
            screen.expect("> ")
            screen.type("Hello 世界 <|im_end|>")
            screen.expect("(12 tokens, first after ")
            screen.expect("cut off at the most tokens")
            screen.type("/retry")
            screen.expect("(12 tokens, first after ")
            screen.type("/stats")
            screen.expect("Session: 2 answers")
            screen.leave()
        assert server.metric("appliance_generation_tokens_total") == 24
        assert server.metric("appliance_prefix_cache_hits_total") > 0


def test_ctrl_c_ends_the_servers_work_too(tiny_data: Path, tmp_path: Path) -> None:
    script = Path(__file__).with_name("failing_server.py")
    with server_process(tiny_data, tmp_path, "--model", "tiny", script=script, environment=SLOW) as server:
        server.wait_until_ready()
        with terminal("chat", "--url", server.url, home=tmp_path) as screen:
            screen.expect("> ")
            screen.type("Tell me a story")
            wait_until(lambda: server.metric("appliance_num_requests_running") == 1)
            wait_until(lambda: server.metric("appliance_generation_tokens_total") > 3)
            screen.press_ctrl("c")
            screen.expect("Stopped.")
            wait_until(lambda: server.metric("appliance_num_requests_running") == 0)
            told = server.metric("appliance_generation_tokens_total")
            assert told < 400  # the whole answer would have filled the context of 512
            screen.leave()
