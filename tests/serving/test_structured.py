"""What a client's grammar may cost is known before it is compiled."""

from __future__ import annotations

import json
import re
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from appliance.core.errors import InvalidRequestError
from appliance.core.structured import Grammar
from appliance.serving.structured import MOST_EXPRESSION_BYTES, MOST_GRAMMAR_BYTES, prepared, written_out


@pytest.mark.parametrize(
    ("expression", "characters"),
    [
        ("", 0),
        ("abc", 3),
        ("a{5}", 5),
        ("a{2,5}b", 6),
        ("a{5,}", 5),
        ("(ab){10}c", 21),
        ("((a{10}){10}){10}", 1000),
        ("[a-z]{1,1000000}", 1),
        (r".{9}\d{9}\p{L}{9}[^\]{9}]{9}", 4),
        (r"(\d{9}x){3}", 6),
        (r"\({3}\x{41}", 4),
        ("a?b*c+", 3),
        ("){2}(", 2),
        ("a{0}", 1),
    ],
)
def test_repetitions_are_counted_as_they_nest(expression: str, characters: int) -> None:
    assert written_out(expression) == characters


@given(st.text(alphabet="ab()[]{}0123456789,.*+?|\\^", max_size=200))
def test_any_text_is_counted(expression: str) -> None:
    assert written_out(expression) >= 0


@pytest.mark.parametrize(
    "grammar",
    [
        Grammar("regex", "(a{1000}){1000}", "f"),
        Grammar("regex", "x" * (MOST_EXPRESSION_BYTES + 1), "f"),
        Grammar("lark", 'start: "a"{100000}', "f"),
        Grammar("gbnf", 'root ::= "' + "x" * MOST_GRAMMAR_BYTES + '"', "f"),
        Grammar("json_schema", json.dumps({"pattern": "^(a{1000}){1000}$"}), "f"),
        Grammar("json_schema", json.dumps({"patternProperties": {"a{9999}": {}}}), "f"),
        Grammar("json_schema", '{"type": "string"}', "f", strict=True),
        Grammar("regex", "a{" + "9" * 3000 + "}", "f"),
    ],
)
def test_what_asks_for_too_much_is_refused_at_once(grammar: Grammar) -> None:
    started = time.thread_time()
    with pytest.raises(InvalidRequestError) as refused:
        prepared(grammar)
    assert time.thread_time() - started < 1.0
    assert (refused.value.param, refused.value.code) == ("f", "invalid_grammar")
    assert re.search(r"\d+ are allowed|strict", refused.value.message)


def test_what_is_small_passes() -> None:
    for grammar in (Grammar("json_object"), Grammar("regex", "(yes|no){3}"), Grammar("lark", 'start: "a"')):
        assert prepared(grammar) == grammar
    schema = prepared(Grammar("json_schema", '{"type": "string", "format": "topic", "pattern": "^a"}'))
    assert json.loads(schema.text) == {"type": "string", "pattern": "^a"}
