"""What comes next in a response, decided from its journal."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from appliance.agents.loop import (
    Action,
    Ask,
    Call,
    Called,
    End,
    Entry,
    Limits,
    Offer,
    Resumed,
    Returned,
    Run,
    Said,
    Settle,
    decide,
    parsed_arguments,
)
from appliance.core.tools import ToolResult

OFFER = Offer(functions=frozenset({"clock"}), built_in=frozenset({"search", "pay"}), guarded=frozenset({"pay"}))
OK = ToolResult("ok", "found")


def call(number: int, name: str = "search", arguments: str = "{}", *, approved: bool = False) -> Call:
    return Call(f"call_{number}", name, arguments, f"mcp_{number}", approved)


def said(*calls: Call, complete: bool = True, tokens: int = 1) -> Said:
    return Said(calls=calls, complete=complete, written_tokens=tokens)


def answered(number: int, name: str = "search", arguments: str | None = None, result: ToolResult = OK) -> list[Entry]:
    """Return a step with one call and its result, which differ from those of other numbers."""
    each = call(number, name, arguments if arguments is not None else f'{{"n": {number}}}')
    return [said(each), Called(each.id), Returned(each.id, result)]


def next_of(journal: Sequence[Entry], offer: Offer = OFFER, limits: Limits = Limits(), elapsed_s: float = 0) -> Action:  # noqa: B008
    return decide(journal, offer, limits, elapsed_s)


def test_at_first_the_model_is_asked_with_the_clients_choice() -> None:
    assert next_of([]) == Ask("given")
    assert next_of([], replace(OFFER, most_tokens=9)) == Ask("given", 9)
    assert next_of([Resumed()]) == Ask("given")


def test_an_answer_ends_the_response() -> None:
    assert next_of([said()]) == End("answered")


def test_an_answer_that_was_cut_off_runs_none_of_its_calls() -> None:
    assert next_of([said(call(1), complete=False)]) == End("cut")


def test_calls_of_one_step_run_side_by_side_and_then_the_model_is_asked() -> None:
    step = said(call(1), call(2, arguments='{"q": 1}'))
    assert next_of([step]) == Run(step.calls)
    begun: list[Entry] = [step, Called("call_1"), Called("call_2")]
    assert next_of([*begun, Returned("call_2", OK), Returned("call_1", OK)]) == Ask("auto")


def test_a_call_of_a_tool_that_was_not_offered_is_told_so() -> None:
    action = next_of([said(call(1, "shell"))])
    assert isinstance(action, Settle)
    assert action.result.kind == "unknown_tool"
    assert "clock, pay, search" in action.result.output
    nothing = next_of([said(call(1, "shell"))], Offer())
    assert isinstance(nothing, Settle)
    assert "none" in nothing.result.output


@pytest.mark.parametrize("arguments", ["{", "[1]", "7", '{"a": ' * 100_000])
def test_arguments_that_are_no_object_are_told_so(arguments: str) -> None:
    action = next_of([said(call(1, arguments=arguments))])
    assert isinstance(action, Settle)
    assert action.result.kind == "bad_arguments"


def test_no_arguments_are_an_empty_object() -> None:
    assert parsed_arguments("") == {}
    assert next_of([said(call(1, arguments=""))]) == Run((call(1, arguments=""),))


def test_a_call_that_a_restart_interrupted_counts_as_failed_and_is_not_made_again() -> None:
    action = next_of([said(call(1)), Called("call_1"), Resumed()])
    assert isinstance(action, Settle)
    assert action.result.kind == "failed"
    assert "interrupted" in action.result.output
    assert next_of([said(call(1)), Called("call_1"), Resumed(), Returned("call_1", action.result)]) == Ask("auto")


def test_a_call_that_was_kept_and_not_begun_runs_after_a_restart() -> None:
    assert next_of([said(call(1)), Resumed()]) == Run((call(1),))


def test_the_clients_functions_are_handed_out_after_the_boxs_own_calls() -> None:
    step = said(call(1), call(2, "clock", "not JSON"))
    assert next_of([step]) == Run((call(1),))
    assert next_of([step, Called("call_1"), Returned("call_1", OK)]) == End("handed_out")


def test_a_call_that_needs_a_person_waits_for_one() -> None:
    step = said(call(1, "pay"))
    assert next_of([step]) == End("approval", step.calls)
    agreed = call(1, "pay", approved=True)
    assert next_of([Said(calls=(agreed,), by_model=False)]) == Run((agreed,))


def test_what_a_person_refused_is_never_run() -> None:
    agreed = call(1, "pay", approved=True)
    refused = Returned("call_1", ToolResult("refused", "no"))
    assert next_of([refused, Said(calls=(agreed,), by_model=False)]) == Ask("given")


def test_calls_over_the_limit_are_refused_and_the_last_question_offers_no_tool() -> None:
    limits = Limits(calls=2)
    step = said(call(1, arguments='{"a": 1}'), call(2), call(3, arguments='{"b": 1}'))
    assert next_of([step], limits=limits) == Run(step.calls[:2])
    journal: list[Entry] = [step, Called("call_1"), Called("call_2"), Returned("call_1", OK), Returned("call_2", OK)]
    action = next_of(journal, limits=limits)
    assert isinstance(action, Settle)
    assert action.call.id == "call_3"
    assert action.result.kind == "refused"
    assert "limit" in action.result.output
    assert next_of([*journal, Returned("call_3", action.result)], limits=limits) == Ask("none")


def test_the_client_may_allow_fewer_calls_but_not_more() -> None:
    assert isinstance(next_of([*answered(1), said(call(2))], replace(OFFER, most_calls=1)), Settle)
    assert isinstance(next_of([*answered(1), said(call(2))], replace(OFFER, most_calls=99), Limits(calls=1)), Settle)


def test_functions_of_the_client_know_no_limit_of_calls() -> None:
    only = Offer(functions=frozenset({"clock"}))
    assert next_of([said(call(1, "clock"))], only, Limits(calls=0)) == End("handed_out")


def test_when_the_time_is_over_no_call_is_made() -> None:
    action = next_of([said(call(1))], elapsed_s=120)
    assert isinstance(action, Settle)
    assert "time" in action.result.output
    assert next_of([said(call(1)), Returned("call_1", action.result)], elapsed_s=120) == Ask("none")


def test_the_last_step_offers_no_tool_and_one_that_calls_nevertheless_ends() -> None:
    limits = Limits(steps=2)
    assert next_of(answered(1), limits=limits) == Ask("none")
    end = next_of([*answered(1), *answered(2)], limits=limits)
    assert isinstance(end, End)
    assert end.reason == "limit"
    assert "2 steps" in end.explanation


def test_the_limit_on_tokens_holds_for_all_steps_together() -> None:
    offer = replace(OFFER, most_tokens=10)
    done = Returned("call_1", OK)
    assert next_of([said(call(1), tokens=4), done], offer) == Ask("auto", 6)
    assert next_of([said(call(1), tokens=10), done], offer) == End("cut")


def test_a_call_that_is_repeated_with_the_same_result_ends_with_an_explanation() -> None:
    end = next_of([*answered(1, arguments='{"a": 1, "b": 2}'), *answered(2, arguments='{"b":2,"a":1}')])
    assert isinstance(end, End)
    assert end.reason == "repeated"
    assert "'search'" in end.explanation
    again = [*answered(1, arguments="{"), *answered(2, arguments="{")]
    assert isinstance(next_of(again), End)


def test_the_same_call_with_another_result_goes_on() -> None:
    assert next_of([*answered(1, arguments="{}"), *answered(2, arguments="{}", result=ToolResult("ok", "b"))]) == Ask(
        "auto"
    )


def test_two_equal_calls_of_one_step_are_no_repetition() -> None:
    step = said(call(1), call(2))
    assert next_of([step, Returned("call_1", OK), Returned("call_2", OK)]) == Ask("auto")


class Loop(RuleBasedStateMachine):
    """Any model, any tools, and restarts wherever they hurt: the loop ends, and no call is made twice."""

    def __init__(self) -> None:
        super().__init__()
        self.journal: list[Entry] = []
        self.made: list[str] = []
        self.elapsed_s = 0.0
        self.limits = Limits(steps=4, calls=3)
        self.numbers = iter(range(10_000))

    @initialize(steps=st.integers(1, 5), calls=st.integers(0, 4), most=st.none() | st.integers(0, 3))
    def begin(self, steps: int, calls: int, most: int | None) -> None:
        self.limits = Limits(steps=steps, calls=calls)
        self.offer = replace(OFFER, most_calls=most)

    def action(self) -> Action:
        return decide(self.journal, self.offer, self.limits, self.elapsed_s)

    @precondition(lambda self: isinstance(self.action(), Ask))
    @rule(
        names=st.lists(st.sampled_from(["search", "pay", "clock", "shell"]), max_size=3),
        arguments=st.sampled_from(["{}", "{", '{"a": 1}']),
        complete=st.booleans(),
    )
    def say(self, names: list[str], arguments: str, complete: bool) -> None:
        calls = [call(next(self.numbers), each, arguments) for each in names]
        self.journal.append(said(*calls, complete=complete))

    @precondition(lambda self: isinstance(self.action(), Run))
    @rule(results=st.data(), killed=st.integers(0, 6))
    def make(self, results: st.DataObject, killed: int) -> None:
        """Begin the calls, and let the process end after some of the entries that are to be kept."""
        action = self.action()
        assert isinstance(action, Run)
        entries: list[Entry] = [Called(each.id) for each in action.calls]
        entries += [
            Returned(each.id, ToolResult("ok", results.draw(st.sampled_from(["a", "b"])))) for each in action.calls
        ]
        kept = entries[:killed]
        self.made += [each.call for each in kept if isinstance(each, Called)]
        self.journal += kept if len(kept) == len(entries) else [*kept, Resumed()]

    @precondition(lambda self: isinstance(self.action(), Settle))
    @rule()
    def settle(self) -> None:
        action = self.action()
        assert isinstance(action, Settle)
        self.journal.append(Returned(action.call.id, action.result))

    @rule(s=st.floats(0, 60))
    def wait(self, s: float) -> None:
        self.elapsed_s += s

    @invariant()
    def no_call_is_made_twice(self) -> None:
        assert len(self.made) == len(set(self.made))

    @invariant()
    def the_limits_hold(self) -> None:
        assert len(self.made) <= self.limits.calls
        assert sum(isinstance(each, Said) for each in self.journal) <= self.limits.steps + (not self.journal)

    @invariant()
    def only_what_was_offered_and_needs_nobody_runs(self) -> None:
        action = self.action() if hasattr(self, "offer") else Ask()
        if isinstance(action, Run):
            assert {each.name for each in action.calls} <= {"search"}
            assert not {each.id for each in action.calls} & set(self.made)


TestLoop = Loop.TestCase
TestLoop.settings = settings(max_examples=60, stateful_step_count=25, deadline=None)
