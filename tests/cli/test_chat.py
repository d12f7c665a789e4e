"""`appliance chat`, as a process on a real terminal and in pipes, against a server on loopback."""

from __future__ import annotations

import json
import os
import socket
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.cli.chat_server import API_KEY, ChatServer, Terminal, terminal

Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def server() -> Iterator[ChatServer]:
    with ChatServer().running() as running:
        yield running


@pytest.fixture
def run(server: ChatServer, tmp_path: Path) -> Run:
    """Run the verb in pipes; `url` and `piped` are options of its own."""

    def run_verb(*arguments: str, url: str | None = None, piped: bytes | None = None) -> Any:
        given = subprocess.DEVNULL if piped is None else None
        outcome = subprocess.run(
            [sys.executable, "-m", "appliance", "chat", "--url", url or server.url, *arguments],
            check=False,
            stdin=given,
            input=piped,
            capture_output=True,
            env={**os.environ, "HOME": str(tmp_path), "XDG_CONFIG_HOME": str(tmp_path)},
            timeout=30,
        )
        return subprocess.CompletedProcess(
            outcome.args, outcome.returncode, outcome.stdout.decode(), outcome.stderr.decode()
        )

    return run_verb


@pytest.fixture
def screen(server: ChatServer, tmp_path: Path) -> Iterator[Terminal]:
    with terminal("chat", "--url", server.url, "--model", "alpha", home=tmp_path) as opened:
        opened.expect("/help lists the commands")
        opened.expect("> ")
        yield opened
        opened.leave()


# One question


def test_one_question_prints_the_answer_and_nothing_else(run: Run, server: ChatServer) -> None:
    outcome = run("Hello", "there", "--temperature", "0", "--stop", "X", "--stop", "Y", "--system", "Be brief.")
    assert (outcome.returncode, outcome.stderr) == (0, "")
    assert outcome.stdout == "You said: Hello there 世界👍.\n"
    assert server.requests == [
        {
            "model": "beta:2",  # the configured one is not there, and this is the one that is loaded
            "messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello there"}],
            "temperature": 0.0,
            "stop": ["X", "Y"],
            "stream": True,
            "stream_options": {"include_usage": True},
        }
    ]


def test_what_is_piped_in_joins_the_question(run: Run, server: ChatServer) -> None:
    assert run(piped="天气\n".encode()).stdout.startswith("You said: 天气 ")
    run("Summarise:", piped=b"  one\ntwo\n")
    assert server.requests[1]["messages"][0]["content"] == "Summarise:\n\n  one\ntwo"


def test_json_has_the_answer_with_its_figures_on_one_line(run: Run) -> None:
    outcome = run("Hi", "--json", "--model", "alpha")
    answer = json.loads(outcome.stdout)
    assert outcome.stdout.count("\n") == 1
    assert answer["content"] == "You said: Hi 世界👍."
    assert (answer["model"], answer["finish_reason"]) == ("alpha", "stop")
    assert answer["usage"] == {"prompt_tokens": 12, "cached_tokens": 5, "completion_tokens": 3}
    assert 0 < answer["time_to_first_token_s"] <= answer["seconds"]


def test_text_that_is_not_utf8_is_refused_before_anything_is_sent(run: Run, server: ChatServer) -> None:
    outcome = run(piped=b"caf\xe9")
    assert (outcome.returncode, outcome.stdout) == (5, "")
    assert "byte 0xe9 at 3" in outcome.stderr
    assert run("caf\udce9").returncode == 5
    assert server.requests == []


def test_no_question_is_said_so(run: Run) -> None:
    outcome = run(piped=b"\n")
    assert outcome.returncode == 5
    assert "no question" in outcome.stderr


def test_a_pipe_gets_the_text_as_it_is_and_a_terminal_what_cannot_steer_it(
    run: Run, server: ChatServer, tmp_path: Path
) -> None:
    assert "\x1b[31mred" in run("steer").stdout
    with terminal("chat", "--url", server.url, "steer", home=tmp_path) as screen:
        shown = screen.expect("世界")
        assert screen.wait() == 0
    assert shown == "a[31mred2J\tb\r\n"


# Errors


def test_a_server_that_is_not_there_is_said_how_to_start(run: Run) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    outcome = run("Hi", url=f"http://127.0.0.1:{port}")
    assert (outcome.returncode, outcome.stdout) == (1, "")
    assert f"Nothing answers at http://127.0.0.1:{port}/v1: Connection refused" in outcome.stderr
    assert "`appliance serve`" in outcome.stderr


@pytest.mark.parametrize(
    ("question", "code", "shown", "words"),
    [
        ("fail", 1, "So far \n", "The engine stopped."),
        ("break", 1, "So far \n", "before it was whole"),
        ("nonsense", 1, "\n", "does not speak OpenAI's API"),
        ("busy", 1, "\n", "64 wait"),
        ("proxy", 1, "\n", "status 502"),
    ],
)
def test_an_error_is_shown_after_what_was_said(run: Run, question: str, code: int, shown: str, words: str) -> None:
    outcome = run(question)
    assert (outcome.returncode, outcome.stdout) == (code, shown)
    assert words in outcome.stderr
    assert "Traceback" not in outcome.stderr


