"""The policy of parked states: a caller that does as it is told, and each rule by itself."""

from __future__ import annotations

from array import array
from itertools import takewhile

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from appliance.engine.llama.parked import ParkedStates
from appliance.engine.llama.parked_state import Action, Erase, Free, ParkedState, Write

EVER = 10**9


def ints(tokens: list[int]) -> array[int]:
    return array("i", tokens)


class Caller:
    """Does what it is told with a make-believe RAM and disk; writes end when the test says so."""

    def __init__(self, ram: int, disk: int, *, can_rewind: bool = True) -> None:
        self.states = ParkedStates(ram_bytes=ram, disk_bytes=disk, can_rewind=can_rewind)
        self.ram: dict[str, int] = {}
        self.disk: dict[str, int] = {}
        self.writing: list[str] = []
        self.sizes: dict[str, int] = {}
        self.log: list[Action] = []
        self.tick = 0

    def do(self, actions: list[Action]) -> list[Action]:
        self.log += actions
        for action in actions:
            match action:
                case Write(name):
                    assert name in self.ram, "what is written is in RAM"
                    assert self.states.being_written(name).id == name
                    assert name not in self.disk
                    assert name not in self.writing
                    self.writing.append(name)
                case Free(name):
                    assert name not in self.writing, "RAM is kept while it is written"
                    del self.ram[name]
                case Erase(name):
                    del self.disk[name]
        return actions

    def put(
        self, name: str, tokens: list[int], size: int = 1, *, pinned: bool = False, space: str = "", session: str = ""
    ) -> list[Action]:
        self.tick += 1
        self.ram[name] = self.sizes[name] = size
        state = ParkedState(name, ints(tokens), space, size, session, pinned)
        return self.do(self.states.put(state, self.tick))

    def restore(self, name: str, tokens: list[int], size: int = 1, *, pinned: bool = False) -> list[Action]:
        self.tick += 1
        self.disk[name] = self.sizes[name] = size
        return self.do(self.states.restore(ParkedState(name, ints(tokens), "", size, pinned=pinned), self.tick))

    def touch(self, name: str) -> None:
        self.tick += 1
        self.states.touch(name, self.tick)

    def promote(self, name: str) -> list[Action]:
        self.ram[name] = self.sizes[name]
        return self.do(self.states.promote(name))

    def end_write(self, name: str, *, well: bool = True) -> list[Action]:
        self.writing.remove(name)
        if not well:
            return self.do(self.states.failed(name))
        self.disk[name] = self.sizes[name]
        return self.do(self.states.written(name))

    def end_writes(self, *, well: bool = True) -> None:
        while self.writing:
            self.end_write(self.writing[0], well=well)

    def write_behind(self, unused_since: int = EVER) -> list[Action]:
        return self.do(self.states.write_behind(unused_since))

    def leave_ram(self, name: str) -> list[Action]:
        return self.do(self.states.leave_ram(name))

    def forget(self, session: str) -> frozenset[str]:
        waited, actions = self.states.forget({session})
        self.do(actions)
        return waited

    def best(self, tokens: list[int], limit: int | None = None) -> tuple[str, int] | None:
        found = self.states.best(ints(tokens), "", limit)
        return (found[0].id, found[1]) if found else None


some_tokens = st.lists(st.integers(0, 2), min_size=1, max_size=6)
indices = st.integers(0, 10**6)


