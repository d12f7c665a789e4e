"""Versions of a model in `appliance serve`, as a process that is asked, told, and killed."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from appliance.core.settings import Settings
from appliance.core.wishes import Soak, Wish
from appliance.registry.install import import_model
from appliance.registry.versions import open_registry
from appliance.registry.wishes import Wishes
from appliance.serving.soak import LEAST_PACES
from appliance.store.database import Database
from tests.journeys.processes import ServerProcess, appliance, server_process, wait_until
from tests.tiny_gguf import write_tiny_llama

LONG = Soak(seconds=600)


class Data:
    """A data folder as another process than the server's sees it; this one starts quicker than the command line."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.database = Database(folder / "appliance.db")
        self.registry = open_registry(Settings(data_dir=folder), self.database)
        self.wishes = Wishes(self.database, self.registry)

    def add(self, path: Path) -> str:
        """Register one more version of `tiny`; it is not meant before it is wished for."""
        return import_model(path, self.registry, name="tiny", licence="MIT").model.version

    def activate(self, full_name: str, soak: Soak | None = LONG) -> None:
        self.wishes.activate(full_name, origin="a test", soak=soak)

    @property
    def wish(self) -> Wish:
        found = self.wishes.find("tiny")
        assert found is not None
        return found


@pytest.fixture
def two(tmp_path: Path, tiny_model_path: Path) -> Iterator[Data]:
    """Yield a data folder with `tiny:1` wished for, and `tiny:2` beside it."""
    data = Data(tmp_path / "data")
    data.add(tiny_model_path)
    data.activate("tiny:1", None)
    assert data.add(write_tiny_llama(tmp_path / "second.gguf", seed=7)) == "2"
    yield data
    data.database.close()


def verb(data: Data, *arguments: str, code: int = 0) -> Any:
    done = appliance("models", *arguments, "--json", data=data.folder)
    assert done.returncode == code, done.stderr
    return json.loads(done.stdout if code == 0 else done.stderr)


def ask(server: ServerProcess, model: str = "tiny", tokens: int = 4) -> str:
    """Return which version answers."""
    answer = server.client().completions.create(
        model=model, prompt="the fox", max_tokens=tokens, extra_body={"ignore_eos": True}
    )
    assert answer.usage is not None
    assert answer.usage.completion_tokens == tokens
    return str(answer.model)


def test_nobody_fails_while_versions_change_under_load(two: Data, tmp_path: Path) -> None:
    with server_process(two.folder, tmp_path, "--model", "tiny") as server:
        server.wait_until_ready()
        ended, answers, failures = threading.Event(), [], []

        def client() -> None:
            while not ended.is_set():
                try:
                    answers.append(ask(server, tokens=20))
                except Exception as error:  # noqa: BLE001  (whatever it is, it is a failed request)
                    failures.append(error)

        with ThreadPoolExecutor(3) as pool:
            clients = [pool.submit(client) for _ in range(3)]
            try:
                wait_until(lambda: "tiny:1" in answers)
                two.activate("tiny:2")
                wait_until(lambda: answers[-3:] == ["tiny:2"] * 3, lambda: f"{failures} {server.log}")
                assert ask(server, "tiny:1") == "tiny:1"
                wait_until(lambda: server.metric("appliance_model_trials_total") == 1)  # it looks once in a while
                two.wishes.roll_back("tiny", origin="a test", reason="no good")
                wait_until(lambda: answers[-3:] == ["tiny:1"] * 3, lambda: f"{failures} {server.log}")
            finally:
                ended.set()
            for each in clients:
                each.result()
        assert failures == []
        wait_until(lambda: server.metric("appliance_model_rollbacks_total") == 1)
        found = two.wish
        assert (found.state, found.meant, found.serving) == ("rolled_back", "1", "1")
        assert server.end() == 0


def test_a_trial_that_goes_well_is_confirmed_and_survives_a_restart(two: Data, tmp_path: Path) -> None:
    with server_process(two.folder, tmp_path, "--model", "tiny") as server:
        server.wait_until_ready()
        two.activate("tiny:2", Soak(seconds=0.5))
        wait_until(lambda: two.wish.state == "confirmed", lambda: server.log)
        assert ask(server) == "tiny:2"
        assert server.end() == 0
    with server_process(two.folder, tmp_path, "--model", "tiny") as server:
        server.wait_until_ready()
        assert ask(server) == "tiny:2"


