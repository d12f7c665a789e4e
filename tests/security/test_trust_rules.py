"""The rules of trust: marks only rise, but for a role whose old keys can sign nothing any more."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from appliance.core.errors import UntrustedError
from appliance.security.trust_rules import (
    LARGEST_VERSION,
    ROLES,
    Mark,
    RoleKeys,
    after_root,
    check_version,
    is_rotated,
    merged,
    raised,
    reference_time,
)

KEYS = st.frozensets(st.sampled_from("abcdef"), min_size=1, max_size=4)


@pytest.mark.parametrize("version", [0, -1, LARGEST_VERSION + 1, True, 1.5, "2", None, 10**400])
def test_what_is_no_version_is_refused(version: object) -> None:
    with pytest.raises(UntrustedError) as refusal:
        check_version("timestamp", version, {})
    assert refusal.value.code == "bad_metadata"


def test_an_older_version_is_refused_and_the_same_one_is_not() -> None:
    marks = {"timestamp": Mark(5)}
    assert check_version("timestamp", 5, marks) == 5
    assert check_version("timestamp", 6, marks) == 6
    assert check_version("snapshot", 1, marks) == 1
    with pytest.raises(UntrustedError) as refusal:
        check_version("timestamp", 4, marks)
    assert refusal.value.code == "metadata_old"


def test_a_role_is_rotated_when_too_few_old_keys_are_left_for_its_threshold() -> None:
    assert is_rotated(RoleKeys(frozenset("a"), 1), RoleKeys(frozenset("b"), 1))
    assert not is_rotated(RoleKeys(frozenset("a"), 1), RoleKeys(frozenset("ab"), 1))
    assert is_rotated(RoleKeys(frozenset("ab"), 2), RoleKeys(frozenset("bcd"), 2))
    assert not is_rotated(RoleKeys(frozenset("abc"), 2), RoleKeys(frozenset("bcd"), 2))


@given(KEYS, KEYS, st.integers(1, 4))
def test_nothing_that_only_old_keys_have_signed_is_valid_after_a_rotation(
    old: frozenset[str], new: frozenset[str], threshold: int
) -> None:
    best_old_signatures = len(old & new)
    rotated = is_rotated(RoleKeys(old, 1), RoleKeys(new, threshold))
    assert rotated == (best_old_signatures < threshold)


def test_a_new_root_drops_the_marks_of_rotated_roles_only() -> None:
    marks = {role: Mark(9, 9.0) for role in ROLES}
    old = {role: RoleKeys(frozenset("a"), 1) for role in ROLES}
    new = {**old, "timestamp": RoleKeys(frozenset("b"), 1), "root": RoleKeys(frozenset("c"), 1)}
    assert after_root(marks, old, new) == {role: Mark(9, 9.0) for role in ("root", "snapshot", "targets")}
    assert after_root(marks, old, {}) == {"root": Mark(9, 9.0)}


def test_of_two_looks_that_overlapped_the_later_turns_nothing_back() -> None:
    stored = {"root": Mark(3), "timestamp": Mark(9, 9.0), "targets": Mark(2)}
    older = {"root": Mark(3), "timestamp": Mark(7, 7.0), "snapshot": Mark(4)}
    assert merged(stored, older) == {**stored, "snapshot": Mark(4)}
    assert merged(older, stored) == {**stored, "snapshot": Mark(4)}


def test_a_look_under_an_older_root_counts_for_nothing_and_one_under_a_newer_may_drop_marks() -> None:
    stored = {"root": Mark(3), "timestamp": Mark(9), "targets": Mark(2)}
    assert merged(stored, {"root": Mark(2), "timestamp": Mark(50)}) == stored
    assert merged(stored, {"timestamp": Mark(50)}) == stored
    assert merged(stored, {"root": Mark(4), "targets": Mark(1)}) == {"root": Mark(4), "targets": Mark(2)}
    assert merged({}, stored) == stored


@given(st.floats(0, 1e10), st.floats(0, 1e10), st.lists(st.floats(0, 1e10), max_size=4))
def test_the_time_is_never_before_what_is_known(built: float, hub: float, issued: list[float]) -> None:
    marks = {role: Mark(1, at) for role, at in zip(ROLES, issued, strict=False)}
    found = reference_time(built, marks, hub)
    assert found == max([built, hub, *issued])


class Marks(RuleBasedStateMachine):
    """A device's marks beside a plain list of everything that it believed under the present keys."""

    @initialize()
    def start(self) -> None:
        self.marks: dict[str, Mark] = {}
        self.believed: dict[str, list[tuple[int, float]]] = {role: [] for role in ROLES}
        self.keys = {role: RoleKeys(frozenset("a"), 1) for role in ROLES}

    @rule(role=st.sampled_from(ROLES), version=st.integers(-1, 12), issued=st.floats(0, 100))
    def look(self, role: str, version: int, issued: float) -> None:
        newest = max((each for each, _ in self.believed[role]), default=1)
        try:
            check_version(role, version, self.marks)
        except UntrustedError:
            assert version < newest or version < 1
        else:
            assert version >= newest
            self.marks = raised(self.marks, role, version, issued)
            self.believed[role].append((version, issued))

    @rule(role=st.sampled_from(ROLES[1:]), new=KEYS, data=st.data())
    def rotate(self, role: str, new: frozenset[str], data: Any) -> None:
        keys = {**self.keys, role: RoleKeys(new, data.draw(st.integers(1, len(new))))}
        if is_rotated(self.keys[role], keys[role]):
            self.believed[role] = []
        self.marks = after_root(self.marks, self.keys, keys)
        self.keys = keys

    @invariant()
    def marks_are_the_newest_of_what_was_believed(self) -> None:
        for role, believed in getattr(self, "believed", {}).items():
            if believed:
                assert self.marks[role] == Mark(max(v for v, _ in believed), max(at for _, at in believed))
            else:
                assert role not in self.marks


TestMarks = Marks.TestCase
