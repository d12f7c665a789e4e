"""What a box tells of itself and of its models."""

from __future__ import annotations

from pathlib import Path

import pytest

from appliance.core.settings import Settings
from appliance.core.wishes import Soak
from appliance.fleet.reported import box_facts, is_supervised, reported_models
from appliance.registry.wishes import Wishes
from tests.serving.conftest import Box


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(data_dir=tmp_path / "not made yet")


def test_the_facts_are_those_that_a_rollout_and_a_technician_need(settings: Settings) -> None:
    facts = box_facts(settings)
    assert facts["hardware"]
    assert facts["cores"] >= 1
    assert facts["memory"] > 0
    assert facts["disk"] > 0
    assert {"os", "kernel", "python", "agent", "gpus", "board", "cpu"} <= facts.keys()


def test_a_program_knows_whether_systemd_watches_over_it() -> None:
    assert is_supervised({"INVOCATION_ID": "1"})
    assert is_supervised({"NOTIFY_SOCKET": "/run/notify"})
    assert not is_supervised({"PATH": "/bin"})


def test_each_version_of_a_model_says_what_it_is_for_its_name(tmp_path: Path) -> None:
    box = Box(tmp_path)
    box.add("tiny")
    box.add("tiny", seed=1)
    told = {each.version: (each.status, each.loaded) for each in reported_models(box.registry, {"tiny:1"})}
    assert told == {"1": ("present", True), "2": ("active", False)}
    wishes = Wishes(box.database, box.registry)
    wishes.activate("tiny:1", origin="test", soak=Soak())
    assert {each.version: each.status for each in reported_models(box.registry, ())} == {"1": "trial", "2": "present"}
    wishes.roll_back("tiny", reason="It crashed.")
    assert {each.version: each.status for each in reported_models(box.registry, ())} == {"1": "present", "2": "active"}
    box.database.close()