def test_a_version_that_crashes_native_code_is_left_at_the_third_start(two: Data, tmp_path: Path) -> None:
    assert two.add(write_tiny_llama(tmp_path / "aborts.gguf", experts=4)) == "3"
    two.activate("tiny:3")
    environment = {"GGML_NO_BACKTRACE": "1"}
    for _ in range(2):
        with server_process(two.folder, tmp_path, "--model", "tiny", environment=environment) as server:
            assert server.process.wait(60) < 0, server.log
        assert two.wish.state == "trial"
    with server_process(two.folder, tmp_path, "--model", "tiny", environment=environment) as server:
        server.wait_until_ready()
        assert ask(server) == "tiny:1"
        found = two.wish
        assert (found.state, found.code, found.meant) == ("rolled_back", "crashed", "1")
        assert server.end() == 0
    with server_process(two.folder, tmp_path, "--model", "tiny", environment=environment) as server:
        server.wait_until_ready()
        assert ask(server) == "tiny:1"


def test_a_server_killed_in_the_trial_goes_on_with_it_and_goes_back_at_the_third_start(
    two: Data, tmp_path: Path
) -> None:
    two.activate("tiny:2")
    for _ in range(2):
        with server_process(two.folder, tmp_path, "--model", "tiny") as server:
            server.wait_until_ready()
            assert ask(server) == "tiny:2"
            assert server.end(9) == -9
    with server_process(two.folder, tmp_path, "--model", "tiny") as server:
        server.wait_until_ready()
        assert ask(server) == "tiny:1"
        assert two.wish.code == "crashed"


def test_orderly_restarts_and_a_second_server_are_held_against_nobody(two: Data, tmp_path: Path) -> None:
    two.activate("tiny:2")
    other = tmp_path / "other"
    other.mkdir()
    for _ in range(2):
        with server_process(two.folder, tmp_path, "--model", "tiny") as server:
            server.wait_until_ready()
            with server_process(two.folder, other, "--model", "tiny") as second:
                second.wait_until_ready()
                assert (ask(server), ask(second)) == ("tiny:2", "tiny:2")
                second.end(9)
            assert server.end() == 0
    assert two.wish.state == "trial"


def test_a_version_that_passes_its_test_and_fails_the_soak_goes_back_by_itself(two: Data, tmp_path: Path) -> None:
    assert two.add(write_tiny_llama(tmp_path / "slow.gguf", layers=48, embedding=256, heads=4)) == "3"
    with server_process(two.folder, tmp_path, "--model", "tiny") as server:
        server.wait_until_ready()
        assert [ask(server, tokens=16) for _ in range(LEAST_PACES)] == ["tiny:1"] * LEAST_PACES
        two.activate("tiny:3")
        wait_until(lambda: ask(server, tokens=16) == "tiny:3", lambda: server.log)
        wait_until(lambda: ask(server, tokens=16) == "tiny:1", lambda: server.log)
        found = two.wish
        assert (found.state, found.code, found.meant) == ("rolled_back", "soak_latency", "1")
        assert "95th percentile" in found.reason
        assert server.end() == 0


def test_a_crashing_version_fails_its_test_and_is_not_wished_for(two: Data, tmp_path: Path) -> None:
    two.add(write_tiny_llama(tmp_path / "aborts.gguf", experts=4))
    error = verb(two, "activate", "tiny:3", code=4)["error"]
    assert error["code"] == "self_test_failed"
    assert "SIGABRT" in error["message"]
    assert two.wish.version == "1"
    done = verb(two, "activate", "tiny:2")
    assert done["test"]["passed"]
    assert (done["wish"]["state"], done["wish"]["meant"]) == ("trial", "2")


def test_what_cannot_be_is_refused_with_advice(two: Data) -> None:
    assert verb(two, "activate", "tiny:9", code=3)["error"]["code"] == "model_not_found"
    assert verb(two, "rollback", "nobody", code=3)["error"]["code"] == "no_wish"
    assert verb(two, "activate", "tiny:2", "--soak=-1", code=5)["error"]["code"] == "invalid_value"
    assert verb(two, "remove", "tiny:1", "--yes", code=4)["error"]["code"] == "model_in_use"
    verb(two, "activate", "tiny:2", "--no-test")
    assert verb(two, "activate", "tiny:1", "--no-test", code=4)["error"]["code"] == "trial_in_progress"
    assert verb(two, "withdraw", "tiny", code=4)["error"]["code"] == "trial_in_progress"
    verb(two, "rollback", "tiny")
    verb(two, "withdraw", "tiny")
    assert verb(two, "wishes") == []
    assert "Nothing is wished for" in appliance("models", "wishes", data=two.folder).stdout