class ParkedMachine(RuleBasedStateMachine):
    @initialize(ram=st.integers(0, 30), disk=st.integers(0, 40), can_rewind=st.booleans())
    def start(self, ram: int, disk: int, can_rewind: bool) -> None:
        self.caller = Caller(ram, disk, can_rewind=can_rewind)
        self.states = self.caller.states
        self.tokens: dict[str, tuple[str, list[int]]] = {}
        self.session = "session"
        self.sessions: dict[str, str] = {}

    def some_name(self, index: int) -> str:
        names = sorted(each for each in self.tokens if each in self.states)
        return names[index % len(names)]

    def new_name(self, space: str, tokens: list[int]) -> str:
        name = f"state {len(self.tokens)}"
        self.tokens[name] = (space, tokens)
        return name

    @rule(tokens=some_tokens, size=st.integers(1, 12), pinned=st.booleans(), space=st.sampled_from(["", "adapter"]))
    def put(self, tokens: list[int], size: int, pinned: bool, space: str) -> None:
        name = self.new_name(space, tokens)
        wanted = self.states.wants(ints(tokens), space, size)
        self.sessions[name] = self.session
        self.caller.put(name, tokens, size, pinned=pinned, space=space, session=self.session)
        if not wanted and not pinned:
            assert name not in self.caller.ram or name in self.caller.writing
            assert name not in self.states

    @rule(tokens=some_tokens, size=st.integers(1, 12), pinned=st.booleans())
    def restore(self, tokens: list[int], size: int, pinned: bool) -> None:
        self.caller.restore(self.new_name("", tokens), tokens, size, pinned=pinned)

    @precondition(lambda self: len(self.states) > 0)
    @rule(index=indices, more=some_tokens, size=st.integers(1, 12))
    def continue_one(self, index: int, more: list[int], size: int) -> None:
        space, tokens = self.tokens[self.some_name(index)]
        name = self.new_name(space, tokens + more)
        self.sessions[name] = self.session
        self.caller.put(name, tokens + more, size, space=space, session=self.session)

    @precondition(lambda self: len(self.states) > 0)
    @rule(index=indices, change=st.sampled_from(["touch", "drop", "promote", "leave", "pin", "unpin"]))
    def change(self, index: int, change: str) -> None:
        name = self.some_name(index)
        if change == "touch":
            self.caller.touch(name)
        elif change == "drop":
            self.caller.do(self.states.drop(name))
            assert name not in self.states
        elif change == "leave":
            self.caller.leave_ram(name)
        elif change != "promote":
            self.states.pin(name, pinned=change == "pin")
        elif self.states[name].in_ram:
            with pytest.raises(ValueError, match="already"):
                self.states.promote(name)
        else:
            self.caller.promote(name)

    @rule()
    def forget(self) -> None:
        """Forget the session of all that came since the last time; its name does not come again."""
        session, self.session = self.session, f"session {len(self.tokens)}"
        waited = self.caller.forget(session)
        gone = {each for each, theirs in self.sessions.items() if theirs == session}
        assert waited == gone & set(self.caller.writing)
        assert not gone & self.caller.disk.keys()
        assert gone & self.caller.ram.keys() <= waited
        assert not any(each in self.states for each in gone)

    @rule(well=st.booleans(), index=indices)
    def a_write_ends(self, well: bool, index: int) -> None:
        if self.caller.writing:
            self.caller.end_write(self.caller.writing[index % len(self.caller.writing)], well=well)

    @rule(ago=st.integers(0, 5))
    def write_behind(self, ago: int) -> None:
        self.caller.write_behind(self.caller.tick - ago)

    @rule(tokens=some_tokens, limit=st.none() | st.integers(0, 6))
    def look_up(self, tokens: list[int], limit: int | None) -> None:
        wanted = tokens[:limit]
        lengths = {}
        for name, (space, theirs) in self.tokens.items():
            length = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(theirs, wanted, strict=False)))
            if space == "" and name in self.states and (self.caller.states.can_rewind or length == len(theirs)):
                lengths[name] = length
        longest = max(lengths.values(), default=0)
        found = self.caller.best(tokens, limit)
        assert (found is None) == (longest == 0)
        if found is not None:
            equals = [self.states[each] for each, length in lengths.items() if length == longest]
            assert found[1] == longest
            assert self.states[found[0]] in equals
            assert self.states[found[0]].in_ram or not any(each.in_ram for each in equals)

    @invariant()
    def books_and_world_agree(self) -> None:
        self.states.check_integrity()
        caller, names = self.caller, [each for each in self.tokens if each in self.states]
        assert len(self.states) == len(names)
        assert {each for each in names if self.states[each].on_disk} == caller.disk.keys()
        assert {each for each in names if self.states[each].in_ram} == caller.ram.keys() - self.states._dropped.keys()
        assert sum(caller.ram.values()) == self.states.ram_used
        assert sum(caller.disk.values()) <= self.states.disk_bytes
        if not caller.writing:
            assert sum(caller.ram.values()) <= self.states.ram_bytes


TestParkedMachine = ParkedMachine.TestCase
TestParkedMachine.settings = settings(max_examples=200, stateful_step_count=50, deadline=None)


def test_the_state_unused_for_longest_goes_to_disk_and_then_is_gone() -> None:
    caller = Caller(ram=2, disk=2)
    for number, name in enumerate("abc"):
        caller.put(name, [number])
    assert caller.log == [Write("a")]
    caller.end_writes()
    assert caller.log == [Write("a"), Free("a")]
    caller.touch("b")
    caller.put("d", [3])
    caller.end_writes()
    assert (set(caller.ram), set(caller.disk)) == ({"b", "d"}, {"a", "c"})
    caller.put("e", [4])
    assert caller.log[-2:] == [Erase("a"), Write("b")]
    caller.end_writes()
    assert (set(caller.ram), set(caller.disk)) == ({"d", "e"}, {"b", "c"})
    assert "a" not in caller.states


def test_what_has_been_written_behind_leaves_ram_without_waiting() -> None:
    caller = Caller(ram=2, disk=2)
    caller.put("a", [1])
    caller.put("b", [2])
    assert caller.write_behind(unused_since=0) == []
    assert caller.write_behind(unused_since=1) == [Write("a")]
    caller.end_writes()
    assert caller.write_behind(unused_since=1) == []
    assert caller.put("c", [3]) == [Free("a")]
    assert caller.best([1]) == ("a", 1)


