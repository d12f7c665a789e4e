"""What of a desired twin is done, and what is refused by name."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from appliance.core.fleet import STREAMS, Desired
from appliance.core.setting_values import BadValueError, convert, is_path
from appliance.core.settings import (
    EffectiveSetting,
    Settings,
    check_together,
    load_settings,
    setting_fields,
    setting_types,
)
from appliance.fleet.twin_policy import (
    LOCAL_ONLY,
    MOST_NAME_CHARACTERS,
    MOST_REFUSALS,
    compare,
    decide,
    overlay,
    pending,
)

DEFAULTS = Settings()
FREE_TEXT = {"model", "embedding_model", "rerank_model", "execution_providers"}


def desired(version: int = 1, **parts: Any) -> Desired:
    return Desired("box", version, **parts)


def judged(
    settings: dict[str, Any], local: Settings = DEFAULTS, **origins: str
) -> tuple[dict[str, Any], dict[str, str]]:
    decision = decide(desired(settings=settings), local, origins)
    return decision.settings, decision.refused


def test_good_values_are_accepted_as_the_settings_own_types() -> None:
    accepted, refused = judged(
        {"log_level": "debug", "queue_size": 3, "circuit_open_s": 7, "keep_alive_timeout_s": 1.5}
    )
    assert accepted == {"log_level": "debug", "queue_size": 3, "circuit_open_s": 7.0, "keep_alive_timeout_s": 1.5}
    assert refused == {}


@pytest.mark.parametrize(
    ("name", "value", "reason"),
    [
        ("colour", "red", "no such setting"),
        ("queue_size", -1, "-1 does not fit: it takes a whole number from 0 to"),
        ("queue_size", "3", "'3' does not fit"),
        ("queue_size", 2**70, "does not fit"),
        ("queue_size", {"deep": [1] * 1000}, "does not fit"),
        ("log_level", "loud", "one of debug, info, warning, error"),
        ("model", "a\x1b[2Jb", "visible characters"),
        ("host", "0.0.0.0", "on the box itself only"),
        ("insecure", True, "on the box itself only"),
    ],
)
def test_a_bad_value_is_refused_by_name_with_what_would_fit(name: str, value: Any, reason: str) -> None:
    accepted, refused = judged({name: value, "max_choices": 4})
    assert accepted == {"max_choices": 4}, "its neighbour is not touched"
    assert reason in refused[name]


def test_what_is_set_on_the_box_wins_and_the_hub_hears_where() -> None:
    accepted, refused = judged(
        {"queue_size": 3}, Settings(queue_size=9), queue_size="file /etc/appliance/appliance.toml"
    )
    assert accepted == {}
    assert refused == {"queue_size": "it is set on the box by file /etc/appliance/appliance.toml, which wins"}


def test_who_may_reach_the_box_and_what_it_reads_is_never_the_hubs() -> None:
    assert setting_fields().keys() >= LOCAL_ONLY
    types = setting_types()
    open_to_the_hub = types.keys() - LOCAL_ONLY
    assert not [name for name in open_to_the_hub if is_path(types[name])]
    texts = {name for name in open_to_the_hub if types[name] is str}
    assert texts == FREE_TEXT, "a new setting of free text: decide whether the hub may set it"
    switches = {name for name in open_to_the_hub if types[name] is bool}
    assert switches == set(), "a new switch: decide whether the hub may turn it"


def test_two_settings_that_only_go_together_are_accepted_together() -> None:
    accepted, refused = judged({"max_sequences": 64, "context_cells": 1024, "batch_tokens": 64})
    assert (len(accepted), refused) == (3, {})


def test_of_settings_that_do_not_go_together_the_later_one_is_refused() -> None:
    accepted, refused = judged({"context_cells": 64, "max_sequences": 64, "queue_size": 1})
    assert accepted == {"context_cells": 64, "queue_size": 1}
    assert refused.keys() == {"max_sequences"}


def test_a_setting_that_does_not_go_with_a_local_one_is_refused_alone() -> None:
    local = Settings(context_cells=64)
    accepted, refused = judged({"max_sequences": 16, "log_level": "error"}, local, context_cells="flag --context-cells")
    assert accepted == {"log_level": "error"}
    assert "cannot share 64 context cells" in refused["max_sequences"]


@pytest.mark.parametrize("interval_s", [0, 1, 60.5, 86_400])
def test_a_fitting_telemetry_rate_is_accepted(interval_s: float) -> None:
    assert decide(desired(telemetry={"health": interval_s}), Settings(), {}).telemetry == {"health": interval_s}


@pytest.mark.parametrize("interval_s", [-1, 0.5, 86_401, 1e300, float("inf"), float("nan")])
def test_a_telemetry_rate_out_of_bounds_is_refused(interval_s: float) -> None:
    decision = decide(desired(telemetry={"health": interval_s, "job": 5}), Settings(), {})
    assert decision.telemetry == {"job": 5}
    assert "0 or 1 to 86400" in decision.refused["telemetry.health"]


def test_an_unknown_stream_is_refused_by_name() -> None:
    assert "no such stream" in decide(desired(telemetry={"gossip": 1}), Settings(), {}).refused["telemetry.gossip"]


def test_a_model_wish_is_taken_if_it_can_be_one() -> None:
    decision = decide(desired(models={"chat": "7", "../etc": "1", "tiny": "a b"}), Settings(), {})
    assert decision.models == {"chat": "7"}
    assert decision.refused.keys() == {"models.../etc", "models.tiny"}


def test_a_document_full_of_nonsense_is_answered_with_its_beginning() -> None:
    decision = decide(desired(settings={f"{n:03}{'x' * 1000}": n for n in range(1000)}), Settings(), {})
    assert len(decision.refused) == MOST_REFUSALS
    assert all(len(name) == MOST_NAME_CHARACTERS + 1 for name in decision.refused)


def test_only_a_newer_version_is_new() -> None:
    accepted = desired(5, settings={"queue_size": 1})
    assert compare(desired(1), None) == "new"
    assert compare(desired(6), accepted) == "new"
    assert compare(desired(5, settings={"queue_size": 1}), accepted) == "known"
    assert compare(desired(5), accepted) == "changed"
    assert compare(desired(4, settings={"queue_size": 1}), accepted) == "older"


def test_the_overlay_lies_below_what_is_set_here_and_above_the_default(tmp_path: Path) -> None:
    file = tmp_path / "settings.toml"
    file.write_text("queue_size = 9\n")
    settings, effective = load_settings(flags={"max_choices": "2"}, environment={}, config_file=file)
    wish = desired(settings={"queue_size": 1, "max_choices": 1, "max_prompts": 5, "host": "0.0.0.0"})
    after = {each.name: (each.value, each.origin) for each in overlay(settings, effective, wish)}
    assert after["max_prompts"] == (5, "fleet")
    assert after["queue_size"] == (9, f"file {file}")
    assert after["max_choices"] == (2, "flag --max-choices")
    assert after["host"] == ("127.0.0.1", "default")
    assert [each.name for each in overlay(settings, effective, wish)] == [each.name for each in effective]


VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**80), 2**80),
    st.integers(0, 100),
    st.floats(allow_nan=False),
    st.text(max_size=20),
    st.sampled_from(["on", "off", "auto", "debug", "q8_0", "q4_0", "fp32"]),
    st.lists(st.integers(), max_size=3),
)
NAMES = st.one_of(st.sampled_from(sorted(setting_fields())), st.text(max_size=20))


@given(
    st.dictionaries(NAMES, VALUES, max_size=12),
    st.dictionaries(st.one_of(st.sampled_from(STREAMS), st.text(max_size=9)), st.floats(allow_nan=True), max_size=6),
    st.dictionaries(st.text(max_size=20), st.text(max_size=20), max_size=4),
    st.sets(st.sampled_from(sorted(setting_fields())), max_size=30),
)
def test_whatever_is_desired_the_settings_stay_valid_and_each_wish_is_done_or_refused(
    settings: dict[str, Any], telemetry: dict[str, float], models: dict[str, str], local: set[str]
) -> None:
    decision = decide(
        desired(settings=settings, telemetry=telemetry, models=models), Settings(), dict.fromkeys(local, "x")
    )
    check_together(replace(Settings(), **decision.settings))
    assert not decision.settings.keys() & (LOCAL_ONLY | local)
    for name, value in decision.settings.items():
        assert convert(value, setting_types()[name], from_text=False) == value
    done = {*decision.settings, *(f"telemetry.{each}" for each in decision.telemetry)}
    done |= {f"models.{each}" for each in decision.models}
    asked = {*settings, *(f"telemetry.{each}" for each in telemetry), *(f"models.{each}" for each in models)}
    assert done | decision.refused.keys() == asked
    assert not done & decision.refused.keys()


@given(st.integers(0, 9), st.integers(0, 9), st.booleans())
def test_no_order_of_arrival_lets_an_older_document_in(first: int, second: int, same: bool) -> None:
    one = desired(first)
    two = desired(second) if same else desired(second, settings={"queue_size": 1})
    accepted = one
    if compare(two, accepted) == "new":
        accepted = two
    assert accepted.version == max(first, second)


def test_every_literal_of_a_setting_is_described() -> None:
    for name, wanted in setting_types().items():
        if get_args(wanted) and name not in LOCAL_ONLY:
            with pytest.raises(BadValueError):
                convert(object(), wanted, from_text=False)


def test_overlay_of_nothing_is_what_was() -> None:
    effective = [EffectiveSetting("queue_size", 64, "default", "")]
    assert overlay(Settings(), effective, desired()) == effective


def test_what_another_value_waits_for_is_the_next_start() -> None:
    local = Settings(max_choices=3)
    in_force = {name: getattr(local, name) for name in setting_fields()}
    decision = decide(
        desired(settings={"queue_size": 5, "log_level": "debug", "max_choices": 4}), local, {"max_choices": "x"}
    )
    assert pending(decision, local, in_force) == ["queue_size"]
    assert pending(decision, local, {**in_force, "queue_size": 5}) == []
    assert pending(decide(desired(), local, {}), local, {**in_force, "queue_size": 5}) == ["queue_size"], "taken back"