def test_an_error_is_json_if_the_answer_would_be(run: Run) -> None:
    outcome = run("fail", "--json")
    assert outcome.stdout == ""
    assert json.loads(outcome.stderr)["error"]["code"] == "engine_failed"


@pytest.mark.parametrize(
    ("path", "code", "words"),
    [("/locked", 6, "--api-key"), ("/other", 1, "does not speak OpenAI's API"), ("/empty", 3, "models pull")],
)
def test_a_server_that_cannot_serve_is_explained(
    run: Run, server: ChatServer, path: str, code: int, words: str
) -> None:
    outcome = run("Hi", url=server.url + path)
    assert (outcome.returncode, outcome.stdout) == (code, "")
    assert words in outcome.stderr
    assert server.requests == []


@pytest.mark.parametrize("url", ["ftp://box", "http://", "http://box:99999", "http://[box", "http://box/?a=1"])
def test_an_address_that_is_none_is_refused(run: Run, url: str) -> None:
    outcome = run("Hi", url=url)
    assert outcome.returncode == 5
    assert "no address of a server" in outcome.stderr


def test_a_name_that_nobody_has_is_said(run: Run) -> None:
    outcome = run("Hi", url="http://box.invalid")
    assert outcome.returncode == 1
    assert "No machine is known by the name" in outcome.stderr


def test_a_server_without_tls_is_told_apart(run: Run, server: ChatServer) -> None:
    outcome = run("Hi", url=server.url.replace("http:", "https:"))
    assert outcome.returncode == 1
    assert "use http" in outcome.stderr


def test_the_key_goes_with_every_request(run: Run, server: ChatServer) -> None:
    run("Hi", "--api-key", API_KEY, "--model", "alpha")
    assert server.headers[0]["authorization"] == f"Bearer {API_KEY}"
    outcome = run("Hi", "--api-key", "bad\nkey")
    assert outcome.returncode == 5
    assert len(server.requests) == 1


# A conversation


def test_a_conversation_is_remembered_and_timed(screen: Terminal, server: ChatServer) -> None:
    screen.type("Hello 世界")
    screen.expect("You said: Hello 世界 世界👍.")
    screen.expect("(3 tokens, first after ")
    screen.expect(" tokens/s)")
    screen.type("And?")
    screen.expect("You said: And?")
    assert [each["content"] for each in server.requests[1]["messages"]] == [
        "Hello 世界",
        "You said: Hello 世界 世界👍.",
        "And?",
    ]
    screen.expect("> ")
    screen.press_ctrl("d")
    assert screen.wait() == 0


def test_ctrl_c_stops_the_answer_and_not_the_program(screen: Terminal, server: ChatServer) -> None:
    screen.type("endless")
    screen.expect("again again")
    assert not server.left.is_set()
    screen.press_ctrl("c")
    screen.expect("Stopped.")
    assert server.left.wait(10)  # the server knows
    screen.expect("> ")
    screen.type("still there?")
    screen.expect("You said: still there?")
    assert server.requests[1]["messages"][1]["role"] == "assistant"  # what was said before the stop is kept


def test_ctrl_c_before_the_first_word_keeps_nothing(screen: Terminal, server: ChatServer) -> None:
    screen.type("silent")
    assert server.asked.wait(10)
    screen.press_ctrl("c")
    screen.expect("Stopped.")
    assert server.left.wait(10)
    screen.expect("> ")
    screen.type("next")
    screen.expect("You said: next")
    assert len(server.requests[1]["messages"]) == 1


def test_a_second_ctrl_c_leaves(screen: Terminal) -> None:
    screen.press_ctrl("c")
    screen.expect("Ctrl-C again or Ctrl-D leaves.")
    screen.expect("> ")
    screen.press_ctrl("c")
    assert screen.wait() == 0


def test_ctrl_c_ends_a_single_question(server: ChatServer, tmp_path: Path) -> None:
    with terminal("chat", "--url", server.url, "endless", home=tmp_path) as screen:
        screen.expect("again again")
        screen.press_ctrl("c")
        assert screen.wait() == 130
    assert server.left.wait(10)


def test_a_failed_answer_is_not_remembered_but_can_be_asked_again(screen: Terminal, server: ChatServer) -> None:
    screen.type("fail")
    screen.expect("So far")
    screen.expect("The engine stopped.")
    screen.expect("> ")
    screen.type("/retry")
    screen.expect("The engine stopped.")
    screen.expect("> ")
    screen.type("other")
    screen.expect("You said: other")
    assert [len(each["messages"]) for each in server.requests] == [1, 1, 1]


