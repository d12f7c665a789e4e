"""The events of a stream that goes on after a restart, and the transcript that the model reads."""

from __future__ import annotations

from typing import Any

import pytest

from appliance.agents.body import body_of, ended, ending_of, error_of, usage_of
from appliance.agents.calling import checked
from appliance.agents.items import call_item, function_call, message, output_text
from appliance.agents.journal import calls_of, entry_of, output_of, read_turn, step_of, write_turn
from appliance.agents.loop import Call, Called, End, Entry, Resumed, Returned, Said
from appliance.agents.narration import Narrator, begun_call, begun_message, terminal
from appliance.agents.pending import decided_calls
from appliance.agents.tools import tools_of
from appliance.agents.transcript import NO_RESULT, check_calls, cut, messages_of
from appliance.core.agents import Turn
from appliance.core.errors import (
    ApplianceError,
    EngineError,
    InvalidRequestError,
    OverloadedError,
    StorageError,
)
from appliance.core.sessions import Step
from appliance.core.structured import Grammar
from appliance.core.tools import Tool, ToolChoice, ToolResult
from appliance.core.types import Priority, SamplingParams, TokenLogprob
from tests.agents.toolbox import Box, echo

CALL = Call("call_1", "search", '{"query": "a"}', "mcp_1")
SEARCH = Call("call_2", "find", '{"query": "a"}', "mcp_2")
OK = ToolResult("ok", "found", {"results": [{"file_id": "f"}]})
WHOLE = message("msg_1", [output_text("Hello", [TokenLogprob(1, b"Hello", float("-inf"))])], "completed")
FUNCTION = function_call(Call("call_3", "clock", "{}", "fc_1"), "completed")


def types(events: Any) -> list[str]:
    return [each["type"] for each in events]


@pytest.mark.parametrize(
    "item",
    [
        WHOLE,
        FUNCTION,
        call_item(CALL, "box", OK),
        call_item(CALL, "box", ToolResult("failed", "no")),
        call_item(SEARCH, "file_search", OK),
        {"id": "mcpr_1", "type": "mcp_approval_request", "name": "pay", "arguments": "{}", "server_label": "box"},
    ],
)
def test_wherever_a_stream_broke_off_the_rest_is_told_once(item: Any) -> None:
    whole = Narrator().catch_up([item])
    assert whole[0]["type"] == "response.output_item.added"
    assert whole[-1] == {**whole[-1], "type": "response.output_item.done", "item": item}
    for told in range(len(whole) + 1):
        rest = Narrator(whole[:told]).catch_up([item])
        events = [*whole[:told], *rest]
        assert [each["sequence_number"] for each in events] == list(range(len(events)))
        assert types(events).count("response.output_item.added") == 1
        assert types(events).count("response.output_item.done") == 1


def test_what_was_being_written_is_closed_and_the_answer_comes_in_a_new_item() -> None:
    before = Narrator()
    told = [*before.begin(begun_message("msg_0")), before.text("msg_0", "Hal")]
    after = Narrator(told)
    closed, *rest = after.catch_up([WHOLE])
    assert (closed["type"], closed["item"]["status"]) == ("response.output_item.done", "incomplete")
    assert closed["output_index"] == 0
    assert {each["output_index"] for each in rest} == {1}


def test_an_item_that_still_waits_for_its_result_is_left_open() -> None:
    before = Narrator()
    told = before.call(call_item(CALL, "box", None))
    assert Narrator(told).catch_up([], {"mcp_1"}) == []
    assert types(Narrator(told).close(call_item(CALL, "box", OK))) == [
        "response.mcp_call.completed",
        "response.output_item.done",
    ]


def test_a_journal_is_read_as_it_was_written_and_nothing_else() -> None:
    entries: list[Entry] = [Said((WHOLE,), (CALL,)), Called("call_1"), Returned("call_1", OK), Resumed()]
    steps = [step_of(number, each) for number, each in enumerate(entries)]
    assert [entry_of(each) for each in steps] == entries
    assert [each.kind for each in steps] == ["model", "call", "result", "model"]
    nonsense: list[dict[str, Any]] = [{}, {"said": 1}, {"other": {}}, {"a": 1, "b": 2}]
    for data in nonsense:
        with pytest.raises(StorageError):
            entry_of(Step(0, "model", data))


def test_a_turn_is_read_as_it_was_written() -> None:
    turn = Turn(
        "tiny",
        (WHOLE,),
        SamplingParams(logit_bias={7: 1.0}, grammar=Grammar("json_object"), stop=("a",)),
        functions=(Tool("clock"),),
        priority=Priority.FLEX,
    )
    assert read_turn(write_turn(turn)) == turn
    with pytest.raises(StorageError):
        read_turn({"model": 1})


