"""What the worker delivered and the caller has not taken yet."""

from __future__ import annotations

import pytest

from appliance.core.errors import EngineError
from appliance.core.types import Delta, FinishReason
from appliance.engine.llama.generation import Admitted, Failed, Gained, LlamaGeneration

HELLO, WORLD = Delta(0, "Hello", 1), Delta(1, "World", 1)


class Caller:
    """Who accepted the work: counts how often it was told something."""

    def __init__(self, choices: int = 2) -> None:
        self.told = self.cancelled = 0
        self.generation = LlamaGeneration(
            model="tiny:1", prompt_tokens=3, choices=choices, now=1.0, cancel=self.note_cancelled
        )
        self.generation.notify(self.note)

    def note(self) -> None:
        self.told += 1

    def note_cancelled(self) -> None:
        self.cancelled += 1


def test_what_came_is_taken_once_and_in_its_order() -> None:
    caller = Caller()
    generation = caller.generation
    assert generation.take() == []
    generation.receive(Admitted(2, 2.0))
    assert caller.told == 0  # nothing to take yet
    generation.receive(Gained(HELLO, 3.0))
    generation.receive(Gained(WORLD, 4.0))
    assert caller.told == 2
    assert generation.take() == [HELLO, WORLD]
    assert generation.take() == []
    assert generation.gained_at == {0: 3.0, 1: 4.0}
    assert generation.usage.completion_tokens == 2


def test_what_is_taken_does_not_grow_afterwards() -> None:
    caller = Caller()
    nothing = caller.generation.take()
    caller.generation.receive(Gained(HELLO, 3.0))
    assert nothing == []


def test_the_last_choices_end_is_the_end() -> None:
    caller = Caller()
    for index in range(2):
        assert not caller.generation.ended
        caller.generation.receive(Gained(Delta(index, "", 0, (), FinishReason.STOP), 3.0))
    assert caller.generation.ended
    assert caller.told == 2
    caller.generation.receive(Gained(HELLO, 4.0))  # too late: the step was under way
    assert len(caller.generation.take()) == 2


def test_an_error_is_raised_behind_what_came_before_it() -> None:
    caller = Caller()
    caller.generation.receive(Gained(HELLO, 3.0))
    caller.generation.receive(Failed(EngineError("Broken."), 4.0))
    assert caller.generation.ended
    assert caller.cancelled == 1
    assert caller.told == 2
    assert caller.generation.take() == [HELLO]
    for _ in range(2):
        with pytest.raises(EngineError, match="Broken"):
            caller.generation.take()


def test_work_without_a_listener_waits_to_be_taken() -> None:
    generation = LlamaGeneration(model="tiny:1", prompt_tokens=3, choices=1, now=1.0, cancel=lambda: None)
    generation.receive(Gained(HELLO, 3.0))
    assert generation.take() == [HELLO]
