"""What token sequences have in common: of two, by comparison; of any number, by a radix tree (pure).

The tree maps *holders* (slots, parked states) to their sequences and keeps what they share once. A sequence may end
inside a node, so a holder that grows or shrinks rarely moves a token:

                              ┌─[ question A · answer A ]        holders {0}
    root ──[ system prompt ]──┤      holders {0, 1, 2}, 2 ends inside
                              └─[ question B ]                   holders {1}

Holders of different *spaces* (adapters, say) share nothing: each space has a root of its own.

Invariants, checked by `check_integrity`: a node's `holders` are exactly those whose sequence reaches past its start; a
leaf ends where its longest holder ends; every other node but a root has two children or more; a holder's place is the
deepest node that it reaches into.
"""

from __future__ import annotations

from array import array
from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import Generic, TypeVar

H = TypeVar("H", bound=Hashable)


@dataclass(eq=False, slots=True)
class _Node(Generic[H]):
    """A run of tokens at consecutive positions from `start`, shared by its holders as far as each of them goes."""

    start: int
    tokens: array[int]
    parent: _Node[H] | None
    children: dict[int, _Node[H]] = field(default_factory=dict)
    holders: set[H] = field(default_factory=set)

    @property
    def end(self) -> int:
        return self.start + len(self.tokens)


@dataclass(eq=False, slots=True)
class _Place(Generic[H]):
    """Where a holder's sequence ends."""

    space: Hashable
    node: _Node[H]
    length: int = 0