def test_the_output_shows_calls_by_what_became_of_them() -> None:
    pay = Call("call_4", "pay", "{}", "mcp_4")
    journal: list[Entry] = [
        Called("call_1"),
        Said((WHOLE, FUNCTION), (CALL, Call("call_3", "clock", "{}", "fc_1"), pay)),
    ]
    labels, functions = {"search": "box", "pay": "box"}, frozenset({"clock"})
    assert output_of(journal, labels, functions) == [WHOLE, FUNCTION]
    end = End("approval", (pay,))
    shown = output_of([*journal, Returned("call_1", OK)], labels, functions, end)
    assert [each["type"] for each in shown] == ["message", "function_call", "mcp_call", "mcp_approval_request"]


def test_a_transcript_has_calls_behind_what_was_said_and_results_as_tools() -> None:
    items: list[Any] = [
        {"type": "message", "role": "user", "content": "Hi"},
        {"type": "reasoning", "summary": []},
        message("m", [output_text("Well.")], "completed"),
        FUNCTION,
        {"type": "function_call", "call_id": "open", "name": "clock", "arguments": "{}"},
        {"type": "function_call_output", "call_id": "call_3", "output": [{"type": "input_text", "text": "12"}]},
        {"type": "function_call_output", "call_id": "removed", "output": "?"},
        call_item(CALL, "box", ToolResult("timeout", "late")),
        {"type": "mcp_call", "id": "x", "name": "a", "arguments": "{}", "error": "plain"},
        {"type": "mcp_call", "id": "y", "name": "a", "arguments": "{}"},
        {"type": "mcp_call", "id": "z", "name": "a", "arguments": "{}", "error": {"content": 7}},
        {"type": "mcp_call", "id": "w", "name": "a", "arguments": "{}", "output": "out"},
        {"type": "file_search_call", "id": "f", "queries": ["a"]},
        call_item(SEARCH, "file_search", OK),
        {"role": "assistant", "content": [{"type": "refusal", "refusal": "No."}]},
    ]
    messages = messages_of("Be brief.", items, 100)
    shown = [(each.role, each.content or len(each.extra["tool_calls"])) for each in messages]
    assert shown == [
        ("system", "Be brief."),
        ("user", "Hi"),
        ("assistant", "Well."),
        ("tool", NO_RESULT),
        ("tool", "12"),
        ("assistant", 1),
        ("tool", "timeout: late"),
        ("assistant", 1),
        ("tool", "failed: plain"),
        ("assistant", 1),
        ("tool", NO_RESULT),
        ("assistant", 1),
        ("tool", "failed: "),
        ("assistant", 1),
        ("tool", "out"),
        ("assistant", 1),
        ("tool", NO_RESULT),
        ("assistant", 1),
        ("tool", "found"),
        ("assistant", "No."),
    ]
    assert [each["id"] for each in messages[2].extra["tool_calls"]] == ["call_3", "open"]
    assert messages_of("", items[:1], 100)[0].role == "user"


def test_a_cut_never_splits_a_character_and_says_what_is_missing() -> None:
    assert cut("界界", 6) == "界界"
    assert cut("界界", 5) == "界\n[6 bytes in all; the rest is left out here.]"


def test_what_answers_a_known_call_is_let_in() -> None:
    output = {"type": "function_call_output", "call_id": "call_3", "output": "1"}
    check_calls([FUNCTION], [output])
    request = {"type": "mcp_approval_request", "id": "mcpr_1", "name": "pay", "arguments": "{}"}
    response = {"type": "mcp_approval_response", "approval_request_id": "mcpr_1", "approve": True}
    check_calls([request], [response, {"type": "message"}])
    assert len(decided_calls([request], [response])) == 1
    assert len(decided_calls([request], [{**response, "approve": False}])) == 2
    assert decided_calls([], [response]) == []
    made = {"type": "mcp_call", "approval_request_id": "mcpr_1"}
    assert decided_calls([request, made], [response]) == []


