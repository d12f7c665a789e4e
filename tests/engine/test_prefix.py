"""The prefix tree against the obvious model: a dictionary of lists."""

from __future__ import annotations

from array import array
from itertools import takewhile

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, initialize, invariant, rule

from appliance.engine.llama.prefix import PrefixTree

SPACES = (None, "adapter")

# Few different tokens and some long runs of one, so that sequences share much and part everywhere.
some_tokens = st.lists(st.integers(0, 2), max_size=6) | st.integers(0, 40).map(lambda length: [1] * length)
spaces = st.sampled_from(SPACES)
limits = st.none() | st.integers(-1, 30)


def ints(tokens: list[int]) -> array[int]:
    return array("i", tokens)


def shared(left: list[int], right: list[int]) -> int:
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(left, right, strict=False)))


class TreeMachine(RuleBasedStateMachine):
    holders: Bundle[int] = Bundle("holders")

    @initialize()
    def start(self) -> None:
        self.tree: PrefixTree[int] = PrefixTree()
        self.model: dict[int, tuple[str | None, list[int]]] = {}
        self.next_holder = 0

    def add(self, tokens: list[int], space: str | None) -> int:
        self.next_holder += 1
        self.tree.insert(self.next_holder, ints(tokens), space)
        self.model[self.next_holder] = (space, list(tokens))
        return self.next_holder

    @rule(target=holders, tokens=some_tokens, space=spaces)
    def insert(self, tokens: list[int], space: str | None) -> int:
        return self.add(tokens, space)

    @rule(target=holders, other=holders, length=st.integers(0, 60), tokens=some_tokens)
    def insert_a_relative(self, other: int, length: int, tokens: list[int]) -> int:
        space, theirs = self.model[other]
        return self.add(theirs[:length] + tokens, space)

    @rule(holder=holders, tokens=some_tokens)
    def extend(self, holder: int, tokens: list[int]) -> None:
        self.tree.extend(holder, ints(tokens))
        self.model[holder][1].extend(tokens)

    @rule(holder=holders, other=holders, tokens=st.integers(0, 10))
    def follow_another(self, holder: int, other: int, tokens: int) -> None:
        """Grow as another sequence did, a few tokens at a time."""
        mine, theirs = self.model[holder][1], self.model[other][1]
        more = theirs[len(mine) : len(mine) + tokens]
        self.tree.extend(holder, ints(more))
        mine.extend(more)

    @rule(holder=holders, length=st.integers(0, 40))
    def truncate(self, holder: int, length: int) -> None:
        self.tree.truncate(holder, length)
        del self.model[holder][1][length:]

    @rule(holder=consumes(holders))
    def remove(self, holder: int) -> None:
        self.tree.remove(holder)
        del self.model[holder]

    @rule(target=holders, holder=consumes(holders))
    def insert_one_that_is_there(self, holder: int) -> int:
        with pytest.raises(ValueError, match="already"):
            self.tree.insert(holder, ints([1]), "adapter")
        return holder

    @rule(other=holders, length=st.integers(0, 60), tokens=some_tokens, space=spaces, limit=limits)
    def look_up_a_relative(
        self, other: int, length: int, tokens: list[int], space: str | None, limit: int | None
    ) -> None:
        self.look_up(self.model[other][1][:length] + tokens, space, limit, most=3)

    @rule(tokens=some_tokens, space=spaces, limit=limits, most=st.integers(1, 4))
    def look_up(self, tokens: list[int], space: str | None, limit: int | None, most: int) -> None:
        wanted = tokens if limit is None else tokens[: max(limit, 0)]
        theirs = {each: held for each, (where, held) in self.model.items() if where == space}
        lengths = {each: n for each, held in theirs.items() if (n := shared(held, wanted))}
        longest = max(lengths.values(), default=0)
        having = {each for each, length in lengths.items() if length == longest}
        assert self.tree.match(ints(tokens), space, limit) == (longest, having)

        found = self.tree.matches(ints(tokens), space, limit, most=most)
        assert [length for length, _ in found] == sorted(lengths.values(), reverse=True)[:most]
        assert all(lengths[each] == length for length, each in found)
        assert len({each for _, each in found}) == len(found)

        whole = {each: length for each, length in lengths.items() if length == len(theirs[each])}
        found = self.tree.prefixes(ints(tokens), space, limit)
        assert {each: length for length, each in found} == whole
        assert [length for length, _ in found] == sorted(whole.values(), reverse=True)

    @invariant()
    def books_agree(self) -> None:
        self.tree.check_integrity()
        assert len(self.tree) == len(self.model)
        for holder, (space, tokens) in self.model.items():
            assert holder in self.tree
            assert self.tree.length(holder) == len(tokens)
            length, having = self.tree.match(ints(tokens), space)
            assert length == len(tokens)
            assert holder in having or not tokens
        distinct = {(space, tuple(held[: n + 1])) for space, held in self.model.values() for n in range(len(held))}
        assert tokens_kept(self.tree) == len(distinct), "what is shared is kept once, and nothing else is kept"


def tokens_kept(tree: PrefixTree[int]) -> int:
    nodes, count = list(tree._roots.values()), 0
    while nodes:
        node = nodes.pop()
        count += len(node.tokens)
        nodes += node.children.values()
    return count


TestTreeMachine = TreeMachine.TestCase
TestTreeMachine.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)


class Counted(array):  # type: ignore[type-arg]
    """An array that counts the tokens that are copied out of it or into it."""

    moved = 0

    def __getitem__(self, index):  # type: ignore[no-untyped-def]
        part = super().__getitem__(index)
        if isinstance(index, slice):
            Counted.moved += len(part)
            return Counted("i", part)
        return part

    def extend(self, tokens):  # type: ignore[no-untyped-def]
        Counted.moved += len(tokens)
        super().extend(tokens)


@pytest.mark.parametrize("history", [100, 10_000])
@pytest.mark.parametrize("followers", [0, 1])
def test_growing_costs_the_new_tokens_and_not_the_history(history: int, followers: int) -> None:
    tree: PrefixTree[int] = PrefixTree()
    tree.insert(0, Counted("i", range(history)))
    for follower in range(1, followers + 1):
        tree.insert(follower, Counted("i", range(history)))
    Counted.moved = 0
    for token in range(50):
        for holder in range(followers + 1):
            tree.extend(holder, Counted("i", [token]))
    assert Counted.moved <= 50 * (followers + 1) * 3
    tree.check_integrity()
    assert tokens_kept(tree) == history + 50


@pytest.mark.parametrize("length", [1, 4_095, 4_096, 9_999])
def test_a_look_up_compares_each_token_a_few_times_at_most(length: int) -> None:
    tree: PrefixTree[int] = PrefixTree()
    tree.insert(0, Counted("i", range(10_000)))
    wanted = Counted("i", [*range(length), -1, *range(length)])
    Counted.moved = 0
    assert tree.match(wanted) == (length, {0})
    assert Counted.moved <= 6 * 10_000


def test_a_damaged_tree_is_noticed() -> None:
    tree: PrefixTree[str] = PrefixTree()
    tree.insert("a", ints([1, 2, 3]))
    tree.insert("b", ints([1, 2]))
    tree._places["a"].length = 2
    with pytest.raises(AssertionError, match="nobody holds"):
        tree.check_integrity()