def test_retry_replaces_the_last_answer(screen: Terminal, server: ChatServer) -> None:
    screen.type("/retry")
    screen.expect("no question to ask again")
    for _ in range(2):
        screen.expect("> ")
        screen.type("one" if not server.requests else "/retry")
        screen.expect("You said: one")
        screen.expect("tokens/s)")
    assert server.requests[0] == server.requests[1]


def test_the_model_and_the_system_prompt_can_be_changed(screen: Terminal, server: ChatServer) -> None:
    screen.type("/model")
    screen.expect("* alpha:1  (not loaded)")
    screen.expect("  beta:2")
    screen.type("/model gamma")
    screen.expect("no model gamma")
    screen.expect("It has alpha:1, beta:2.")
    screen.type("/model beta")
    screen.expect("Talking to beta.")
    screen.type("/system Answer in Chinese.")
    screen.expect("System prompt: Answer in Chinese.")
    screen.expect("> ")
    screen.type("one")
    screen.expect("You said: one")
    screen.type("/system -")
    screen.expect("System prompt: none")
    screen.type("/clear")
    screen.expect("Forgotten.")
    screen.type("//two")
    screen.expect("You said: /two")
    assert [(each["model"], len(each["messages"])) for each in server.requests] == [("beta", 2), ("beta", 1)]
    screen.type("/stats")
    screen.expect("5 came from the cache")
    screen.expect("Session: 2 answers, 24 tokens of prompts, 6 tokens of answers")


def test_a_conversation_is_saved_and_loaded(screen: Terminal, server: ChatServer, tmp_path: Path) -> None:
    file, other = tmp_path / "talk.json", tmp_path / "notes.txt"
    other.write_text("precious")
    screen.type("/system Be brief.")
    screen.type("one")
    screen.expect("tokens/s)")
    screen.type(f"/save {other}")
    screen.expect("is no saved conversation")
    assert other.read_text() == "precious"
    screen.type(f"/save {file}")
    screen.expect("Saved to")
    saved = json.loads(file.read_text())
    assert saved["model"] == "alpha"
    assert [each["role"] for each in saved["messages"]] == ["system", "user", "assistant"]
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert {each.name for each in tmp_path.iterdir() if each.is_file()} == {"talk.json", "notes.txt"}

    screen.type("/clear")
    screen.type(f"/load {other}")
    screen.expect("is no saved conversation")
    screen.type(f"/load {file}")
    screen.expect("3 messages, held with alpha.")
    screen.expect("> ")
    screen.type("two")
    screen.expect("You said: two")
    assert server.requests[-1]["messages"] == [*saved["messages"], {"role": "user", "content": "two"}]
    screen.type(f"/save {file}")
    screen.expect("Saved to")
    assert len(json.loads(file.read_text())["messages"]) == 5


def test_a_command_that_is_none_is_refused_with_a_guess(screen: Terminal, server: ChatServer) -> None:
    screen.type("/modle")
    screen.expect("Did you mean /model?")
    screen.type("/save")
    screen.expect("A file name is missing.")
    screen.type("/save /nowhere/at/all.json")
    screen.expect("cannot be written: No such file or directory")
    screen.type("/load /nowhere/at/all.json")
    screen.expect("cannot be read: No such file or directory")
    screen.type("/stats")
    screen.expect("There is no answer yet.")
    screen.type("/help")
    screen.expect("/retry")
    screen.expect("> ")
    screen.type("/quit")
    assert screen.wait() == 0
    assert server.requests == []


def test_questions_are_in_the_history_of_the_next_session(server: ChatServer, tmp_path: Path) -> None:
    for key, shown in (("", "You said: first question"), ("\x10", "You said: first question")):
        with terminal("chat", "--url", server.url, "--model", "alpha", home=tmp_path) as screen:
            screen.expect("> ")
            screen.type(key or "first question")  # Ctrl-P recalls the line before
            screen.expect(shown)
            screen.expect("> ")
            screen.press_ctrl("d")
            assert screen.wait() == 0
    history = tmp_path / "appliance" / "chat_history"
    assert history.read_text().splitlines() == ["first question"]
    assert stat.S_IMODE(history.stat().st_mode) == 0o600


def test_without_a_place_for_the_history_the_chat_goes_on(server: ChatServer, tmp_path: Path) -> None:
    (tmp_path / "appliance").write_text("in the way")
    with terminal("chat", "--url", server.url, "--model", "alpha", home=tmp_path) as screen:
        screen.expect("cannot be kept")
        screen.expect("> ")
        screen.type("one")
        screen.expect("You said: one")


def test_json_in_a_terminal_is_a_line_for_each_answer(server: ChatServer, tmp_path: Path) -> None:
    with terminal("chat", "--url", server.url, "--model", "alpha", "--json", home=tmp_path) as screen:
        for question in ("one", "two"):
            screen.expect("> ")
            screen.type(question)
            screen.expect('{"model":"alpha","content":"You said: ' + question)
