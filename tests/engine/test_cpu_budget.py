"""Engines share the cores: never more at work than there are, in the order of asking."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import pytest

from appliance.engine.cpu_budget import CpuBudget, CpuShare

DEADLINE_S = 10.0


def until(true: Callable[[], bool]) -> None:
    end = time.monotonic() + DEADLINE_S
    while not true():
        assert time.monotonic() < end, "it never came true"
        time.sleep(0)


class Asking:
    """A thread that asks for cores, and keeps them until it is told."""

    def __init__(self, budget: CpuBudget, threads: int, order: list[str], name: str) -> None:
        self.go_on = threading.Event()
        self.done = False
        waiting, free = budget.waiting, budget.free
        self._thread = threading.Thread(target=self._run, args=(budget, threads, order, name), daemon=True)
        self._thread.start()
        until(lambda: self.done or budget.waiting > waiting or budget.free < free)

    def _run(self, budget: CpuBudget, threads: int, order: list[str], name: str) -> None:
        with budget.turn(threads):
            order.append(name)
            assert self.go_on.wait(DEADLINE_S)
        self.done = True

    def end(self) -> None:
        self.go_on.set()
        self._thread.join(DEADLINE_S)
        assert self.done


def test_two_engines_that_fit_compute_at_the_same_time() -> None:
    budget, order = CpuBudget(4), list[str]()
    first, second = Asking(budget, 2, order, "first"), Asking(budget, 2, order, "second")
    until(lambda: order == ["first", "second"])
    assert (budget.free, budget.waiting) == (0, 0)
    first.end()
    second.end()
    assert budget.free == 4


def test_who_asks_for_many_is_not_overtaken_by_those_who_ask_for_few() -> None:
    budget, order = CpuBudget(2), list[str]()
    holder = Asking(budget, 1, order, "holder")
    large = Asking(budget, 2, order, "large")
    small = Asking(budget, 1, order, "small")  # would fit beside the holder
    assert (order, budget.waiting, budget.free) == (["holder"], 2, 1)
    holder.end()
    until(lambda: "large" in order)
    assert order == ["holder", "large"]
    large.end()
    until(lambda: "small" in order)
    small.end()
    assert (budget.free, budget.waiting) == (2, 0)


def test_who_wants_more_than_there_are_gets_all() -> None:
    budget = CpuBudget(2)
    with budget.turn(64):
        assert budget.free == 0
    with budget.turn(0):
        assert budget.free == 1
    assert budget.free == 2


def test_a_turn_that_ends_in_an_error_is_given_back() -> None:
    budget = CpuBudget(2)
    with pytest.raises(ZeroDivisionError), budget.turn(2):
        _ = 1 // 0
    assert budget.free == 2


def test_a_machine_without_cores_is_a_mistake() -> None:
    with pytest.raises(AssertionError, match="has cores"):
        CpuBudget(0)


def test_an_engine_that_computes_elsewhere_waits_for_nobody() -> None:
    budget = CpuBudget(1)
    with CpuShare(budget, 1).turn(), CpuShare(None, 1).turn():
        assert budget.free == 0


def test_many_engines_never_hold_more_cores_than_there_are_and_all_get_their_turns() -> None:
    budget, cores = CpuBudget(3), 3
    lock = threading.Lock()
    held = most = 0
    turns = dict.fromkeys(range(6), 0)

    def engine(number: int) -> None:
        nonlocal held, most
        threads = 1 + number % 4
        for _ in range(300):
            with budget.turn(threads):
                with lock:
                    held += min(threads, cores)
                    most = max(most, held)
                with lock:
                    held -= min(threads, cores)
            turns[number] += 1

    engines = [threading.Thread(target=engine, args=(number,), daemon=True) for number in turns]
    for each in engines:
        each.start()
    for each in engines:
        each.join(DEADLINE_S)
    assert set(turns.values()) == {300}
    assert most <= cores
    assert (budget.free, budget.waiting) == (cores, 0)
