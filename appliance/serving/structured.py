"""What a client says of an answer's form, before the engine compiles it (pure).

Grammars are hostile until they are bounded: what is in a text costs little, but a few characters can ask for a great
deal by repeating it.
"""

from __future__ import annotations

import re
from dataclasses import replace

from appliance.core.errors import InvalidRequestError
from appliance.core.structured import Grammar
from appliance.serving.schemas import check_strict, patterns_of, prepared_schema

MOST_GRAMMAR_BYTES = 16 * 1024
MOST_EXPRESSION_BYTES = 4 * 1024
"""Of one regular expression; what it costs grows with the square."""
MOST_REPETITIONS = 5_000
"""Characters that an expression may come to once its repetitions are written out."""

_TOKEN = re.compile(
    r"\\[pP]\{[^}]*\}|\\[xu]\{[^}]*\}|\\.|\[\^?\]?(?:\\.|[^\]\\])*\]|\{(?P<least>\d+)(?:,(?P<most>\d*))?\}|.", re.DOTALL
)
_CLASSES = frozenset(("\\d", "\\D", "\\w", "\\W", "\\s", "\\S", "\\p", "\\P"))


def prepared(grammar: Grammar) -> Grammar:
    """Return a client's grammar as the engine is to compile it.

    Raises:
        InvalidRequestError: It is too large, or has a feature that is not supported.
    """
    if grammar.kind == "json_object":
        return grammar
    if grammar.kind == "json_schema":
        if grammar.strict:
            check_strict(grammar.text, grammar.param)
        text = prepared_schema(grammar.text, grammar.param)
        for pattern in patterns_of(text):
            _check_expression(pattern, MOST_EXPRESSION_BYTES, grammar.param)
        return replace(grammar, text=text)
    most = MOST_EXPRESSION_BYTES if grammar.kind == "regex" else MOST_GRAMMAR_BYTES
    _check_expression(grammar.text, most, grammar.param)
    return grammar


def _check_expression(expression: str, most: int, param: str) -> None:
    size = len(expression.encode())
    if size > most:
        raise InvalidRequestError(
            f"A grammar or regular expression has {size} bytes; {most} are allowed.",
            param=param,
            code="invalid_grammar",
        )
    size = written_out(expression)
    if size > max(MOST_REPETITIONS, len(expression)):
        raise InvalidRequestError(
            f"Written out, the repetitions in {expression[:60]!r} come to {min(size, 10**12)} characters; "
            f"{MOST_REPETITIONS} are allowed.",
            advice="Repeat a single class of characters, such as [a-z]{1,1000}, as often as you like.",
            param=param,
            code="invalid_grammar",
        )


def written_out(expression: str) -> int:
    """Return about how many characters a regular expression comes to once its counted repetitions are written out.

    Classes of characters count once: the engine counts those, rather than to write them out.
    """
    totals, last, counted = [0], 0, False
    for match in _TOKEN.finditer(expression):
        text = match[0]
        if match["least"] is not None:
            times = max(int(match["least"][:18]), int((match["most"] or "0")[:18]))
            totals[-1] += 0 if counted else last * max(0, times - 1)
            last = last if counted else last * max(1, times)
            continue
        if text in "*+?":
            continue
        counted = text == "." or text.startswith("[") or text[:2] in _CLASSES
        if text == "(":
            totals.append(0)
            last = 0
        elif text == ")" and len(totals) > 1:
            last = totals.pop()
            totals[-1] += last
        else:
            last = 1
            totals[-1] += 1
    return sum(totals)