class PrefixTree(Generic[H]):
    """The sequences of many holders; what an operation costs grows with the tokens it names, not with those held."""

    def __init__(self) -> None:
        """Start without holders."""
        self._roots: dict[Hashable, _Node[H]] = {}
        self._places: dict[H, _Place[H]] = {}

    def __len__(self) -> int:
        return len(self._places)

    def __contains__(self, holder: H) -> bool:
        return holder in self._places

    def length(self, holder: H) -> int:
        """Return how many tokens the holder has."""
        return self._places[holder].length

    def insert(self, holder: H, tokens: array[int], space: Hashable = None) -> None:
        """Add a holder with its sequence, which may be empty.

        Raises:
            ValueError: It is in the tree already.
        """
        if holder in self._places:
            raise ValueError(f"{holder!r} is in the tree already")
        root = self._roots.setdefault(space, _Node(0, array("i"), None))
        root.holders.add(holder)
        self._places[holder] = _Place(space, root)
        self.extend(holder, tokens)

    def extend(self, holder: H, tokens: array[int]) -> None:
        """Add tokens to the end of a holder's sequence. Costs these tokens only, however long the sequence is."""
        place = self._places[holder]
        at = 0
        while at < len(tokens):
            node = place.node
            if place.length < node.end:
                shared = _shared(node.tokens, place.length - node.start, tokens, at, len(tokens))
                place.length += shared
                at += shared
                if at < len(tokens) and place.length < node.end:
                    self._split(node, place.length)
            elif child := node.children.get(tokens[at]):
                child.holders.add(holder)
                place.node = child
            else:
                self._add_end(holder, place, tokens[at:])
                return

    def truncate(self, holder: H, length: int) -> None:
        """Drop everything of a holder's sequence past its first `length` tokens."""
        place = self._places[holder]
        if length >= place.length:
            return
        place.length = length
        node = place.node
        while node.parent is not None and node.start >= length:
            node.holders.remove(holder)
            if node.holders:
                self._tidy(node)
            else:
                del node.parent.children[node.tokens[0]]
            node = node.parent
        place.node = node
        self._tidy(node)

    def remove(self, holder: H) -> None:
        """Forget a holder and what only it had."""
        self.truncate(holder, 0)
        place = self._places.pop(holder)
        place.node.holders.remove(holder)
        if not place.node.holders:
            del self._roots[place.space]

    def match(self, tokens: array[int], space: Hashable = None, limit: int | None = None) -> tuple[int, set[H]]:
        """Return the length of the longest prefix of `tokens[:limit]` that any holder has, and all who have it."""
        matched, path = self._walk(tokens, space, limit)
        if not matched:
            return 0, set()
        return matched, {each for each in path[-1].holders if self._places[each].length >= matched}

    def matches(
        self, tokens: array[int], space: Hashable = None, limit: int | None = None, *, most: int = 16
    ) -> list[tuple[int, H]]:
        """Return the holders that share most with `tokens[:limit]`, and how many tokens each; longest first.

        Args:
            tokens: The sequence to look up.
            space: Whose holders count.
            limit: How many of the tokens count; None is all.
            most: How many holders are returned at most. Who shares nothing is never returned.
        """
        matched, path = self._walk(tokens, space, limit)
        found: list[tuple[int, H]] = []
        deeper: set[H] = set()
        for node in reversed(path):
            reach = min(matched, node.end)
            rest = [(min(reach, self._places[each].length), each) for each in node.holders - deeper]
            found += sorted(rest, key=lambda each: -each[0])[: most - len(found)]
            if len(found) >= most:
                break
            deeper = node.holders
        return found

    def prefixes(self, tokens: array[int], space: Hashable = None, limit: int | None = None) -> list[tuple[int, H]]:
        """Return the holders whose whole sequence is a prefix of `tokens[:limit]`, and its length; longest first."""
        matched, path = self._walk(tokens, space, limit)
        found = [
            (place.length, each)
            for node in path
            for each in node.holders
            if (place := self._places[each]).node is node and place.length <= matched
        ]
        return sorted(found, key=lambda each: -each[0])

    def check_integrity(self) -> None:
        """Verify the tree.

        Raises:
            AssertionError: An invariant of this module's docstring does not hold.
        """
        seen: set[H] = set()
        for space, root in self._roots.items():
            assert root.holders, "an empty space"
            assert all(self._places[each].space == space for each in root.holders), "a holder in another's space"
            seen |= root.holders
            nodes = [root]
            while nodes:
                node = nodes.pop()
                self._check_node(node)
                nodes += node.children.values()
        assert seen == self._places.keys(), "a holder outside the tree"

    def _check_node(self, node: _Node[H]) -> None:
        lengths = {each: self._places[each].length for each in node.holders}
        here = {each for each in node.holders if self._places[each].node is node}
        deeper = [each for child in node.children.values() for each in child.holders]
        assert len(here) + len(deeper) == len(node.holders), "a holder in two places"
        assert here.union(deeper) == node.holders, "a holder that its place does not know"
        assert all(lengths[each] <= node.end for each in here), "a holder reaches past its place"
        for first, child in node.children.items():
            assert child.parent is node, "a child of another"
            assert child.tokens[0] == first, "a child under the wrong token"
            assert child.start == node.end, "a gap between a node and its child"
        if node.parent is not None:
            assert min(lengths.values()) > node.start, "a holder in a node that it does not reach"
            assert len(node.children) != 1, "a chain of nodes"
            assert node.children or max(lengths.values()) == node.end, "tokens that nobody holds"

    def _walk(self, tokens: array[int], space: Hashable, limit: int | None) -> tuple[int, list[_Node[H]]]:
        """Return how many tokens match and the nodes they lead through, without the root."""
        node = self._roots.get(space)
        stop = len(tokens) if limit is None else min(max(limit, 0), len(tokens))
        at, path = 0, list[_Node[H]]()
        while node is not None and at == node.end and at < stop and (node := node.children.get(tokens[at])):
            path.append(node)
            at += _shared(node.tokens, 0, tokens, at, stop)
        return at, path

    def _add_end(self, holder: H, place: _Place[H], tokens: array[int]) -> None:
        """Add tokens that no other holder of the place has: to its node where that is the end, else in a new one."""
        node = place.node
        if node.children or node.parent is None:
            node.children[tokens[0]] = place.node = _Node(place.length, tokens, node, holders={holder})
        else:
            node.tokens.extend(tokens)
        place.length += len(tokens)

    def _split(self, node: _Node[H], position: int) -> None:
        """Cut a node in two; those who reach past the position now hold both."""
        cut = position - node.start
        holders = {each for each in node.holders if self._places[each].length > position}
        tail = _Node(position, node.tokens[cut:], node, node.children, holders)
        del node.tokens[cut:]
        node.children = {tail.tokens[0]: tail}
        self._adopt(tail, node, holders)

    def _tidy(self, node: _Node[H]) -> None:
        """Restore the invariants of a node that a holder has left or ends earlier in."""
        if node.parent is None:
            return
        if not node.children:
            end = max(self._places[each].length for each in node.holders)
            del node.tokens[end - node.start :]
        elif len(node.children) == 1:
            (child,) = node.children.values()
            node.tokens.extend(child.tokens)
            node.children = child.children
            self._adopt(node, child, child.holders)

    def _adopt(self, node: _Node[H], former: _Node[H], holders: set[H]) -> None:
        """Let a node's children and those of the holders who ended in the former node know where they are now."""
        for child in node.children.values():
            child.parent = node
        for each in holders:
            place = self._places[each]
            if place.node is former:
                place.node = node


def _shared(left: array[int], left_at: int, right: array[int], right_at: int, right_end: int) -> int:
    """Return how many tokens two arrays share from two places on; of the right one only up to `right_end`."""
    low, high = 0, min(len(left) - left_at, min(right_end, len(right)) - right_at)
    middle = high  # most often all of it is shared
    while low < high:
        if left[left_at + low : left_at + middle] == right[right_at + low : right_at + middle]:
            low = middle
        else:
            high = middle - 1
        middle = (low + high + 1) // 2
    return low
