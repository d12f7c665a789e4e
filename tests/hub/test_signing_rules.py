"""When the hub signs again."""

from __future__ import annotations

import pytest

from appliance.hub.signing_rules import DAY_S, VALID_S, due, is_driven_up, next_version, state

NOW = 1_800_000_000.0


@pytest.mark.parametrize(
    ("role", "age_days", "expected"),
    [
        ("timestamp", 0, "no"),
        ("timestamp", 0.99, "no"),
        ("timestamp", 1, "yes"),
        ("timestamp", 100, "yes"),
        ("timestamp", 366, "clock_ahead"),
        ("timestamp", -0.001, "no"),
        ("timestamp", -0.1, "clock_behind"),
        ("snapshot", 14, "no"),
        ("snapshot", 15, "yes"),
    ],
)
def test_a_role_is_signed_again_in_time_and_never_by_a_wrong_clock(role: str, age_days: float, expected: str) -> None:
    assert due(role, NOW, NOW - age_days * DAY_S) == expected


def test_every_role_is_signed_again_well_before_it_expires() -> None:
    for role in ("timestamp", "snapshot"):
        half = VALID_S[role] / 2
        assert due(role, NOW, NOW - half) == "yes"
        assert 14 * DAY_S <= VALID_S[role] <= 30 * DAY_S


def test_a_person_is_told_before_something_expires() -> None:
    assert state("root", NOW, NOW + 91 * DAY_S) == "valid"
    assert state("root", NOW, NOW + 89 * DAY_S) == "soon"
    assert state("timestamp", NOW, NOW) == "expired"


def test_versions_are_counted_on_unless_an_intruder_drove_them_up() -> None:
    assert next_version(7, restart=False) == 8
    assert next_version(7, restart=True) == 8
    assert next_version(2**53, restart=False) == 2**53 + 1
    assert next_version(2**53, restart=True) == 1
    assert next_version(7, restart=False, at_least=int(NOW)) == NOW
    assert next_version(int(NOW) + 5, restart=False, at_least=int(NOW)) == NOW + 6
    assert not is_driven_up(int(NOW))
    assert is_driven_up(2**33)
    assert not is_driven_up(10_000_000)