def test_only_a_state_that_is_in_a_file_gives_up_its_ram_before_others_need_it() -> None:
    caller = Caller(ram=2, disk=2)
    caller.put("a", [1])
    assert caller.leave_ram("a") == [], "its only copy"
    assert caller.leave_ram("unknown") == []
    caller.write_behind()
    assert caller.leave_ram("a") == [], "not written to its end"
    caller.end_writes()
    assert caller.leave_ram("a") == [Free("a")]
    assert caller.leave_ram("a") == []
    assert caller.best([1]) == ("a", 1)


def test_a_state_is_never_written_at_the_expense_of_one_used_later() -> None:
    caller = Caller(ram=2, disk=1)
    caller.put("a", [1])
    caller.put("b", [2])
    caller.touch("a")
    caller.write_behind()
    caller.end_writes()
    assert caller.disk.keys() == {"b"}
    assert caller.write_behind() == [Erase("b"), Write("a")]
    caller.end_writes()
    assert caller.write_behind() == []
    assert caller.put("c", [3]) == [Free("b")]


def test_a_longer_state_takes_the_place_of_the_shorter_but_its_file_only_when_its_own_is_complete() -> None:
    caller = Caller(ram=10, disk=10)
    caller.put("turn 1", [1, 2])
    caller.write_behind()
    caller.end_writes()
    caller.put("other", [1, 3])
    assert caller.put("turn 2", [1, 2, 3, 4]) == [Free("turn 1")]
    assert caller.disk.keys() == {"turn 1"}
    caller.write_behind()
    caller.end_writes()
    caller.write_behind()
    assert caller.disk.keys() == {"turn 1", "other"}, "turn 2 is being written: turn 1 can still be resumed"
    assert caller.end_write("turn 2") == [Erase("turn 1")]
    assert len(caller.states) == 2


def test_when_the_longer_state_cannot_be_written_the_shorter_ones_file_stays() -> None:
    caller = Caller(ram=10, disk=10)
    caller.put("turn 1", [1, 2])
    caller.write_behind()
    caller.end_writes()
    caller.put("turn 2", [1, 2, 3])
    caller.write_behind()
    caller.end_writes(well=False)
    assert caller.disk.keys() == {"turn 1"}
    assert caller.best([1, 2, 3, 4]) == ("turn 2", 3)
    assert caller.write_behind() == [], "what failed is not tried again"
    caller.do(caller.states.drop("turn 2"))
    assert caller.best([1, 2, 3, 4]) == ("turn 1", 2)


def test_a_shorter_state_that_is_being_written_is_written_to_its_end() -> None:
    caller = Caller(ram=10, disk=10)
    caller.put("turn 1", [1, 2])
    caller.write_behind()
    assert caller.put("turn 2", [1, 2, 3]) == []
    assert caller.end_write("turn 1") == [Free("turn 1")]
    assert caller.disk.keys() == {"turn 1"}


def test_a_pinned_state_outlives_its_successors_and_everyone_else() -> None:
    caller = Caller(ram=2, disk=2)
    caller.put("prefix", [1, 2], pinned=True)
    for number in range(3, 20):
        caller.put(f"{number}", [1, 2, number])
        caller.end_writes()
    assert caller.best([1, 2, 99], limit=2) is not None
    assert "prefix" in caller.states
    caller.states.pin("prefix", pinned=False)
    for number in range(20, 30):
        caller.put(f"{number}", [1, 2, number])
        caller.end_writes()
    assert "prefix" not in caller.states


def test_when_pinned_states_fill_everything_a_newcomer_is_freed_at_once() -> None:
    caller = Caller(ram=2, disk=0)
    caller.put("a", [1], pinned=True)
    caller.put("b", [2], pinned=True)
    assert caller.put("c", [3]) == [Free("c")]
    assert caller.put("d", [4], pinned=True) == [Free("d")]
    assert caller.ram.keys() == {"a", "b"}


def test_a_pinned_state_that_cannot_be_written_is_gone_rather_than_over_the_cap() -> None:
    caller = Caller(ram=1, disk=1)
    caller.put("a", [1], pinned=True)
    assert caller.put("b", [2]) == [Write("a")]
    caller.end_writes(well=False)
    assert caller.ram.keys() == {"b"}
    assert "a" not in caller.states


@pytest.mark.parametrize(("disk", "kept"), [(10, True), (4, False)])
def test_a_state_larger_than_ram_goes_to_disk_alone_or_is_freed(disk: int, kept: bool) -> None:
    caller = Caller(ram=3, disk=disk)
    caller.put("small", [1], 3)
    assert caller.states.wants(ints([2]), "", 5) is kept
    caller.put("large", [2], 5)
    caller.end_writes()
    assert caller.ram.keys() == {"small"}
    assert ("large" in caller.disk) is kept
    if kept:
        assert caller.promote("large") == [Free("large")]


