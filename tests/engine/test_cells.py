"""The cell ledger against the obvious model: a set of cell numbers for each slot."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from appliance.engine.llama.cells import CellLedger

CELLS, SLOTS = 60, 4
slots = st.integers(0, SLOTS - 1)


class LedgerMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.ledger = CellLedger(cells=CELLS, slots=SLOTS)
        self.model: list[list[int]] = [[] for _ in range(SLOTS)]
        self.next_cell = 0

    @property
    def used(self) -> int:
        return len({cell for chain in self.model for cell in chain})

    @rule(slot=slots, tokens=st.integers(0, 20))
    def extend(self, slot: int, tokens: int) -> None:
        if tokens > CELLS - self.used:
            with pytest.raises(ValueError, match="free"):
                self.ledger.extend(slot, tokens)
            return
        self.ledger.extend(slot, tokens)
        self.model[slot] += range(self.next_cell, self.next_cell + tokens)
        self.next_cell += tokens

    @rule(source=slots, newcomer=slots, length=st.integers(0, 30))
    def fork(self, source: int, newcomer: int, length: int) -> None:
        if self.model[newcomer]:
            with pytest.raises(ValueError, match="not empty"):
                self.ledger.fork(source, newcomer, length)
        elif length > len(self.model[source]):
            with pytest.raises(ValueError, match="holds"):
                self.ledger.fork(source, newcomer, length)
        else:
            self.ledger.fork(source, newcomer, length)
            self.model[newcomer] = self.model[source][:length]

    @rule(slot=slots, length=st.integers(0, 30))
    def truncate(self, slot: int, length: int) -> None:
        self.ledger.truncate(slot, length)
        del self.model[slot][length:]

    @invariant()
    def counts_agree(self) -> None:
        self.ledger.check_integrity()
        assert self.ledger.used == self.used
        assert self.ledger.free == CELLS - self.used
        for slot in range(SLOTS):
            assert self.ledger.length(slot) == len(self.model[slot])
            others = [each for each in range(SLOTS) if each != slot]
            assert self.ledger.used_by(others) == len({cell for each in others for cell in self.model[each]})


TestLedgerMachine = LedgerMachine.TestCase
TestLedgerMachine.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)


def test_a_damaged_book_is_noticed() -> None:
    ledger = CellLedger(cells=CELLS, slots=SLOTS)
    ledger.extend(0, 10)
    ledger.used = 9
    with pytest.raises(AssertionError, match="used cells"):
        ledger.check_integrity()