def test_the_choice_of_tools_is_resolved_by_name_and_label() -> None:
    box = Box("search", echo, label="box", guarded=True)
    turn = Turn("m", (), SamplingParams(), functions=(Tool("clock"),), tool_choice=ToolChoice("required", ("@box",)))
    tools = tools_of(turn, {"search": box})
    assert tools.choice == ToolChoice("required", ("search",))
    assert (tools.offer.functions, tools.offer.built_in) == (frozenset(), frozenset({"search"}))
    assert tools.offer.guarded == {"search"}
    assert tools.choice_for("given") == tools.choice
    assert tools.choice_for("none") == ToolChoice("none", ("search",))
    assert [each.name for each in tools.built_in] == ["search"]
    assert tools.labels == {"search": "box"}
    named = tools_of(
        Turn("m", (), SamplingParams(), functions=(Tool("clock"),), tool_choice=ToolChoice("auto", ("clock",))), {}
    )
    assert named.offer.functions == {"clock"}
    nothing = tools_of(Turn("m", (), SamplingParams(), functions=(Tool("clock"),), tool_choice=ToolChoice("none")), {})
    assert nothing.offer.functions == frozenset()
    with pytest.raises(InvalidRequestError, match="not among the tools"):
        tools_of(Turn("m", (), SamplingParams(), tool_choice=ToolChoice("auto", ("x",))), {})
    with pytest.raises(InvalidRequestError, match="no tools"):
        tools_of(Turn("m", (), SamplingParams(), tool_choice=ToolChoice("required")), {})


def test_an_error_in_a_response_says_nothing_of_our_insides() -> None:
    assert error_of(InvalidRequestError("Too long.", param="input"), "r")["code"] == "invalid_prompt"
    assert error_of(OverloadedError("Full."), "r")["code"] == "rate_limit_exceeded"
    assert error_of(EngineError("It broke."), "r")["message"] == "It broke."
    assert "under request id r" in error_of(ApplianceError("a secret"), "r")["message"]
    assert ending_of(End("cut")) == ("incomplete", {"reason": "max_output_tokens"})
    assert ending_of(End("handed_out")) == ("completed", None)
    assert ending_of(End("limit")) == ("incomplete", {"reason": "max_messages"})


def test_queries_of_a_search_are_texts_whatever_the_model_wrote() -> None:
    for arguments, queries in (("{", []), ('{"queries": 7}', []), ('{"queries": ["a", 1]}', ["a"]), ("{}", [])):
        assert call_item(Call("c", "find", arguments, "i"), "file_search", None)["queries"] == queries
    failed = call_item(SEARCH, "file_search", ToolResult("failed", "no"))
    assert failed["status"] == "failed"
    assert call_item(CALL, "box", None)["status"] == "calling"


def test_details_that_are_no_json_or_too_large_are_dropped() -> None:
    assert checked(ToolResult("ok", "a", {"b": object()})).details == {}
    assert checked(ToolResult("ok", "a", {"b": "x" * 2_000_000})).details == {}
    assert checked(ToolResult("ok", "a", {"b": 1})).details == {"b": 1}


def test_a_response_object_adds_up_its_steps() -> None:
    steps: list[Entry] = [
        Said(calls=(CALL,), written_tokens=2, read_tokens=5, cached_tokens=3),
        Called("call_1"),
        Said(read_tokens=4),
    ]
    usage = usage_of(steps)
    assert (usage["input_tokens"], usage["output_tokens"], usage["total_tokens"]) == (9, 2, 11)
    assert usage["input_tokens_details"] == {"cached_tokens": 3, "cache_write_tokens": 6}
    assert calls_of(steps) == {"call_1": CALL}
    body = body_of("resp_1", 7, Turn("m", (), SamplingParams(), conversation="conv_1", shown={"store": True}))
    assert (body["status"], body["conversation"], body["store"]) == ("in_progress", {"id": "conv_1"}, True)
    done = ended(body, "completed", [WHOLE], usage, 9)
    assert (done["completed_at"], terminal(done, 4)["type"]) == (9, "response.completed")
    assert ended(body, "cancelled", [], None, 9)["completed_at"] is None
    assert terminal({**body, "status": "cancelled"}, 4)["type"] == "response.incomplete"


def test_what_no_response_object_can_tell_is_an_event_of_its_own() -> None:
    narrator = Narrator()
    assert narrator.lifecycle("response.created", {})["sequence_number"] == 0
    assert narrator.failure("server_error", "no")["type"] == "error"
    assert types(narrator.begin(begun_call("fc_9", "call_9", "clock"))) == ["response.output_item.added"]
    assert narrator.arguments("fc_9", "{")["item_id"] == "fc_9"
    assert narrator.next_number == 4


def test_what_answers_no_call_is_refused() -> None:
    with pytest.raises(InvalidRequestError, match="call_x"):
        check_calls([], [{"type": "function_call_output", "call_id": "call_x", "output": ""}])
    with pytest.raises(InvalidRequestError, match="mcpr_x"):
        check_calls([], [{"type": "mcp_approval_response", "approval_request_id": "mcpr_x", "approve": True}])