def test_a_state_that_others_cover_is_freed_and_they_count_as_used() -> None:
    caller = Caller(ram=2, disk=0)
    caller.put("a", [1, 2, 3])
    caller.put("b", [4])
    assert not caller.states.wants(ints([1, 2]), "", 1)
    assert caller.states.wants(ints([1, 2]), "adapter", 1)
    assert caller.put("c", [1, 2]) == [Free("c")]
    assert caller.put("d", [5]) == [Free("b")]
    with pytest.raises(ValueError, match="already"):
        caller.states.put(ParkedState("a", ints([9]), "", 1), 0)


def test_a_memory_that_cannot_rewind_is_resumed_only_from_a_whole_state() -> None:
    caller = Caller(ram=9, disk=0, can_rewind=False)
    caller.put("turn 2", [1, 2, 3, 4])
    caller.put("turn 1", [1, 2])
    assert caller.best([1, 2, 3, 5]) == ("turn 1", 2)
    assert caller.best([1, 2, 3, 4, 5]) == ("turn 2", 4)
    assert caller.best([1, 2, 3, 4], limit=3) == ("turn 1", 2)
    assert caller.best([1, 5]) is None


def test_ram_comes_before_disk_and_small_before_large() -> None:
    caller = Caller(ram=20, disk=20)
    caller.restore("on disk", [1, 2, 3], 1)
    caller.put("large", [1, 2, 4], 9)
    caller.put("small", [1, 2, 5], 5)
    assert caller.best([1, 2, 9]) == ("small", 2)
    caller.promote("on disk")
    assert caller.best([1, 2, 9]) == ("on disk", 2)


def test_after_a_restart_the_cap_holds_and_left_over_turns_go() -> None:
    caller = Caller(ram=0, disk=3)
    assert caller.restore("old", [9], 2) == []
    assert caller.restore("turn 1", [1]) == []
    assert caller.restore("turn 2", [1, 2]) == [Erase("turn 1")]
    assert caller.restore("turn 0", [1]) == [Erase("turn 0")]
    assert caller.restore("new", [8], 2) == [Erase("old")]
    assert caller.disk.keys() == {"turn 2", "new"}
    caller.states.pin("turn 2", pinned=True)
    caller.states.pin("new", pinned=True)
    assert caller.restore("too much", [7], 2, pinned=True) == [Erase("too much")]


def test_a_state_dropped_while_it_is_written_leaves_nothing() -> None:
    for well in (True, False):
        caller = Caller(ram=2, disk=2)
        caller.put("a", [1])
        caller.write_behind()
        assert caller.do(caller.states.drop("a")) == []
        assert caller.best([1]) is None
        with pytest.raises(ValueError, match="already"):
            caller.states.put(ParkedState("a", ints([1]), "", 1), 0)
        caller.end_writes(well=well)
        assert (caller.ram, caller.disk) == ({}, {})
        assert caller.states.drop("a") == []
        caller.states.check_integrity()


def test_a_damaged_book_is_noticed() -> None:
    caller = Caller(ram=2, disk=2)
    caller.put("a", [1])
    caller.states.ram_used = 0
    with pytest.raises(AssertionError, match="RAM in use"):
        caller.states.check_integrity()


def test_a_session_is_forgotten_wherever_its_states_are_and_nobody_elses_are() -> None:
    caller = Caller(ram=10, disk=10)
    caller.put("on disk", [1], session="a")
    caller.write_behind()
    caller.end_writes()
    caller.leave_ram("on disk")
    caller.put("in both", [2], session="a")
    caller.write_behind()
    caller.end_writes()
    caller.put("in ram", [3], session="a", pinned=True)
    caller.put("other", [4], session="b")
    caller.put("nobody's", [5])
    assert caller.forget("a") == frozenset()
    assert (set(caller.ram), set(caller.disk)) == ({"other", "nobody's"}, set())
    assert caller.best([1]) is None
    caller.states.check_integrity()


@pytest.mark.parametrize("well", [True, False])
def test_what_is_being_written_of_a_forgotten_session_goes_when_that_has_ended(well: bool) -> None:
    caller = Caller(ram=10, disk=10)
    caller.put("a", [1], session="a")
    caller.write_behind()
    assert caller.forget("a") == {"a"}
    assert caller.forget("a") == {"a"}, "it is asked for again, and still not gone"
    assert caller.best([1]) is None
    assert caller.end_write("a", well=well) == [Free("a"), *([Erase("a")] if well else [])]
    assert caller.forget("a") == frozenset()
    caller.states.check_integrity()
